"""What a run of chaos has shown: from the ledger, and from what the workers logged."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.chaos.ledger import Job

OTHER_CLOCK_SECONDS = 1800  # what a clock is stepped by is more
COLUMNS = (
    "fault",
    "times",
    "sent",
    "accepted",
    "right",
    "wrong",
    "failed",
    "lost",
    "run again",
    "written twice",
    "refused late",
    "not told",
    "told again",
    "recovery s",
)


@dataclass
class Round:
    """One fault, from its beginning to the next one. Times: time.monotonic(), and time.time()."""

    name: str
    began: float
    began_at: float
    since: float = 0.0  # from here on the service had what it needs to recover
    touched: list[Job] = field(default_factory=list)  # open at `since`, or accepted in the fault

    @property
    def recovery(self) -> float:
        return max((self._waited(job) for job in self.touched if job.ended_at), default=0.0)

    def _waited(self, job: Job) -> float:
        """After the fault; for a job that came later, after it had come."""
        return job.ended_at - max(self.since, job.accepted_at)


@dataclass
class Row:
    name: str
    times: int = 0
    sent: int = 0
    accepted: int = 0
    right: int = 0
    wrong: int = 0
    failed: int = 0
    lost: int = 0
    run_again: int = 0
    written_twice: int = 0
    refused_late: int = 0
    not_told: int = 0
    told_again: int = 0
    recovery: float = 0.0

    def add(self, other: Row) -> None:
        for name in vars(self).keys() - {"name", "recovery"}:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.recovery = max(self.recovery, other.recovery)

    def cells(self) -> list[str]:
        numbers = list(vars(self).values())[1:-1]
        return [self.name, *map(str, numbers), f"{max(0.0, self.recovery):.1f}"]


@dataclass
class Work:
    """What the logs say of one transcription. Times: time.time()."""

    claims: dict[Any, list[float]] = field(default_factory=lambda: defaultdict(list))  # by part
    is_split: bool = False
    completions: list[float] = field(default_factory=list)


def lines_of(log: Path) -> Iterator[dict[str, Any]]:
    """JSON lines; what else a process prints is left out. `at`: when; a process under another clock
    has the time of the line before."""
    latest = 0.0
    with log.open(errors="replace") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and "action" in found:
                at = datetime.fromisoformat(found["time"]).timestamp()
                if not latest or abs(at - latest) < OTHER_CLOCK_SECONDS:
                    latest = max(latest, at)
                found["at"] = latest
                yield found


def works_of(log: Path) -> tuple[list[Work], list[float]]:
    """Every transcription, and when a late write was refused."""
    works: dict[str, Work] = defaultdict(Work)
    refusals = []
    for line in lines_of(log):
        work = works[line.get("fingerprint", "")[:12]]
        match line["action"]:
            case "claimed":
                work.claims[line.get("part")].append(line["at"])
            case "split":
                work.is_split = True
            case "completed":
                work.completions.append(line["at"])
            case "commit_refused" | "claim_lost":
                refusals.append(line["at"])
    return list(works.values()), refusals


def rows(rounds: Sequence[Round], jobs: Iterable[Job], log: Path, rollbacks: Any) -> list[Row]:
    """One for each round. `rollbacks`: between these times Redis lost what it had accepted; what
    was written then may be written once more."""
    found = [Row(each.name, times=1, recovery=each.recovery) for each in rounds]

    def of(moments: Sequence[float], at: float) -> Row:
        return found[max(0, sum(moment <= at for moment in moments) - 1)]

    begins, begins_at = [r.began for r in rounds], [r.began_at for r in rounds]
    for job in jobs:
        row = of(begins, job.sent_at)
        row.sent += 1
        row.told_again += max(0, len(job.told) - 1)
        if job.accepted_at:
            row.accepted += 1
            row.lost += not job.ended_at
            if job.ended_at:
                setattr(row, job.end, getattr(row, job.end) + 1)
                row.not_told += job.end == "right" and not job.is_told
    works, refusals = works_of(log)
    for at in refusals:
        of(begins_at, at).refused_late += 1
    for work in works:
        for part, claims in work.claims.items():
            first = 2 if part is None and work.is_split else 1  # it is claimed again to be joined
            for at in claims[first:]:
                of(begins_at, at).run_again += 1
        for before, again in zip(work.completions, work.completions[1:], strict=False):
            if not any(begin <= before <= end for begin, end in rollbacks):
                of(begins_at, again).written_twice += 1
    return found


def by_kind(found: Iterable[Row]) -> list[Row]:
    """Summed, in the order of the first of each kind, with the total as the last."""
    kinds: dict[str, Row] = {}
    total = Row("total")
    for row in found:
        kinds.setdefault(row.name, Row(row.name)).add(row)
        total.add(row)
    return [*kinds.values(), total]


def table(found: Iterable[Row]) -> str:
    lines = [list(COLUMNS), *(row.cells() for row in found)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
