"""Tells webhooks: one loop in each API process takes what is due and sends it, so many at a time,
and only so many to one receiver, so that one that is slow delays no other.

A receiver has its say with a status: 2xx is delivered, most of 4xx ends it. Everything else is
tried again after growing pauses. What a process has taken when it dies, another takes when its
lease has ended: a receiver may hear the same twice, under the same `webhook-id`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from api.deliveries import Delivery, DeliveryStore, Outcome, State
from api.egress import Egress
from api.intake import links
from api.signing import Signer
from shared.errors import StoreUnavailable, UrlNotAllowed, UrlTooSlow, UrlUnreachable
from shared.jobs import Job
from shared.metrics import ApiMetrics
from shared.schemas import EndedJob, Failure, WebhookEvent
from shared.settings import Settings, parse_pauses

log = logging.getLogger(__name__)

AT_A_TIME = 100
AT_A_TIME_TO_ONE = 4
POLL_SECONDS = 0.5
AWAY_SECONDS = 2.0  # between two looks at a store that does not answer
STOP_SECONDS = 2.0
READ_BYTES = 64 * 1024  # of an answer, which says nothing to us
NOT_FINAL = frozenset({408, 425, 429})  # of 4xx
GONE = 410
JITTER = (0.8, 1.2)
ATTEMPT_ERRORS = (
    *("status", "gone", "redirect"),  # what it answered
    *("timeout", "connection", "tls", "protocol", "name", "not_allowed"),  # it did not answer
    "interrupted",  # of an attempt that is being made, or whose sender died: claim_deliveries.lua
)
RESULTS: dict[State, str] = {"delivered": "delivered", "pending": "retried", "failed": "failed"}


class Sender:
    """One for each API process."""

    def __init__(
        self,
        settings: Settings,
        store: DeliveryStore,
        egress: Egress,
        signer: Signer,
        metrics: ApiMetrics,
    ):
        self._store = store
        self._egress = egress
        self._signer = signer
        self._metrics = metrics
        self._timeout_seconds = settings.webhook_timeout_seconds
        self._pauses = parse_pauses(settings.webhook_retry_seconds)
        self._sending: dict[asyncio.Task[None], Delivery] = {}
        self._to: Counter[str] = Counter()  # receiver -> how many are being sent to it
        self._wake = asyncio.Event()  # one has ended, or all is to
        self._is_stopping = False

    def start(self) -> None:
        self._running = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """What is under way has a moment to end; the rest is given back."""
        self._is_stopping = True  # not cancelled: redis-py can lose that on Python 3.11
        self._wake.set()
        await self._running
        if self._sending:
            await asyncio.wait(self._sending, timeout=STOP_SECONDS)
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)

    async def _run(self) -> None:
        while not self._is_stopping:
            self._wake.clear()
            pause_seconds = POLL_SECONDS
            try:
                claimed = await self._claim()
            except StoreUnavailable:
                claimed, pause_seconds = [], AWAY_SECONDS
            except Exception:
                log.exception("no webhooks are told", extra={"action": "sender_failed"})
                claimed, pause_seconds = [], AWAY_SECONDS
            for delivery in claimed:
                self._begin(delivery)
            if not claimed:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), pause_seconds)

    async def _claim(self) -> list[Delivery]:
        free = AT_A_TIME - len(self._sending)
        busy = [receiver for receiver, n in self._to.items() if n >= AT_A_TIME_TO_ONE]
        return await self._store.claim(free, len(self._pauses) + 1, busy) if free else []

    def _begin(self, delivery: Delivery) -> None:
        task = asyncio.create_task(self._deliver(delivery))
        self._sending[task] = delivery
        self._to[delivery.receiver] += 1
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        receiver = self._sending.pop(task).receiver
        self._to[receiver] -= 1
        if not self._to[receiver]:
            del self._to[receiver]
        self._wake.set()

    async def _deliver(self, delivery: Delivery) -> None:
        until = time.monotonic() + self._store.lease_seconds
        outcome = None
        try:
            outcome = await self._attempt(delivery)
            await self._settle(delivery, outcome, until)
        except asyncio.CancelledError:
            with suppress(StoreUnavailable):
                if outcome:
                    await self._store.settle(delivery, outcome)
                else:
                    await self._store.release(delivery)
            raise
        except Exception:  # a mistake of ours; its lease ends, and it is tried again, not for ever
            log.exception("a webhook could not be told", extra={"action": "webhook_broken"})

    async def _attempt(self, delivery: Delivery) -> Outcome:
        at, began = datetime.now(UTC), time.monotonic()
        status, error, asked_seconds = None, None, 0.0
        try:
            async with asyncio.timeout(self._timeout_seconds):
                url = self._egress.check(
                    "webhook_url", delivery.job.options.webhook_url, only_https=True
                )
                body = body_of(delivery.job)
                async with self._egress.ask("POST", url, self._headers(delivery, body), body) as a:
                    status, error = a.status, error_of(a.status)
                    asked_seconds = retry_after_seconds(a.headers.get("retry-after", ""))
                    read_bytes = 0
                    async for chunk in a.body:
                        read_bytes += len(chunk)
                        if read_bytes > READ_BYTES:
                            break
        except (TimeoutError, UrlTooSlow, UrlUnreachable, UrlNotAllowed) as exc:
            if status is None:  # else it has had its say
                error = error_in(exc)
        state, pause_seconds = verdict(status, delivery.tries, self._pauses, asked_seconds)
        return Outcome(state, status, error, at, time.monotonic() - began, pause_seconds)

    def _headers(self, delivery: Delivery, body: bytes) -> dict[str, str]:
        webhook_id, timestamp = delivery.webhook_id, int(time.time())
        return {
            "Content-Type": "application/json",
            "webhook-id": webhook_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": self._signer.signature(
                delivery.owner, webhook_id, timestamp, body
            ),
        }

    async def _settle(self, delivery: Delivery, outcome: Outcome, until: float) -> None:
        """Tries as long as the claim lasts: what is not written down is sent again."""
        while True:
            try:
                is_written = await self._store.settle(delivery, outcome)
                break
            except StoreUnavailable:
                if time.monotonic() > until:
                    is_written = False
                    break
                await asyncio.sleep(POLL_SECONDS)
        self._metrics.webhooks.labels(RESULTS[outcome.state]).inc()
        log.info(
            "webhook told" if outcome.state == "delivered" else "webhook not told",
            extra={
                "action": "webhook_attempted",
                "job_id": delivery.job.job_id,
                "receiver": delivery.receiver,
                "attempt": delivery.number,
                "status_code": outcome.status_code,
                "error": outcome.error,
                "result": RESULTS[outcome.state],
                "is_written": is_written,
            },
        )


def body_of(job: Job) -> bytes:
    """The same bytes for every attempt: all in it is settled when the job ends."""
    event = WebhookEvent(
        type=f"transcription.{job.status}",
        timestamp=job.finished_at,
        data=EndedJob(
            job_id=job.job_id,
            status=job.status,
            metadata=job.options.metadata,
            duration=job.duration,
            error=Failure(code=job.error_code, message=job.error_message)
            if job.error_code
            else None,
            submitted_at=job.submitted_at,
            finished_at=job.finished_at,
            expires_at=job.expires_at,
            links=links(job.job_id),
        ),
    )
    return event.model_dump_json().encode()


def verdict(
    status: int | None, tries: int, pauses: tuple[float, ...], asked_seconds: float
) -> tuple[State, float]:
    """(what the delivery is now, how long until it is tried again). `asked_seconds`: the receiver's
    Retry-After, honoured up to the longest of our own pauses."""
    if status is not None and 200 <= status < 300:
        return "delivered", 0
    is_final = status is not None and 400 <= status < 500 and status not in NOT_FINAL
    if is_final or tries > len(pauses):
        return "failed", 0
    pause_seconds = pauses[tries - 1] * random.uniform(*JITTER)
    return "pending", max(pause_seconds, min(asked_seconds, max(pauses)))


def error_of(status: int) -> str | None:
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        return "redirect"
    return "gone" if status == GONE else "status"


def error_in(exc: Exception) -> str:
    if isinstance(exc, UrlUnreachable):
        return exc.reason
    return "not_allowed" if isinstance(exc, UrlNotAllowed) else "timeout"


def retry_after_seconds(header: str) -> float:
    """Seconds or a date; 0 for what is neither."""
    if header.isascii() and header.isdigit():
        return float(header[:10])
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
