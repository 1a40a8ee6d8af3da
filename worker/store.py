"""The worker's side of the job store: claim, renew, finish, release, and the reaper's verbs.

Each verb is a Lua script of shared/lua. Synchronous, and safe to call from several threads.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, NamedTuple, cast
from uuid import uuid4

from celery import Celery
from redis import BlockingConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from shared import keys
from shared.broker import QUEUE_NAME, doorbell
from shared.errors import HandbackLimit, ServiceError, StoreUnavailable, WorkerLost, failure_of
from shared.jobs import Claim, JobStatus
from shared.scripts import has_script_flags, source
from shared.settings import Settings
from shared.storage import Manifest

VERBS = (
    "claim",
    "renew",
    "split",
    "finish_part",
    "finish",
    "release",
    "replan",
    "reap",
    "evict",
    "submit",
)
STATE_FIELDS = ["fingerprint", "status", "error_code", "expires_ms"]


class AppendOnlyFile(NamedTuple):
    """Of Redis. `refusals`: names the last write that it refused because it could not write that
    file; empty: it never did."""

    refusals: str
    is_written: bool
    is_rewriting: bool
    is_rewritten: bool  # the last rewrite went well


class WorkerStore:
    """Redis as a worker sees it. A connection error is StoreUnavailable, never a verdict."""

    def __init__(self, settings: Settings, celery: Celery, worker_id: str):
        self.worker_id = worker_id
        self._settings = settings
        self._celery = celery
        self._redis = Redis(
            connection_pool=BlockingConnectionPool.from_url(
                settings.redis_url.get_secret_value(),
                max_connections=settings.worker_slots + 4,
                timeout=5,
                socket_timeout=5,
                socket_connect_timeout=2,
                socket_keepalive=True,
                decode_responses=True,
                retry=Retry(NoBackoff(), 1, supported_errors=(NoConnection,)),
                client_name="whisper-worker-store",
            )
        )
        self._scripts: dict[str, Script] = {}
        self._loading = threading.Lock()

    def claim(self, *, takes_parts: bool = True, takes_last: bool = True) -> Claim | None:
        """What should run next, now ours; None when nothing is queued. `takes_parts`: also a part
        of a long recording. `takes_last`: also what has one attempt left."""
        claim_id = str(uuid4())
        reply = self._run(
            "claim",
            claim_id,
            self.worker_id,
            self._settings.lease_ms,
            int(takes_parts),
            0 if takes_last else self._settings.max_attempts,
        )
        return Claim.of(claim_id, reply) if reply else None

    def renew(self, claim: Claim, progress: float) -> str:
        """ok | cancelled | lost"""
        reply = self._run(
            "renew", claim.unit, claim.claim_id, self._settings.lease_ms, f"{progress:.4f}"
        )
        return str(reply)

    def split(self, claim: Claim, plan: str, shares: Sequence[float]) -> str:
        """From now on the parts are what workers claim. ok | lost"""
        numbers = [f"{share:.6f}" for share in shares]
        return str(self._run("split", claim.fingerprint, claim.claim_id, plan, *numbers))

    def finish_part(self, claim: Claim, segments: str) -> str:
        """ok | lost"""
        return str(self._run("finish_part", claim.unit, claim.claim_id, segments))

    def part_results(self, claim: Claim) -> list[str | None]:
        """What finish_part was given for each part."""
        units = [keys.part(claim.fingerprint, number) for number in range(claim.parts)]
        with _translated():
            return cast(
                "list[str | None]", self._redis.mget([keys.transcript(unit) for unit in units])
            )

    def replan(self, claim: Claim) -> tuple[str, list[str]]:
        """A part's audio is gone: (requeued | failed | lost, jobs that it ended)."""
        error = HandbackLimit()
        reply = self._run(
            "replan",
            claim.unit,
            claim.claim_id,
            self._settings.max_handbacks,
            error.code,
            error.message,
            self._settings.retention_ms,
            self._settings.grace_ms,
        )
        return reply[0], reply[1] if len(reply) > 1 else []

    def complete(
        self, claim: Claim, transcript: bytes, model: str, seconds: float
    ) -> list[str] | None:
        """The ids of the jobs that it ended; None: the claim was lost, nothing was written."""
        return self._finish(claim, "completed", transcript, model, seconds, "", "")

    def fail(self, claim: Claim, error: ServiceError) -> list[str] | None:
        """Ends the transcription for good. Returns as `complete` does."""
        model = self._settings.model_key
        return self._finish(claim, "failed", b"", model, None, error.code, error.message)

    def hand_back(self, claim: Claim) -> tuple[str, list[str]]:
        """Gives it back without blame: (requeued | failed | lost, jobs that it ended)."""
        return self._release(claim, 0, self._settings.max_handbacks, HandbackLimit())

    def retry(self, claim: Claim, error: ServiceError) -> tuple[str, list[str]]:
        """Gives it back, attempt counted: (requeued | failed | lost, jobs that it ended)."""
        return self._release(claim, 1, self._settings.max_attempts, error)

    def holders(self, claim: Claim) -> list[str]:
        """The ids of every job that holds the transcription now."""
        with _translated():
            return list(cast("set[str]", self._redis.smembers(keys.holders(claim.fingerprint))))

    def reap(self) -> tuple[int, int, list[str]]:
        """(leases that had ended, length of the queue, jobs that were quarantined)."""
        error = WorkerLost()
        requeued, queued, ended = self._run(
            "reap",
            self._settings.max_attempts,
            error.code,
            error.message,
            self._settings.retention_ms,
            self._settings.grace_ms,
            self._settings.lease_ms,
        )
        return requeued, queued, ended

    def evict(self, max_bytes: int) -> int:
        return int(self._run("evict", max_bytes))

    def resubmit(self, manifest: Manifest) -> str:
        """new | joined | hit | exists; or replayed | conflict, where a request with the same
        Idempotency-Key has made another job meanwhile."""
        outcome, _ = self._run(
            "submit",
            *manifest.identity,
            self._settings.retention_ms,
            self._settings.grace_ms,
            *("", "", "", ""),  # no limits: it was accepted before
            *chain(*manifest.job_options.items()),
        )
        return str(outcome)

    def runs_in_parts(self, fingerprint: str) -> bool:
        with _translated():
            return bool(self._redis.hexists(keys.transcription(fingerprint), "parts"))

    def job_states(self, job_ids: Sequence[str]) -> list[str]:
        """For each id: unknown | unfinished | retryable | finished."""
        with _translated():
            pipe = self._redis.pipeline(transaction=False)
            pipe.time()  # the first: nothing that has expired then can be retried any more
            for job_id in job_ids:
                pipe.hmget(keys.job(job_id), STATE_FIELDS)
            (seconds, _), *records = pipe.execute()
        return [state_of(int(seconds) * 1000, *record) for record in records]

    def ring(self, missing: int) -> None:
        """Pushes so many bells."""
        with _translated():
            self._redis.lpush(
                QUEUE_NAME, *(doorbell(self._celery, "reaper") for _ in range(missing))
            )

    def bells(self) -> int:
        """How many messages wait."""
        with _translated():
            return int(self._redis.llen(QUEUE_NAME))

    def report(self, about: dict[str, Any], lifetime_seconds: int) -> None:
        """Says that this worker lives; the report disappears unless it is repeated."""
        with _translated():
            pipe = self._redis.pipeline(transaction=True)
            pipe.set(keys.worker(self.worker_id), json.dumps(about), ex=lifetime_seconds)
            pipe.zadd(keys.WORKERS, {self.worker_id: about["heartbeat_at"]})
            pipe.zremrangebyscore(keys.WORKERS, 0, about["heartbeat_at"] - 3600)
            pipe.execute()

    def retire(self) -> None:
        """Takes this worker's report away."""
        with _translated():
            self._redis.delete(keys.worker(self.worker_id))
            self._redis.zrem(keys.WORKERS, self.worker_id)

    def append_only_file(self) -> AppendOnlyFile | None:
        """None where there is none, or Redis does not tell."""
        with _translated():
            pipe = self._redis.pipeline(transaction=False)
            for section in ("server", "persistence", "errorstats"):
                pipe.info(section)
            try:
                server, about, errors = pipe.execute()
            except ResponseError:
                return None
        if not about.get("aof_enabled"):  # others than Redis itself may tell less
            return None
        count = errors.get("errorstat_MISCONF", {}).get("count", 0)
        return AppendOnlyFile(
            refusals=f"{server['run_id']} {count}" if count else "",
            is_written=about["aof_last_write_status"] == "ok",
            is_rewriting=bool(about["aof_rewrite_in_progress"] or about["aof_rewrite_scheduled"]),
            is_rewritten=about["aof_last_bgrewrite_status"] == "ok",
        )

    def begin_renewal(self, refusals: str, lifetime_seconds: int) -> bool:
        """Is it this worker that shall ask for a new file?"""
        with _translated():
            if self._redis.get(keys.RENEWED) == refusals:
                return False
            asked = self._redis.set(keys.RENEWED, refusals, ex=lifetime_seconds, get=True)
            return asked != refusals

    def rewrite_file(self) -> None:
        """Nothing happens where Redis refuses: it does so already, or lets nobody ask."""
        with _translated(), suppress(ResponseError):
            self._redis.bgrewriteaof()

    def note_renewal(self, refusals: str) -> None:
        with _translated():
            self._redis.set(keys.RENEWED, refusals)

    def close(self) -> None:
        self._redis.close()
        self._redis.connection_pool.disconnect()

    def _finish(
        self,
        claim: Claim,
        status: str,
        transcript: bytes,
        model: str,
        seconds: float | None,
        code: str,
        message: str,
    ) -> list[str] | None:
        reply = self._run(
            "finish",
            claim.unit,
            claim.claim_id,
            status,
            transcript,
            model,
            "" if seconds is None else f"{seconds:.3f}",
            code,
            message,
            self._settings.retention_ms,
            self._settings.grace_ms,
        )
        return reply[1] if reply[0] == "ok" else None

    def _release(
        self, claim: Claim, blame: int, limit: int, error: ServiceError
    ) -> tuple[str, list[str]]:
        reply = self._run(
            "release",
            claim.unit,
            claim.claim_id,
            blame,
            limit,
            error.code,
            error.message,
            self._settings.retention_ms,
            self._settings.grace_ms,
        )
        return reply[0], reply[1] if len(reply) > 1 else []

    def _run(self, verb: str, *args: str | int | bytes) -> Any:
        with _translated():
            return self._script(verb)(args=list(args))

    def _script(self, verb: str) -> Script:
        with self._loading:
            if not self._scripts:
                version = cast("dict[str, str]", self._redis.info("server"))["redis_version"]
                has_flags = has_script_flags(version)
                self._scripts = {
                    name: self._redis.register_script(source(name, has_flags=has_flags))
                    for name in VERBS
                }
            return self._scripts[verb]


def state_of(
    now_ms: int, fingerprint: str | None, status: str | None, code: str, expires_ms: str | None
) -> str:
    """As `job_states` has it, from the values of STATE_FIELDS."""
    if not fingerprint:
        return "unknown"
    if not status:
        return "unfinished"
    is_kept = int(expires_ms or 0) > now_ms
    is_retryable = status == JobStatus.FAILED and failure_of(code, "").retryable
    return "retryable" if is_kept and is_retryable else "finished"


@contextmanager
def _translated() -> Iterator[None]:
    """Redis's errors as ours."""
    try:
        yield
    except RedisError as exc:
        raise StoreUnavailable(f"The job store does not answer: {exc}") from exc
