"""Two arms, measured in turns on the same cores: A B A B... One ratio from the medians."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Spent:
    """What one turn took, in the row's unit, and its seconds of CPU where they are of interest."""

    value: float
    cpu: float | None = None


@dataclass(frozen=True)
class Arm:
    """`turn` does the same each time."""

    name: str
    turn: Callable[[], Spent]


@dataclass(frozen=True)
class Measured:
    first: str
    second: str
    first_spent: Spent  # medians
    second_spent: Spent
    pairs: int
    unit: str = "s"  # s | MB | KB

    @property
    def ratio(self) -> float:
        """First over second."""
        return self.first_spent.value / self.second_spent.value

    @property
    def cpu_ratio(self) -> float | None:
        if self.first_spent.cpu is None or self.second_spent.cpu is None:
            return None
        return self.first_spent.cpu / max(self.second_spent.cpu, 1e-9)


def compare(
    first: Arm, second: Arm, pairs: int, *, unit: str = "s", warm_up: bool = True
) -> Measured:
    """Each arm once to warm up, then in turns."""
    if warm_up:
        for arm in (first, second):
            arm.turn()
    turns = [(first.turn(), second.turn()) for _ in range(pairs)]
    return Measured(
        first.name,
        second.name,
        median(turn[0] for turn in turns),
        median(turn[1] for turn in turns),
        pairs,
        unit,
    )


def timed(name: str, work: Callable[[], object], pids: Callable[[], Iterable[int]]) -> Arm:
    """An arm that takes time. `pids`: the processes whose CPU time counts, with those that descend
    from them."""

    def turn() -> Spent:
        cpu, began = cpu_seconds(pids()), time.perf_counter()
        work()
        return Spent(time.perf_counter() - began, cpu_seconds(pids()) - cpu)

    return Arm(name, turn)


def median(turns: Iterable[Spent]) -> Spent:
    spent = list(turns)
    cpu = [turn.cpu for turn in spent if turn.cpu is not None]
    return Spent(
        statistics.median(turn.value for turn in spent),
        statistics.median(cpu) if cpu else None,
    )


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of processes, of their living descendants and of those that were waited
    for (proc(5)). A worker's decode server lives as long as the worker, so it is no ended child."""
    total = 0
    for pid in family(pids):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue  # ended since: it is in its parent's figure, or soon
        total += sum(map(int, stat.rpartition(")")[2].split()[11:15]))
    return total / TICKS


def megabytes(pids: Iterable[int]) -> float:
    """The memory of processes and their descendants; what several share is divided among them
    (PSS)."""
    kilobytes = 0
    for pid in family(pids):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kilobytes / 1024


def family(pids: Iterable[int]) -> list[int]:
    """These processes and all that descend from them."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found = list(pids)
    for pid in found:  # it grows
        found += children.get(pid, [])
    return found
