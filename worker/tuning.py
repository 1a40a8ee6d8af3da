"""How much of this machine a worker takes: slots, replicas of the model and their threads.

Set ones win; what is left at 0 follows from the device and the cores.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.settings import Settings
from worker.engine.engine import MAX_BATCH

# One thread for each replica gives the most audio per core (CTranslate2's documentation,
# "Performance tips": for throughput raise inter_threads and leave intra_threads low). Replicas
# share the weights, but each has buffers of its own, and a slot may hold a whole recording. So on
# large machines they get more threads instead of more of them, which ends a single job sooner.
MOST_SLOTS = 8
# One prepares its next batch while the GPU works on the other's.
CUDA_REPLICAS = 2


@dataclass(frozen=True)
class Capacity:
    slots: int  # transcriptions at a time
    replicas: int  # calls of the model at a time
    threads: int  # of the CPU, for each replica


def capacity(settings: Settings, device: str, cores: int) -> Capacity:
    """`device`: cpu | cuda, never auto."""
    if device == "cuda":
        return Capacity(
            slots=settings.worker_slots or CUDA_REPLICAS * MAX_BATCH["cuda"],
            replicas=CUDA_REPLICAS,
            threads=settings.cpu_threads or max(1, cores // CUDA_REPLICAS),
        )
    if settings.cpu_threads:
        threads = settings.cpu_threads
    elif settings.worker_slots:
        threads = max(1, cores // settings.worker_slots)
    else:
        threads = math.ceil(cores / MOST_SLOTS)
    at_once = max(1, cores // threads)
    slots = settings.worker_slots or at_once
    return Capacity(slots, replicas=min(slots, at_once), threads=threads)


def usable_cores() -> int:
    """The cores this process may run on, or the CPU limit of its container if that is less."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    limit = cpu_limit()
    # Rounded up: a thread that has to wait now and then is better than time that nobody takes.
    return cores if limit is None else max(1, min(cores, math.ceil(limit)))


def cpu_limit(root: Path = Path("/")) -> float | None:
    """The least CPU quota, in cores, of this process's control group and of those above it; None
    where there is none. Versions 1 and 2 (the kernel's cgroup-v2 and sched-bwc documents)."""
    return min(_limits(root), default=None)


def _limits(root: Path) -> Iterator[float]:
    for folder in _control_groups(root):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            continue  # not a group with quotas
        if quota not in {"max", "-1"}:
            yield int(quota) / int(period)


def _control_groups(root: Path) -> Iterator[Path]:
    """A container may see its own group at the root, whatever path /proc tells: a folder that is
    not there is left to the ones above it."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for top in {mount, mount / "unified"} if not controllers else {mount / controllers}:
            folder = top / path.lstrip("/")
            yield from (folder, *folder.parents[: len(folder.relative_to(top).parts)])
