"""What the queue and the workers are like at one moment, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
    webhooks: int = 0  # to be told
    oldest_webhook_seconds: float = 0.0  # since the end of its job
    overdue_webhook_seconds: float = 0.0  # how late the next attempt is

    @property
    def backlog_seconds(self) -> float | None:
        """How long one slot would need for all that waits. None: nobody knows yet."""
        return None if self.slot_seconds is None else self.backlog * self.slot_seconds

    @property
    def wait_seconds(self) -> float | None:
        """How long a job that comes now would wait, if all that waits went before it: the longest
        that anybody's would. None: nobody knows yet."""
        return self.wait_behind(self.backlog)

    def wait_behind(self, weight: int) -> float | None:
        """How long a job would wait before which so much goes. None: nobody knows yet."""
        if self.slot_seconds is None or not self.slots:
            return None
        return weight * self.slot_seconds / self.slots

    def weight_of_wait(self, seconds: float) -> int | None:
        """How much may go before who shall not wait longer than that. None: nobody knows yet."""
        if not self.slot_seconds or not self.slots:
            return None
        return int(seconds * self.slots / self.slot_seconds)

    @property
    def warm_workers(self) -> int:
        return sum(1 for worker in self.workers if worker.get("warm"))
