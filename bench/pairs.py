"""Two arms, run in turns on the same cores: A B A B... One ratio from the medians."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Arm:
    """`work` does the same each time; `pids` are the processes whose CPU time counts."""

    name: str
    work: Callable[[], None]
    pids: Callable[[], Iterable[int]]


@dataclass(frozen=True)
class Spent:
    """Seconds of one turn."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Measured:
    first: str
    second: str
    first_seconds: Spent  # medians
    second_seconds: Spent
    pairs: int

    @property
    def wall_ratio(self) -> float:
        """First over second."""
        return self.first_seconds.wall / self.second_seconds.wall

    @property
    def cpu_ratio(self) -> float:
        return self.first_seconds.cpu / max(self.second_seconds.cpu, 1e-9)


def compare(first: Arm, second: Arm, pairs: int) -> Measured:
    """Each arm once to warm up, then in turns."""
    for arm in (first, second):
        arm.work()
    turns = [(spend(first), spend(second)) for _ in range(pairs)]
    return Measured(
        first.name,
        second.name,
        median(turn[0] for turn in turns),
        median(turn[1] for turn in turns),
        pairs,
    )


def spend(arm: Arm) -> Spent:
    pids = list(arm.pids())
    cpu, began = cpu_seconds(pids), time.perf_counter()
    arm.work()
    return Spent(time.perf_counter() - began, cpu_seconds(pids) - cpu)


def median(turns: Iterable[Spent]) -> Spent:
    spent = list(turns)
    return Spent(
        statistics.median(turn.wall for turn in spent),
        statistics.median(turn.cpu for turn in spent),
    )


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of processes and of the children that they have waited for (proc(5))."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15]))
    return total / TICKS
