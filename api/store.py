"""The API's side of the job store: submit, read, cancel, erase. Every call is one round trip.

Each verb is a Lua script of shared/lua; this file only loads them, calls them and translates what
Redis says into our errors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, takewhile
from math import ceil
from typing import Any

from celery import Celery
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import RedisError, ResponseError

from shared import keys
from shared.broker import QUEUE_NAME, doorbell, short
from shared.errors import (
    AudioMinutesUsed,
    JobExpired,
    JobNotFound,
    LimitReached,
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

VERBS = ("submit", "read", "cancel", "erase")
RETRY_AFTER_SECONDS = 5
FULL_RETRY_AFTER_SECONDS = 30
ADMIT_BELOW = 0.75  # of maxmemory


@dataclass(frozen=True)
class Submission:
    """What submit found."""

    outcome: str  # new | joined | hit
    leader: str  # id of a job that holds the same input; '' if none


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


NO_LIMITS = Limits()
LIMITS: dict[str, type[LimitReached]] = {"jobs": TooManyJobs, "audio": AudioMinutesUsed}


@dataclass(frozen=True)
class Snapshot:
    """The queue and the workers at one moment."""

    queued: int  # transcriptions
    oldest_queued_seconds: float
    processing: int
    counters: Mapping[str, int]
    workers: tuple[Mapping[str, Any], ...]  # what each live worker says of itself
    memory_used_bytes: int = 0
    memory_max_bytes: int = 0  # 0: the server has no limit
    parts: int = 0  # of long recordings, that wait
    backlog: int = 0  # weight of all that waits
    slot_seconds: float | None = None  # for a unit of weight; None: nothing was completed yet
    slots: int = 0  # of the live workers; where none lives, of those that were seen last

    @property
    def backlog_seconds(self) -> float | None:
        """How long one slot would need for all that waits. None: nobody knows yet."""
        return None if self.slot_seconds is None else self.backlog * self.slot_seconds

    @property
    def wait_seconds(self) -> float | None:
        """How long a job that comes now would wait. None: nobody knows yet."""
        if self.backlog_seconds is None or not self.slots:
            return None
        return self.backlog_seconds / self.slots

    def weight_of_wait(self, seconds: float) -> int | None:
        """How much may wait when nobody shall wait longer than that. None: nobody knows yet."""
        if not self.slot_seconds or not self.slots:
            return None
        return int(seconds * self.slots / self.slot_seconds)

    @property
    def warm_workers(self) -> int:
        return sum(1 for worker in self.workers if worker.get("warm"))


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
    ) -> Submission | None:
        """Queues, joins or answers from the cache, in one step; then rings for a worker. None: it
        would have to be queued, and more than `most_weight` waits already. Raises TooManyJobs,
        AudioMinutesUsed by its owner's `limits`."""
        outcome, leader, *ms = await self._run(
            "submit",
            *manifest.identity,
            self._settings.retention_ms,
            self._settings.grace_ms,
            given(most_weight),
            given(limits.jobs),
            given(limits.audio_ms),
            *chain(*manifest.job_options.items()),
        )
        if outcome == "full":
            return None
        if outcome in LIMITS:
            raise LIMITS[outcome](retry_after_seconds=ceil(ms[0] / 1000))
        if outcome == "exists":
            outcome = "new"  # a reaper found the manifest first, and submitted it for us
        if outcome == "new":
            await self._ring(short(manifest.fingerprint))
        return Submission(outcome, leader)

    async def read(self, job_id: str, seen_by: str) -> Job:
        """Raises JobNotFound, JobExpired."""
        reply = await self._run("read", job_id, seen_by)
        if not reply:
            raise JobNotFound
        job = Job.of(job_id, reply)
        if job.is_expired:
            raise JobExpired
        return job

    async def transcript(self, job: Job) -> bytes:
        """The rendered JSON of a completed job. Raises JobExpired when it is gone."""
        try:
            text = await self._redis.get(keys.transcript(job.fingerprint))
        except RedisError as exc:
            raise unavailable(exc) from exc
        if text is None:
            raise JobExpired
        return str(text).encode()

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

    async def cancel(self, job_id: str, seen_by: str) -> tuple[str, JobOptions]:
        """unknown | finished | cancelled, and what the job was told."""
        outcome, record = await self._run(
            "cancel", job_id, seen_by, self._settings.retention_ms, self._settings.grace_ms
        )
        return outcome, JobOptions.of(pairs(record))

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
                reply = await pipe.execute()
            now, queued, oldest, processing, counters, ids, memory, parts, (weight, ms) = reply
            reports = await self._redis.mget([keys.worker(i) for i in ids]) if ids else []
        except RedisError as exc:
            raise unavailable(exc) from exc
        age = now[0] + now[1] / 1e6 - oldest[0][1] / 1e6 if oldest else 0.0
        workers = tuple(json.loads(report) for report in reports if report)
        self._slots = sum(int(worker["slots"]) for worker in workers) or self._slots
        return Snapshot(
            queued=queued,
            parts=parts,
            oldest_queued_seconds=max(0.0, age),
            processing=processing,
            backlog=max(0, int(counters.pop("backlog", 0))),
            slot_seconds=int(ms) / 1000 / int(weight) if weight else None,
            slots=self._slots,
            counters={name: int(value) for name, value in counters.items()},
            workers=workers,
            memory_used_bytes=memory["used_memory"],
            memory_max_bytes=memory["maxmemory"],
        )

    async def _ring(self, hint: str) -> None:
        """A bell that fails is no error: a worker's reaper rings the missing ones."""
        try:
            await self._redis.lpush(QUEUE_NAME, doorbell(self._celery, hint))
        except RedisError:
            log.warning("the bell was not rung", extra={"action": "ring_failed"})


def given(limit: int | None) -> str | int:
    """As the scripts have it."""
    return "" if limit is None else limit


def unavailable(exc: Exception) -> StoreUnavailable:
    """Redis is away, loading, full or read-only: all of these pass. A bug in a script does not."""
    if isinstance(exc, ResponseError) and "Error running script" in str(exc):
        raise exc
    log.warning("redis: %s", exc, extra={"action": "store_unavailable"})
    return StoreUnavailable(retry_after_seconds=RETRY_AFTER_SECONDS)
