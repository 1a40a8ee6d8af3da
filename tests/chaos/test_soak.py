"""`make soak`: a steady load for MINUTES. Memory and descriptors of every process stay what they
are, and Redis keeps nothing of a job but its record."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from shared import keys
from tests.chaos.ledger import Crowd, Ledger, Source, User, clips, recording
from tests.chaos.test_chaos import wait_for
from tests.chaos.world import World, open_files, resident_bytes

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]

SAMPLE_SECONDS = 5
RUSH_JOBS = 12
WARM_SHARE = 1 / 3  # of the time: caches and allocators fill
MIB = 1 << 20
# What may be added within the time that counts; a leak of some bytes for each job is far more.
MOST_BYTES, MOST_SHARE = 6 * MIB, 0.04
MOST_FILES = 3
KEYS_OF_A_JOB = 3  # of its record, of its transcription's, and who holds that, for a day
BYTES_OF_A_JOB = 4096
RESULT_TTL_SECONDS = 60


def test_memory_and_descriptors_are_flat_under_steady_load(tmp_path: Path) -> None:
    """No process grows, and Redis grows by the records of the jobs alone."""
    minutes = float(os.environ.get("MINUTES") or 20)
    print(f"\nmake soak MINUTES={minutes:g}")
    ledger = Ledger()
    settings = {"result_ttl_seconds": str(RESULT_TTL_SECONDS)}
    with World(tmp_path, settings, uploads_bytes=256 << 20) as world:
        for what, why in world.missing.items():
            print(f"without {what}: {why}")
        long = recording()
        ledger.learn(User(ledger, world.url), [*clips(), long])
        rush(world, ledger, long)
        users = [clips()] * 3 + [[long]]
        samples = Samples()
        with Crowd(ledger, world.url, 0, users=users, pause=1.0) as crowd:
            ends = time.monotonic() + minutes * 60
            while time.monotonic() < ends:
                samples.take(world, ledger)
                time.sleep(SAMPLE_SECONDS)
            crowd.stop()
            wait_for(ledger.open_jobs())
        died = world.dead()
        names = world.all_pids()
    problems = [f"{name} died" for name in died]
    problems += [f"{job.source.name}: {job.end or 'lost'}" for job in ledger.jobs if not_right(job)]
    accepted = sum(1 for job in ledger.jobs if job.accepted_at)
    print(f"{accepted} jobs in {minutes:g} min, {len(problems)} that did not end right")
    problems += samples.report(names)
    print("\n".join(f"BROKEN: {problem}" for problem in problems) or "Everything is flat.")
    assert not problems


def rush(world: World, ledger: Ledger, source: Source) -> None:
    """Every slot of every worker is busy with the largest, in both modes, some times over: the
    allocators keep what they once had, and need no more for what comes later."""
    user = User(ledger, world.url)
    for vad_filter in (False, True, False, True):
        jobs = [ledger.begin(source, vad_filter=vad_filter) for _ in range(RUSH_JOBS)]
        for job in jobs:
            assert user.send(job), job.refused
        for job in jobs:
            user.follow(job)
    user.close()


def not_right(job) -> bool:
    return bool(job.accepted_at) and job.end != "right"


class Samples:
    """Series of numbers over time, by name."""

    def __init__(self) -> None:
        self.series: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def take(self, world: World, ledger: Ledger) -> None:
        now = time.monotonic()
        for name, pid in world.all_pids().items():
            self.add(now, f"{name} bytes", resident_bytes(pid))
            self.add(now, f"{name} files", open_files(pid))
        jobs = sum(1 for job in ledger.jobs if job.accepted_at)
        kinds = Counter(
            name.removeprefix(keys.PREFIX).partition(":")[0]
            for name in world.raw.scan_iter(count=5000)
        )
        records = sum(kinds.pop(kind, 0) for kind in ("job", "transcription", "holders"))
        self.add(now, "Redis keys of jobs", records)
        # Of the last RESULT_TTL_SECONDS: as many as were completed in them.
        self.add(now, "Redis transcripts", kinds.pop("transcript", 0))
        self.add(now, "Redis other keys", kinds.total())
        self.add(now, "Redis memory", world.raw.info("memory")["used_memory"])
        self.add(now, "jobs", jobs)

    def add(self, now: float, name: str, value: float) -> None:
        self.series[name].append((now, value))

    def growth(self, name: str) -> tuple[float, float, float]:
        """(the first value that counts, what a straight line adds until the end, hours)."""
        points = np.array(self.series[name])
        begin = points[0, 0] + (points[-1, 0] - points[0, 0]) * WARM_SHARE
        points = points[points[:, 0] >= begin]
        hours = float(points[-1, 0] - points[0, 0]) / 3600
        slope, start = np.polyfit((points[:, 0] - points[0, 0]) / 3600, points[:, 1], 1)
        return float(start), float(slope * hours), hours

    def report(self, names) -> list[str]:
        """Prints the table; returns what is not flat."""
        problems = []
        print(f"\n{'process':<22}{'MiB':>8}{'MiB/h':>9}{'files':>8}{'files/h':>9}")
        for name in names:
            start, grown, hours = self.growth(f"{name} bytes")
            files, more, _ = self.growth(f"{name} files")
            print(
                f"{name:<22}{start / MIB:>8.1f}{grown / MIB / hours:>9.2f}"
                f"{files:>8.1f}{more / hours:>9.2f}"
            )
            # Redis holds the records, which are counted below.
            if name != "Redis" and grown > max(MOST_BYTES, start * MOST_SHARE):
                problems.append(f"{name} grew by {grown / MIB:.1f} MiB")
            if more > MOST_FILES:
                problems.append(f"{name} opened {more:.1f} files more than it closed")
        return problems + self._redis()

    def _redis(self) -> list[str]:
        jobs = max(1.0, self.growth("jobs")[1])
        records = self.growth("Redis keys of jobs")[1] / jobs
        start, others, hours = self.growth("Redis other keys")
        transcripts, _, _ = self.growth("Redis transcripts")
        memory = self.growth("Redis memory")[1] / jobs
        print(
            f"Redis: {records:.2f} keys and {memory:.0f} bytes for each job, for a day; "
            f"{transcripts:.0f} transcripts; {start:.0f} other keys, {others / hours:+.1f} an hour"
        )
        found = []
        if records > KEYS_OF_A_JOB * 1.05:
            found.append(f"Redis keeps {records:.2f} keys of each job")
        if memory > BYTES_OF_A_JOB:
            found.append(f"Redis keeps {memory:.0f} bytes of each job")
        if others > 20:
            found.append(f"Redis has {others:.0f} keys more that are no records of jobs")
        return found
