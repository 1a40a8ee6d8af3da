"""Whom the service tells of every job's end: a receiver of webhooks that believes no event without
its signature."""

from __future__ import annotations

import random

from standardwebhooks import Webhook, WebhookVerificationError

from api.signing import new_secret
from tests.chaos.ledger import Ledger
from tests.receiver import Received, Receiver, Reply

SECRET = new_secret()
SETTINGS = {
    "egress_allow": "127.0.0.1",
    "webhook_secret": SECRET,
    "webhook_timeout_seconds": "2",
    "webhook_retry_seconds": ",".join(["2"] * 20),
}
REFUSED = 0.1  # of all attempts: they come again


class Listener(Receiver):
    """Has events noted in the ledger. `violations`: what was no event of a job of ours."""

    def __init__(self, ledger: Ledger, seed: int):
        super().__init__()
        self.violations: list[str] = []
        self._ledger = ledger
        self._chance = random.Random(f"{seed} listener")
        ledger.tell = lambda job: self.url(f"/{job.number}")

    def take(self, request: Received) -> Reply:
        reply = super().take(request)
        try:
            event = Webhook(SECRET).verify(request.body, dict(request.headers))
            job = self._ledger.jobs[int(request.path[1:])]
            job_id, kind = event["data"]["job_id"], event["type"]
        except (WebhookVerificationError, ValueError, LookupError) as exc:
            self.violations.append(f"{request.path}: {exc!r}")
            return reply
        if self._chance.random() < REFUSED:
            return Reply(503)
        job.told.append((job_id, kind))
        return reply
