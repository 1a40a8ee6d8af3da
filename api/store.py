"""The API's side of the job store: submit, read, cancel, erase. Every call is one round trip.

Each verb is a Lua script of shared/lua; this file only loads them, calls them and translates what
Redis says into our errors.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from itertools import chain, takewhile
from math import ceil
from typing import Any, cast
from uuid import uuid4

from celery import Celery
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import RedisError, ResponseError

from api.snapshot import Snapshot
from api.together import Together
from shared import keys
from shared.broker import QUEUE_NAME, doorbell, short
from shared.errors import (
    AudioMinutesUsed,
    DigestUnknown,
    IdempotencyConflict,
    JobExpired,
    JobNotFailed,
    JobNotFound,
    LimitReached,
    RequestError,
    StoreFull,
    StoreUnavailable,
    TooManyJobs,
)
from shared.job_options import JobOptions
from shared.jobs import Job, pairs
from shared.schemas import Segment
from shared.scripts import has_script_flags, source
from shared.settings import Settings
from shared.storage import Manifest

log = logging.getLogger(__name__)

VERBS = ("submit", "before", "known", "read", "list", "cancel", "erase")
JOBS_AT_ONCE = 200
TRANSCRIPTS_AT_ONCE = 16  # each may have some MB
RETRY_AFTER_SECONDS = 5
FULL_RETRY_AFTER_SECONDS = 30
LOOK_AT_JOBS = 100  # in one page, whatever becomes of them
ADMIT_BELOW = 0.75  # of maxmemory


@dataclass(frozen=True)
class Submission:
    """What submit found."""

    outcome: str  # new | joined | hit | replayed | full (it would wait too long)
    other: str  # id of a job that holds the same input, or that the request made before; '' if none
    weight_before: int = 0  # full: how much would go before it


@dataclass(frozen=True)
class Limits:
    """What one caller may use. None: no limit."""

    requests: int | None = None  # in each period, and at once
    period_ms: int = 60_000
    jobs: int | None = None  # unfinished
    audio_minutes: int | None = None  # in each day (UTC)

    @property
    def audio_ms(self) -> int | None:
        return None if self.audio_minutes is None else self.audio_minutes * 60_000


@dataclass(frozen=True)
class JobList:
    """Which jobs: those of an owner ('' without API keys), or those of a batch."""

    owner: str = ""
    batch_id: str = ""


NO_LIMITS = Limits()
LIMITS: dict[str, type[LimitReached]] = {"jobs": TooManyJobs, "audio": AudioMinutesUsed}
REFUSALS: dict[str, type[RequestError]] = {
    "conflict": IdempotencyConflict,
    "unknown": DigestUnknown,
    "gone": JobNotFound,
    "not_failed": JobNotFailed,
}


def connect(settings: Settings) -> Redis:
    """Connects when it is first used; `aclose` closes all of it."""
    pool = BlockingConnectionPool.from_url(
        settings.redis_url.get_secret_value(),
        max_connections=32,
        timeout=3,
        socket_timeout=2,
        socket_connect_timeout=1,
        health_check_interval=15,
        decode_responses=True,
        retry=Retry(NoBackoff(), 1, supported_errors=(NoConnection,)),
        client_name="whisper-api",
    )
    return Redis.from_pool(pool)


class Scripts:
    """Verbs of shared/lua, loaded when one of them is first used."""

    def __init__(self, redis: Redis, verbs: tuple[str, ...]):
        self._redis = redis
        self._verbs = verbs
        self._loaded: dict[str, AsyncScript] = {}

    async def run(self, verb: str, *args: str | int) -> Any:
        """Raises StoreUnavailable."""
        try:
            if not self._loaded:
                version = (await self._redis.info("server"))["redis_version"]
                has_flags = has_script_flags(version)
                self._loaded = {
                    name: self._redis.register_script(source(name, has_flags=has_flags))
                    for name in self._verbs
                }
            return await self._loaded[verb](args=args)
        except (TimeoutError, RedisError) as exc:
            raise unavailable(exc) from exc


class JobStore:
    """Redis as the API sees it. One instance for each API process.

    What is asked of one job is asked by somebody: `seen_by` is the name of who sees its own jobs
    and no others (to it they do not exist), or '' for who sees all.
    """

    def __init__(self, settings: Settings, celery: Celery):
        self._settings = settings
        self._celery = celery
        self._redis = connect(settings)
        self._run = Scripts(self._redis, VERBS).run
        self._jobs = Together(self._read_jobs, JOBS_AT_ONCE)
        self._transcripts = Together(self._read_transcripts, TRANSCRIPTS_AT_ONCE)
        self._slots = 0  # of the live workers, when there were any last

    async def close(self) -> None:
        await self._redis.aclose()

    async def admit(self) -> None:
        """Raises StoreUnavailable unless Redis answers, StoreFull unless it has room to spare: what
        runs must still be able to finish."""
        try:
            memory = await self._redis.info("memory")
        except RedisError as exc:
            raise unavailable(exc) from exc
        if memory["used_memory"] > memory["maxmemory"] * ADMIT_BELOW > 0:
            raise StoreFull(retry_after_seconds=FULL_RETRY_AFTER_SECONDS)

    async def submit(
        self,
        manifest: Manifest,
        most_weight: int | None = None,
        limits: Limits = NO_LIMITS,
        least: str = "",
    ) -> Submission:
        """Queues, joins or answers from the cache, in one step; then rings for a worker. Not if it
        would have to be queued, and more than `most_weight` would go before it: then it is `full`.
        `least`: hit, for an answer from the cache or none; joined, for that or joining; failed, to
        retry this very job.

        Raises TooManyJobs, AudioMinutesUsed by its owner's `limits`, IdempotencyConflict; where
        there is not the `least`, DigestUnknown, and of a retry JobNotFound, JobNotFailed."""
        outcome, other, *number = await self._run(
            "submit",
            *manifest.identity,
            self._settings.retention_ms,
            self._settings.grace_ms,
            given(most_weight),
            given(limits.jobs),
            given(limits.audio_ms),
            least,
            *chain(*manifest.job_options.items()),
        )
        if outcome == "full":
            return Submission(outcome, other, number[0])
        if outcome in LIMITS:
            raise LIMITS[outcome](retry_after_seconds=ceil(number[0] / 1000))
        if outcome in REFUSALS:
            raise REFUSALS[outcome]
        if outcome == "exists":
            outcome = "new"  # a reaper found the manifest first, and submitted it for us
        if outcome == "new":
            await self._ring(short(manifest.fingerprint))
        return Submission(outcome, other)

    async def weight_before(self, owner: str) -> int:
        """How much goes before what this caller would send now, at most."""
        return int(await self._run("before", owner))

    async def known(self, fingerprint: str) -> tuple[str, list[str]]:
        """new | joined | hit, as a submission would be, and for joined some of the jobs that it
        would join."""
        outcome, holders = await self._run("known", fingerprint, self._settings.model_key)
        return outcome, holders

    async def read(self, job_id: str, seen_by: str) -> Job:
        """Raises JobNotFound, JobExpired."""
        job = await self._jobs.get((job_id, seen_by))
        if job is None:
            raise JobNotFound
        if job.is_expired:
            raise JobExpired
        return job

    async def page(
        self, listed: JobList, seen_by: str, cursor: str, status: str, most: int
    ) -> tuple[list[Job], str]:
        """At most `most` jobs, the newest first, and the cursor of the next page, '' if there is
        none. Expired jobs are not listed. `status`: '' for any."""
        cursor, found = await self._run(
            "list", listed.owner, listed.batch_id, seen_by, cursor, status, most, LOOK_AT_JOBS
        )
        return [Job.of(job_id, reply) for job_id, reply in found], cursor

    async def batch(self, batch_id: str) -> list[str]:
        """The ids of its jobs, in the order of the files, whoever may see them."""
        try:
            return [str(each) for each in await self._redis.zrange(keys.batch(batch_id), 0, -1)]
        except RedisError as exc:
            raise unavailable(exc) from exc

    async def transcript(self, job: Job) -> bytes:
        """The rendered JSON of a completed job. Raises JobExpired when it is gone."""
        text = await self._transcripts.get(job.fingerprint)
        if text is None:
            raise JobExpired
        return text.encode()

    async def part(self, job: Job, number: int) -> str | None:
        """What became of a part of an unfinished job, as JSON. None: it is not done."""
        return await self._transcripts.get(keys.part(job.fingerprint, number))

    async def partial(self, job: Job) -> list[Segment]:
        """What is there of an unfinished job: the segments of its parts, up to the first gap."""
        fingerprint = job.fingerprint
        try:
            number = int(await self._redis.hget(keys.transcription(fingerprint), "parts") or 0)
            units = [keys.part(fingerprint, n) for n in range(number)]
            results = await self._redis.mget([keys.transcript(u) for u in units]) if units else []
        except RedisError as exc:
            raise unavailable(exc) from exc
        segments = [
            segment
            for result in takewhile(bool, results)
            for segment in json.loads(result or "")["segments"]
        ]
        return [Segment.model_validate({**s, "id": n}) for n, s in enumerate(segments)]

    async def cancel(self, job_id: str, seen_by: str) -> tuple[str, JobOptions, str]:
        """unknown | finished | cancelled, what the job was told, and the fingerprint of its
        transcription if that ended, too, else ''."""
        outcome, record, given_up = await self._run(
            "cancel",
            job_id,
            seen_by,
            self._settings.retention_ms,
            self._settings.grace_ms,
            str(uuid4()),
        )
        return outcome, JobOptions.of(pairs(record)), given_up

    async def erase(self, job_id: str, seen_by: str) -> tuple[str, JobOptions]:
        """unknown | unfinished | erased, and what the job was told."""
        outcome, record = await self._run("erase", job_id, seen_by)
        return outcome, JobOptions.of(pairs(record))

    async def snapshot(self) -> Snapshot:
        """Some cheap reads in two round trips, whatever the length of the queue."""
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.time()
                pipe.zcard(keys.QUEUE)
                pipe.zrange(keys.WAITING, 0, 0, withscores=True)
                pipe.zcard(keys.LEASES)
                pipe.hgetall(keys.COUNTERS)
                pipe.zrange(keys.WORKERS, 0, -1)
                pipe.info("memory")
                pipe.zcard(keys.PARTS)
                pipe.hmget(keys.PACE, "weight", "ms")
                pipe.zcard(keys.UNDELIVERED)
                pipe.zrange(keys.UNDELIVERED, 0, 0, withscores=True)
                pipe.zrange(keys.RECEIVERS, 0, 0, withscores=True)
                reply = await pipe.execute()
            now, queued, oldest, processing, counters, ids, memory, parts, pace, *webhooks = reply
            reports = await self._redis.mget([keys.worker(i) for i in ids]) if ids else []
        except RedisError as exc:
            raise unavailable(exc) from exc
        now_seconds = now[0] + now[1] / 1e6
        (weight, ms), (undelivered, longest, first_due) = pace, webhooks
        workers = tuple(json.loads(report) for report in reports if report)
        self._slots = sum(int(worker["slots"]) for worker in workers) or self._slots
        return Snapshot(
            queued=queued,
            parts=parts,
            oldest_queued_seconds=_age(oldest, now_seconds, 1e6),
            processing=processing,
            backlog=max(0, int(counters.pop("backlog", 0))),
            slot_seconds=int(ms) / 1000 / int(weight) if weight else None,
            slots=self._slots,
            counters={name: int(value) for name, value in counters.items()},
            workers=workers,
            memory_used_bytes=memory["used_memory"],
            memory_max_bytes=memory["maxmemory"],
            webhooks=undelivered,
            oldest_webhook_seconds=_age(longest, now_seconds, 1e3),
            overdue_webhook_seconds=_age(first_due, now_seconds, 1e3),
        )

    async def _read_jobs(self, asked: list[tuple[str, str]]) -> list[Job | None]:
        replies = await self._run("read", *chain.from_iterable(asked))
        return [
            Job.of(job_id, reply) if reply else None
            for (job_id, _), reply in zip(asked, replies, strict=True)
        ]

    async def _read_transcripts(self, units: list[str]) -> list[str | None]:
        try:
            return cast("list[str | None]", await self._redis.mget(map(keys.transcript, units)))
        except RedisError as exc:
            raise unavailable(exc) from exc

    async def _ring(self, hint: str) -> None:
        """A bell that fails is no error: a worker's reaper rings the missing ones."""
        try:
            await self._redis.lpush(QUEUE_NAME, doorbell(self._celery, hint))
        except RedisError:
            log.warning("the bell was not rung", extra={"action": "ring_failed"})


def _age(first: list[tuple[str, float]], now_seconds: float, units: float) -> float:
    """Seconds since the score of the first member of a zset; 0 where it is in the future, or where
    there is none. `units`: of the score, in a second."""
    return max(0.0, now_seconds - first[0][1] / units) if first else 0.0


def given(limit: int | None) -> str | int:
    """As the scripts have it."""
    return "" if limit is None else limit


def unavailable(exc: Exception) -> StoreUnavailable:
    """Redis is away, loading, full or read-only: all of these pass. A bug in a script does not."""
    if isinstance(exc, ResponseError) and "Error running script" in str(exc):
        raise exc
    log.warning("redis: %s", exc, extra={"action": "store_unavailable"})
    return StoreUnavailable(retry_after_seconds=RETRY_AFTER_SECONDS)
