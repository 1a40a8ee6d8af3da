"""A worker takes what the machine has, unless it is told otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.settings import Settings
from worker import tuning
from worker.tuning import Capacity, capacity


def settings(**values: int) -> Settings:
    return Settings(_env_file=None, **values)


@pytest.mark.parametrize(
    ("cores", "slots", "threads"),
    [(1, 1, 1), (2, 2, 1), (4, 4, 1), (8, 8, 1), (9, 4, 2), (16, 8, 2), (31, 7, 4), (64, 8, 8)],
)
def test_a_cpu_gets_a_thread_for_each_slot_then_more_threads(cores, slots, threads):
    assert capacity(settings(), "cpu", cores) == Capacity(slots, slots, threads)


@pytest.mark.parametrize("cores", range(1, 257))
def test_no_core_has_two_threads_and_few_are_idle(cores):
    seen = capacity(settings(), "cpu", cores)
    assert seen.slots <= tuning.MOST_SLOTS
    assert cores - seen.threads < seen.replicas * seen.threads <= cores


def test_set_slots_share_the_cores():
    assert capacity(settings(worker_slots=1), "cpu", 4) == Capacity(1, 1, 4)
    assert capacity(settings(worker_slots=3), "cpu", 8) == Capacity(3, 3, 2)


def test_more_slots_than_cores_share_the_replicas():
    assert capacity(settings(worker_slots=6), "cpu", 2) == Capacity(6, 2, 1)


def test_set_threads_decide_how_many_slots_there_are():
    assert capacity(settings(cpu_threads=2), "cpu", 8) == Capacity(4, 4, 2)
    assert capacity(settings(cpu_threads=16), "cpu", 8) == Capacity(1, 1, 16)


def test_what_is_set_is_taken():
    assert capacity(settings(worker_slots=4, cpu_threads=3), "cpu", 64) == Capacity(4, 4, 3)
    assert capacity(settings(worker_slots=4, cpu_threads=3), "cuda", 64) == Capacity(4, 2, 3)


def test_a_gpu_gets_slots_for_two_batches():
    assert capacity(settings(), "cuda", 16) == Capacity(32, 2, 8)
    assert capacity(settings(), "cuda", 1).threads == 1


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V2 = {"proc/self/cgroup": "0::/a.slice/b.scope"}
V1 = {"proc/self/cgroup": "3:memory:/\n2:cpu,cpuacct:/docker/1\n1:cpuset:/docker/1\n0::/"}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        (V2, None),
        (V2 | {"sys/fs/cgroup/a.slice/b.scope/cpu.max": "max 100000"}, None),
        (V2 | {"sys/fs/cgroup/a.slice/b.scope/cpu.max": "150000 100000"}, 1.5),
        (V2 | {"sys/fs/cgroup/a.slice/cpu.max": "50000 100000"}, 0.5),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        (
            V2
            | {
                "sys/fs/cgroup/a.slice/cpu.max": "200000 100000",
                "sys/fs/cgroup/a.slice/b.scope/cpu.max": "400000 100000",
            },
            2,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            2.5,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_a_container_s_cpu_limit_is_read(tmp_path, files, cores):
    assert tuning.cpu_limit(put(tmp_path, files)) == cores


@pytest.mark.parametrize(("limit", "cores"), [(None, 4), (0.5, 1), (1.5, 2), (9, 4)])
def test_a_limit_below_the_cores_counts_rounded_up(monkeypatch, limit, cores):
    monkeypatch.setattr(tuning.os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr(tuning, "cpu_limit", lambda: limit)
    assert tuning.usable_cores() == cores
