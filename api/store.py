"""The API's side of the job store: submit, read, cancel, erase. Every call is one round trip.

Each verb is a Lua script of shared/lua; this file only loads them, calls them and translates what
Redis says into our errors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
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
from shared.errors import JobExpired, JobNotFound, StoreFull, StoreUnavailable
from shared.jobs import Job
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
class Snapshot:
    """The queue and the workers at one moment."""

    queued: int
    oldest_queued_seconds: float
    processing: int
    counters: Mapping[str, int]
    workers: tuple[Mapping[str, Any], ...]  # what each live worker says of itself
    memory_used_bytes: int = 0
    memory_max_bytes: int = 0  # 0: the server has no limit

    @property
    def warm_workers(self) -> int:
        return sum(1 for worker in self.workers if worker.get("warm"))


class JobStore:
    """Redis as the API sees it. One instance for each API process."""

    def __init__(self, settings: Settings, celery: Celery):
        self._settings = settings
        self._celery = celery
        self._pool = BlockingConnectionPool.from_url(
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
        self._redis = Redis(connection_pool=self._pool)
        self._scripts: dict[str, AsyncScript] = {}

    async def close(self) -> None:
        await self._redis.aclose()
        await self._pool.disconnect()

    async def admit(self) -> None:
        """Raises StoreUnavailable unless Redis answers, StoreFull unless it has room to spare: what
        runs must still be able to finish."""
        try:
            memory = await self._redis.info("memory")
        except RedisError as exc:
            raise _unavailable(exc) from exc
        if memory["used_memory"] > memory["maxmemory"] * ADMIT_BELOW > 0:
            raise StoreFull(retry_after_seconds=FULL_RETRY_AFTER_SECONDS)

    async def submit(self, manifest: Manifest) -> Submission:
        """Queues, joins or answers from the cache, in one step; then rings for a worker."""
        outcome, leader = await self._run(
            "submit",
            *manifest.identity,
            self._settings.retention_ms,
            self._settings.grace_ms,
        )
        if outcome == "exists":
            outcome = "new"  # a reaper found the manifest first, and submitted it for us
        if outcome == "new":
            await self._ring(short(manifest.fingerprint))
        return Submission(outcome, leader)

    async def read(self, job_id: str) -> Job:
        """Raises JobNotFound, JobExpired."""
        reply = await self._run("read", job_id)
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
            raise _unavailable(exc) from exc
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
            raise _unavailable(exc) from exc
        segments = [
            segment
            for result in takewhile(bool, results)
            for segment in json.loads(result or "")["segments"]
        ]
        return [Segment.model_validate({**s, "id": n}) for n, s in enumerate(segments)]

    async def cancel(self, job_id: str) -> str:
        """unknown | finished | cancelled"""
        reply = await self._run(
            "cancel", job_id, self._settings.retention_ms, self._settings.grace_ms
        )
        return str(reply)

    async def erase(self, job_id: str) -> str:
        """unknown | unfinished | erased"""
        return str(await self._run("erase", job_id))

    async def snapshot(self) -> Snapshot:
        """Seven cheap reads in one round trip, whatever the length of the queue."""
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.time()
                pipe.zcard(keys.QUEUE)
                pipe.zrange(keys.QUEUE, 0, 0, withscores=True)
                pipe.zcard(keys.LEASES)
                pipe.hgetall(keys.COUNTERS)
                pipe.zrange(keys.WORKERS, 0, -1)
                pipe.info("memory")
                now, queued, oldest, processing, counters, ids, memory = await pipe.execute()
            reports = await self._redis.mget([keys.worker(i) for i in ids]) if ids else []
        except RedisError as exc:
            raise _unavailable(exc) from exc
        age = now[0] + now[1] / 1e6 - oldest[0][1] / 1e6 if oldest else 0.0
        return Snapshot(
            queued=queued,
            oldest_queued_seconds=max(0.0, age),
            processing=processing,
            counters={name: int(value) for name, value in counters.items()},
            workers=tuple(json.loads(report) for report in reports if report),
            memory_used_bytes=memory["used_memory"],
            memory_max_bytes=memory["maxmemory"],
        )

    async def _ring(self, hint: str) -> None:
        """A bell that fails is no error: a worker's reaper rings the missing ones."""
        try:
            await self._redis.lpush(QUEUE_NAME, doorbell(self._celery, hint))
        except RedisError:
            log.warning("the bell was not rung", extra={"action": "ring_failed"})

    async def _run(self, verb: str, *args: str | int) -> Any:
        try:
            if not self._scripts:
                version = (await self._redis.info("server"))["redis_version"]
                has_flags = has_script_flags(version)
                self._scripts = {
                    name: self._redis.register_script(source(name, has_flags=has_flags))
                    for name in VERBS
                }
            return await self._scripts[verb](args=args)
        except (TimeoutError, RedisError) as exc:
            raise _unavailable(exc) from exc


def _unavailable(exc: Exception) -> StoreUnavailable:
    """Redis is away, loading, full or read-only: all of these pass. A bug in a script does not."""
    if isinstance(exc, ResponseError) and "Error running script" in str(exc):
        raise exc
    log.warning("redis: %s", exc, extra={"action": "store_unavailable"})
    return StoreUnavailable(retry_after_seconds=RETRY_AFTER_SECONDS)
