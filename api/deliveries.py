"""The API's side of webhooks in the job store: what is to be told waits there, and survives every
process. Each verb is a Lua script of shared/lua; what is due is claimed, so that two senders never
send the same attempt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal
from uuid import uuid4

from redis.asyncio import Redis

from api.store import Scripts
from shared.errors import JobNotFound, ResultNotReady, WebhookNotFound
from shared.jobs import Job, pairs
from shared.schemas import JobWebhook, WebhookAttempt
from shared.settings import Settings

VERBS = ("claim_deliveries", "settle_delivery", "delivery", "redeliver")
KEPT_ATTEMPTS = 50
SPARE_SECONDS = 5  # of a lease: for the store, before and after

State = Literal["pending", "delivered", "failed"]


@dataclass(frozen=True)
class Delivery:
    """A sender's right to tell one webhook, until its lease ends."""

    job: Job
    owner: str  # of the job; '' without keys
    receiver: str  # scheme and host
    claim_id: str
    number: int  # of this attempt, counted from 1
    tries: int  # since the job ended, or since a caller asked for it again

    @property
    def webhook_id(self) -> str:
        return webhook_id_of(self.job.job_id, self.job.retries)


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt."""

    state: State  # of the delivery
    status_code: int | None
    error: str | None
    at: datetime
    seconds: float
    pause_seconds: float = 0  # to the next attempt of one that stays pending


def webhook_id_of(job_id: str, retries: int = 0) -> str:
    """The same for every attempt, whoever makes it: receivers know by it what they have seen. The
    end of a job that was retried is another event."""
    return f"msg_{job_id.replace('-', '')}" + (f"_{retries}" if retries else "")


class DeliveryStore:
    """Every method may raise StoreUnavailable."""

    def __init__(self, settings: Settings, redis: Redis):
        self._redis = redis
        self._run = Scripts(redis, VERBS).run
        self._lifetime_ms = settings.retention_ms + settings.grace_ms
        self.lease_seconds = settings.webhook_timeout_seconds * 2 + SPARE_SECONDS

    async def close(self) -> None:
        await self._redis.aclose()

    async def claim(
        self, most: int, most_tries: int, left_alone: Iterable[str] = ()
    ) -> list[Delivery]:
        """What is due, one of each receiver, but for those to be left alone."""
        claim_id = str(uuid4())
        lease_ms = int(self.lease_seconds * 1000)
        reply = await self._run(
            "claim_deliveries", most, claim_id, lease_ms, most_tries, *left_alone
        )
        return [
            Delivery(
                job=Job.of(job_id, [0, record, [], -1, 1]),
                owner=pairs(record).get("owner", ""),
                receiver=receiver,
                claim_id=claim_id,
                number=number,
                tries=tries,
            )
            for job_id, receiver, record, number, tries in reply
        ]

    async def settle(self, delivery: Delivery, outcome: Outcome) -> bool:
        """Ends a claim. False: it was lost, nothing was written."""
        attempt = {
            "number": delivery.number,
            "at_ms": int(outcome.at.timestamp() * 1000),
            "status_code": outcome.status_code,
            "error": outcome.error,
            "seconds": round(outcome.seconds, 3),
        }
        pause_ms = int(outcome.pause_seconds * 1000)
        return await self._settle(delivery, outcome.state, pause_ms, json.dumps(attempt))

    async def release(self, delivery: Delivery) -> bool:
        """Gives a claim back: nothing was sent, or nobody knows. It is due again."""
        return await self._settle(delivery, "pending", 0, "")

    async def _settle(self, delivery: Delivery, state: State, pause_ms: int, attempt: str) -> bool:
        reply = await self._run(
            "settle_delivery",
            delivery.job.job_id,
            delivery.claim_id,
            state,
            pause_ms,
            attempt,
            KEPT_ATTEMPTS,
            pause_ms + self._lifetime_ms,
        )
        return bool(reply == "ok")

    async def read(self, job_id: str, seen_by: str) -> JobWebhook:
        """Raises JobNotFound, WebhookNotFound."""
        reply = await self._run("delivery", job_id, seen_by)
        if not reply:
            raise JobNotFound
        receiver, fields, due_ms, retries = reply
        if not receiver:
            raise WebhookNotFound
        record = pairs(fields)
        is_sent_now = "claim_id" in record  # and due_ms is when its lease ends
        attempts = [_attempt(v) for name, v in record.items() if name.startswith("attempt:")]
        return JobWebhook(
            job_id=job_id,
            webhook_id=webhook_id_of(job_id, int(retries)),
            receiver=receiver,
            state=record.get("state", "pending"),
            attempts=sorted(attempts, key=lambda attempt: attempt.number),
            next_attempt_at=_instant(int(due_ms)) if due_ms and not is_sent_now else None,
        )

    async def redeliver(self, job_id: str, seen_by: str) -> None:
        """Tells the webhook again, now; does nothing while it is being told. Raises JobNotFound,
        WebhookNotFound, ResultNotReady."""
        outcome = await self._run("redeliver", job_id, seen_by, self._lifetime_ms)
        if outcome == "unknown":
            raise JobNotFound
        if outcome == "none":
            raise WebhookNotFound
        if outcome == "unfinished":
            raise ResultNotReady("The job has not ended, so there is nothing to tell its webhook.")


def _attempt(text: str) -> WebhookAttempt:
    kept = json.loads(text)
    return WebhookAttempt(at=_instant(kept.pop("at_ms")), **kept)


def _instant(milliseconds: float) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
