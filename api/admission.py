"""Whether an upload may come in: is there room on the disk, in Redis, and in the queue?

The queue is measured in time: how long would a job that comes now wait? That is the weight of what
goes before it (bytes of the uploads: their durations are not known before a worker has decoded
them), times the time that a slot took for the weight that was completed lately, over the slots of
the workers that live. While nothing was ever completed, or no worker was ever seen, it is unknown,
and the queue refuses nobody. What goes before it depends on who sends it: whoever has nothing
waiting is next, however much others have. It is predicted too short where others come later whose
turn is earlier, where each slot is busy, and where the machine becomes slower. So that what was let
in begins within MAX_QUEUE_SECONDS, half of it is the most that may be predicted.

Asked twice. Before the body is read, so that it need not be sent; except a small one, which may be
of a file that is done or under way, and such an upload is welcome however long the queue is. And in
shared/lua/submit.lua, in one step with the queueing, so that the limit holds however many uploads
arrive at a time.
"""

from __future__ import annotations

import asyncio
import random
import time
from math import inf

from api.snapshot import Snapshot
from api.store import NO_LIMITS, JobStore, Limits, Submission
from shared.errors import QueueFull, StorageFull, WaitTooLong
from shared.settings import Settings
from shared.storage import Manifest, Storage

READ_ANYWAY_BYTES = 1024 * 1024
MOST_PREDICTED = 0.5  # of MAX_QUEUE_SECONDS
SEEN_SECONDS = 1.0  # how old a look at the store may be
LEAST_RETRY_SECONDS = 2.0
MOST_RETRY_SECONDS = 3600.0


class Admission:
    """One for each API process."""

    def __init__(self, settings: Settings, store: JobStore, storage: Storage):
        self._settings = settings
        self._store = store
        self._storage = storage
        self._limit_seconds = MOST_PREDICTED * settings.max_queue_seconds or inf
        self._look: asyncio.Task[Snapshot] | None = None
        self._looked_at = 0.0

    async def before_body(self, announced_bytes: int | None, owner: str) -> None:
        """Raises StorageFull, StoreUnavailable, StoreFull, QueueFull. None: the length was not
        announced. `owner`: as JobStore's, the caller's name."""
        if self._storage.free_bytes() - (announced_bytes or 0) < self._settings.min_free_disk_bytes:
            raise StorageFull
        await self._store.admit()
        if announced_bytes is not None and announced_bytes <= READ_ANYWAY_BYTES:
            return
        wait_seconds = await self._wait_seconds(owner, self._limit_seconds)
        if wait_seconds > self._limit_seconds:
            raise self._refusal(wait_seconds)

    def reserved(self) -> None:
        """To be called when the upload has its place on the disk: what is free now is free for
        all. Raises StorageFull."""
        if self._storage.free_bytes() < self._settings.min_free_disk_bytes:
            raise StorageFull

    async def submit(
        self,
        manifest: Manifest,
        limits: Limits = NO_LIMITS,
        least: str = "",
        patience_seconds: float = inf,
    ) -> Submission:
        """As JobStore.submit, but raises QueueFull where the job would wait too long, and
        WaitTooLong where its caller would not wait so long: `patience_seconds`."""
        look = await self.look()
        limit = min(self._limit_seconds, patience_seconds)
        most_weight = look.weight_of_wait(limit) if limit < inf else None
        submission = await self._store.submit(manifest, most_weight, limits, least)
        if submission.outcome == "full":
            wait_seconds = look.wait_behind(submission.weight_before) or 0
            raise self._refusal(wait_seconds, patience_seconds)
        return submission

    async def lateness(self, owner: str, patience_seconds: float) -> WaitTooLong | None:
        """What to tell a caller who would give up before its turn; None: it comes in time."""
        wait_seconds = await self._wait_seconds(owner, patience_seconds)
        if wait_seconds <= patience_seconds:
            return None
        return too_long(wait_seconds, patience_seconds)

    async def look(self) -> Snapshot:
        """The queue and the workers, about now: all requests of a second share one look, but for
        one that can't tell yet how long anything takes."""
        now = time.monotonic()
        is_old = now - self._looked_at > SEEN_SECONDS
        if self._look is None or (self._look.done() and (is_old or not _tells(self._look))):
            self._look, self._looked_at = asyncio.create_task(self._store.snapshot()), now
        return await asyncio.shield(self._look)  # who leaves early takes it from nobody

    async def _wait_seconds(self, owner: str, limit_seconds: float) -> float:
        """How long a job that this caller sends now would wait, at most. Who is asked is the queue
        as a whole, which is cheap, and the store only where that waits longer than the limit."""
        look = await self.look()
        if (look.wait_seconds or 0) <= limit_seconds:
            return look.wait_seconds or 0
        return look.wait_behind(await self._store.weight_before(owner)) or 0

    def _refusal(
        self, wait_seconds: float, patience_seconds: float = inf
    ) -> QueueFull | WaitTooLong:
        if patience_seconds < self._limit_seconds:
            return too_long(wait_seconds, patience_seconds)
        return QueueFull(retry_after_seconds=retry_after(wait_seconds, self._limit_seconds))


def too_long(wait_seconds: float, patience_seconds: float) -> WaitTooLong:
    return WaitTooLong(retry_after_seconds=retry_after(wait_seconds, patience_seconds))


def _tells(look: asyncio.Task[Snapshot]) -> bool:
    return look.exception() is None and look.result().wait_seconds is not None


def retry_after(wait_seconds: float, limit_seconds: float) -> int:
    """When the queue will be short enough again, if nobody else comes. Everybody gets another time,
    or all would come back together."""
    seconds = max(LEAST_RETRY_SECONDS, wait_seconds - limit_seconds, min(limit_seconds / 20, 60))
    return max(1, round(min(seconds, MOST_RETRY_SECONDS) * random.uniform(0.8, 1.2)))
