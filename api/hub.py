"""Who waits for which job in this process, and how each learns that it changed.

A notice (api/notices.py) is a bell: it says that there is something new, and those whom it concerns
read the job anew, in one round trip with all others (api/together.py). A wait begins with such a
read, once the notices of its transcription are heard, so nothing is lost between reading and
listening; and when they were not heard for a while, all read again. Who waits while Redis is away
goes on waiting.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from prometheus_client import Gauge
from redis.asyncio.connection import AbstractConnection

from api.notices import Notices
from api.protocol import Connection
from api.store import JobStore
from shared.errors import StoreUnavailable, TooManyWaiters
from shared.jobs import Job

MOVED_SECONDS = 0.5  # those who wait hear of progress this often at most
SLICE = 100  # are woken at a time; then others have their turn
AGAIN_SECONDS = 1.0  # after a read that failed


class Hub:
    """One for each API process. `connect`: see Notices. `waiters`: a gauge, by kind."""

    def __init__(
        self,
        store: JobStore,
        connect: Callable[[], AbstractConnection],
        limit: int,
        waiters: Gauge,
    ):
        self._store = store
        self._notices = Notices(connect, self._on_notice)
        self._limit = limit
        self._waiters = waiters
        self.count = 0  # of those who wait
        self._topics: dict[str, _Topic] = {}
        self._listening: asyncio.Task[None] | None = None
        self.is_draining = False

    def start(self) -> None:
        self._listening = asyncio.create_task(self._notices.run())

    async def close(self) -> None:
        if self._listening is not None:
            self._notices.stop()
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)

    def drain(self) -> None:
        """Ends all waits, those that come later, too."""
        self.is_draining = True
        for topic in self._topics.values():
            rouse(list(topic.watches))

    def watch(
        self, job: Job, seen_by: str, kind: str, connection: Connection, *, only_end: bool = False
    ) -> Watch:
        """async with hub.watch(...) as changes: async for job in changes: ...

        Gives the job as it is now, and then whenever it has changed; of what changes meanwhile only
        the latest. It stops after the job's end, when the client of `connection` leaves, and when
        this process is told to stop. `only_end`: what happens before the end is of no interest.
        `kind`: of shared.metrics.WAITER_KINDS. Entering raises TooManyWaiters, the rest raises
        JobNotFound and JobExpired.
        """
        return Watch(self, job, seen_by, kind, connection, only_end)

    async def until(
        self,
        is_news: Callable[[Job], bool],
        job_id: str,
        seen_by: str,
        kind: str,
        connection: Connection,
        seconds: float,
        *,
        only_end: bool = False,
    ) -> Job:
        """The job, as soon as it is news; after so long, or when the wait is over for another
        reason, as it is then. Raises TooManyWaiters, JobNotFound, JobExpired, StoreUnavailable."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + seconds
        job = await self._store.read(job_id, seen_by)
        if is_news(job) or not seconds:
            return job
        async with self.watch(job, seen_by, kind, connection, only_end=only_end) as changes:
            del job  # it would be kept all the while
            while changed := await changes.next(deadline - clock()):
                if is_news(changed):
                    return changed
                del changed
        return await self._store.read(job_id, seen_by)

    async def until_ended(
        self, job_id: str, seen_by: str, kind: str, connection: Connection, seconds: float
    ) -> Job:
        """As `until`."""
        return await self.until(
            has_ended, job_id, seen_by, kind, connection, seconds, only_end=True
        )

    def enter(self, watch: Watch) -> None:
        """Raises TooManyWaiters."""
        if self.count >= self._limit:
            raise TooManyWaiters(retry_after_seconds=random.randint(2, 10))
        self.count += 1
        self._waiters.labels(watch.kind).inc()
        topic = self._topics.get(watch.fingerprint)
        if topic is None:
            topic = self._topics[watch.fingerprint] = _Topic()
            self._notices.listen(watch.fingerprint)
        topic.watches.add(watch)
        if self._notices.hears(watch.fingerprint):
            watch.rouse()

    def leave(self, watch: Watch) -> None:
        self.count -= 1
        self._waiters.labels(watch.kind).dec()
        topic = self._topics[watch.fingerprint]
        topic.watches.discard(watch)
        if not topic.watches:
            topic.close()
            del self._topics[watch.fingerprint]
            self._notices.ignore(watch.fingerprint)

    async def read(self, watch: Watch) -> Job:
        return await self._store.read(watch.job_id, watch.seen_by)

    def _on_notice(self, fingerprint: str, text: str) -> None:
        topic = self._topics.get(fingerprint)
        if topic is None:
            return
        what, _, job_id = text.partition(" ")
        if what == "moved" and not job_id:
            topic.move()
        else:
            rouse([watch for watch in topic.watches if job_id in ("", watch.job_id)])


class Watch:
    """One who waits for a job: see Hub.watch."""

    __slots__ = (
        "_has_ended",
        "_hub",
        "_is_due",
        "_last",
        "_sleep",
        "connection",
        "fingerprint",
        "has_left",
        "job_id",
        "kind",
        "only_end",
        "seen_by",
    )

    def __init__(
        self, hub: Hub, job: Job, seen_by: str, kind: str, connection: Connection, only_end: bool
    ):
        self._hub = hub
        self.job_id, self.fingerprint = job.job_id, job.fingerprint
        self.seen_by = seen_by
        self.kind = kind
        self.connection = connection
        self.only_end = only_end
        self.has_left = False  # its client
        self._has_ended = False  # its job, and that was told
        self._last = 0  # hash of the facts that were given; a job would be a KB
        self._is_due = False  # there may be something new
        self._sleep: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        self._hub.enter(self)
        self.connection.on_lost = self._leave
        if self.connection.is_lost:
            self._leave()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.connection.on_lost = None
        self._hub.leave(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Job:
        job = await self.next()
        if job is None:
            raise StopAsyncIteration
        return job

    @property
    def is_over(self) -> bool:
        return self.has_left or self._has_ended or self._hub.is_draining

    async def next(self, seconds: float | None = None) -> Job | None:
        """The job, as soon as it is not as it was the last time. None: nothing changed for so long,
        or the watch is over."""
        loop = asyncio.get_running_loop()
        deadline = math.inf if seconds is None else loop.time() + seconds
        while not self.is_over:
            if self._is_due:
                self._is_due = False
                try:
                    job = await self._hub.read(self)
                except StoreUnavailable:
                    loop.call_later(AGAIN_SECONDS, self.rouse)
                    continue
                if hash(job.facts) != self._last:
                    self._last = hash(job.facts)
                    self._has_ended = job.status.is_terminal
                    return job
            elif loop.time() >= deadline:
                return None
            else:
                await self._rest(deadline)
        return None

    def repeat(self) -> None:
        """Gives what it gave last once more, after a while: it could not be used."""
        self._last, self._has_ended = 0, False
        asyncio.get_running_loop().call_later(AGAIN_SECONDS, self.rouse)

    def rouse(self) -> None:
        """There may be something new."""
        self._is_due = True
        self._wake()

    async def _rest(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        self._sleep = loop.create_future()
        timer = loop.call_at(deadline, self._wake) if deadline < math.inf else None
        try:
            await self._sleep
        finally:
            self._sleep = None
            if timer is not None:
                timer.cancel()

    def _leave(self) -> None:
        self.has_left = True
        self._wake()

    def _wake(self) -> None:
        if self._sleep is not None and not self._sleep.done():
            self._sleep.set_result(None)


class _Topic:
    """A transcription that somebody waits for."""

    __slots__ = ("_later", "_next", "watches")

    def __init__(self) -> None:
        self.watches: set[Watch] = set()
        self._next = 0.0  # when its progress may be told again
        self._later: asyncio.TimerHandle | None = None

    def move(self) -> None:
        """Tells of progress, soon: a long recording makes it on many workers at a time."""
        loop = asyncio.get_running_loop()
        if self._later is None:
            self._later = loop.call_at(max(loop.time(), self._next), self._tell)

    def close(self) -> None:
        if self._later is not None:
            self._later.cancel()

    def _tell(self) -> None:
        self._later = None
        self._next = asyncio.get_running_loop().time() + MOVED_SECONDS
        rouse([watch for watch in self.watches if not watch.only_end])


def has_ended(job: Job) -> bool:
    return job.status.is_terminal


def rouse(watches: Sequence[Watch]) -> None:
    for watch in watches[:SLICE]:
        watch.rouse()
    if len(watches) > SLICE:
        asyncio.get_running_loop().call_soon(rouse, watches[SLICE:])
