"""The whole service to be broken: nginx where there is one, two API replicas of two processes each,
three workers, one of them behind a network that can be cut, and a Redis; each can be hurt alone."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self
from unittest.mock import patch
from urllib.parse import urlsplit

import pytest
import redis

from local.processes import Spec
from local.redis_server import bundled_binary
from local.service import Service, answers
from shared import keys
from tests.chaos.network import FAR, Network
from tests.conftest import alive, wait_until
from tests.deploy.nginx import Nginx, Resolver
from tests.deploy.test_drain import ADDRESSES, replicas
from tests.e2e.conftest import worker_metric

LEASE_SECONDS = 6
SETTINGS = {
    "lease_seconds": str(LEASE_SECONDS),
    "drain_seconds": "2",
    "workers": "2",
    "worker_slots": "2",
    "part_seconds": "30",
    "upload_patience_seconds": "5",
    "min_free_disk_mb": "4",
}
WORKERS = ("worker", "worker-2", "worker-3")
REPLICAS = ("API", "API-2")
UPLOADS_BYTES, REDIS_BYTES = 64 << 20, 256 << 20
REMOTE_WORKER = WORKERS[-1]
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # of version 1, of version 2
MEMORY_LIMITS = "memory.limit_in_bytes", "memory.max"
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
CLONE_NEWNS = 0x00020000


class World:
    """A context manager. Processes are named as in Service. `violations`: promises that were broken
    beside those that the ledger holds."""

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, str] = {},
        uploads_bytes: int = UPLOADS_BYTES,
    ):
        self.folder = folder
        self.violations: list[str] = []
        self.missing: dict[str, str] = {}  # what this machine can't do, and why
        self._settings = {**SETTINGS, **settings}
        self._disks = {"uploads": uploads_bytes, "redis": REDIS_BYTES}
        self._open = ExitStack()
        self._turn = 0
        self._specs: dict[str, Spec] = {}  # of those under another clock, as they were

        if os.geteuid() or not any((p / "cgroup.procs").exists() for p in MEMORY_GROUPS):
            self.missing["memory groups"] = "limiting memory needs root and cgroups"
        if FAKETIME is None:
            self.missing["faketime"] = "no libfaketime on this machine (Debian: faketime)"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._mount()
            # Under libfaketime jemalloc waits for itself, and Debian's Redis is built with it.
            stack.enter_context(patch("local.service.find_binary", bundled_binary))
            self.service: Service = stack.enter_context(
                replicas(self.folder / "service", **self._settings)
            )
            self.raw = redis.Redis.from_url(
                self.service.redis_url, decode_responses=True, socket_timeout=5
            )
            stack.callback(self.raw.close)
            self.service.add_worker()
            self._add_remote_worker(stack)
            assert tuple(n for n in self.service.supervisor.processes if n in WORKERS) == WORKERS
            self._front(stack)
            self.service.wait_ready(90)
            wait_until(lambda: answers(self.url() + "/health/ready"), 15, "nginx knows them")
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        if self.violations or any(error):  # its disk goes with this process
            shutil.copytree(self.data / "redis", self.folder / "redis", symlinks=True)
        for name in self.service.supervisor.processes:
            self.service.kill(name, signal.SIGCONT)
        self._open.close()

    @property
    def data(self) -> Path:
        return self.folder / "service" / "data"

    @property
    def log(self) -> Path:
        return self.folder / "service" / "service.log"

    def url(self) -> str:
        """nginx, or the replicas in turn."""
        self._turn += 1
        return self._nginx_url or self.replica_url(self._turn % len(REPLICAS))

    def replica_url(self, number: int) -> str:
        return f"http://{ADDRESSES[number]}:{self.service.settings.port}"

    def _add_remote_worker(self, stack: ExitStack) -> None:
        """In a network of its own, where that can be had."""
        port = urlsplit(self.service.redis_url).port
        assert port
        try:
            self.network = stack.enter_context(Network(port))
        except OSError as why:
            self.missing["network"] = f"a link to cut needs root, ip, nsenter and nft ({why})"
            self.service.add_worker()
            return
        spec = self.service.supervisor.processes["worker"].spec
        url = self.service.redis_url.replace(f"@127.0.0.1:{port}/", f"@{FAR}:{port}/")
        self.service.supervisor.add(
            replace(
                spec,
                name=REMOTE_WORKER,
                argv=(*self.network.near.enter, *spec.argv),
                env={**spec.env, "REDIS_URL": url},
                ready=lambda: self.network.near.call(spec.ready),
            )
        )

    def _front(self, stack: ExitStack) -> None:
        self._nginx_url = ""
        try:
            names = stack.enter_context(Resolver(*ADDRESSES))
            nginx = Nginx(
                self.folder / "nginx",
                NGINX_API=f"api:{self.service.settings.port}",
                NGINX_RESOLVER=names.resolver,
                NGINX_LIMITS="off",
            )
            stack.enter_context(nginx)
        except pytest.skip.Exception as why:
            self.missing["nginx"] = str(why)
        else:
            self._nginx_url = nginx.url

    def _mount(self) -> None:
        """Small file systems, seen by this process and its children alone. They go with the last
        of them."""
        for name, size in self._disks.items():
            (self.data / name).mkdir(parents=True, mode=0o700)
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs"]
            if (
                os.geteuid()
                or shutil.which("mount") is None
                or ctypes.CDLL(None).unshare(CLONE_NEWNS)
                or subprocess.run(["mount", "--make-rprivate", "/"], check=False).returncode
                or subprocess.run([*mount, self.data / name], check=False).returncode
            ):
                self.missing["disk"] = "making small file systems needs root"
                return

    # --- processes

    def revive(self, *names: str, deadline_seconds: float = 60) -> None:
        """Starts them again, and waits until they serve."""
        for name in names:
            self.service.supervisor.processes[name].end_group()
            self.service.supervisor.processes[name].start()
        self.service.wait_ready(deadline_seconds, *names)

    def kill(self, name: str) -> float:
        """kill -9; returns when."""
        self.service.kill(name)
        at = time.monotonic()
        self.service.popen(name).wait(10)
        return at

    def dead(self) -> list[str]:
        """Processes that ended and should not have; they are started again."""
        processes = self.service.supervisor.processes
        found = [name for name, process in processes.items() if not process.is_alive]
        for name in found:
            self.violations.append(f"{name} {processes[name].ending()} by itself")
        self.revive(*found)
        return found

    def worker_at(self, unit: str) -> str | None:
        """The worker that runs this unit of work now, by name."""
        status, worker = self.raw.hmget(keys.transcription(unit), ["status", "worker"])
        if status != "processing" or not worker:
            return None
        return self.name_of(int(worker.rsplit("-", 2)[1]))

    def name_of(self, pid: int) -> str | None:
        return next((name for name in WORKERS if self.service.popen(name).pid == pid), None)

    def units_of(self, worker: str) -> list[str]:
        leased = self.raw.zrange(keys.LEASES, 0, -1)
        return [unit for unit in leased if self.worker_at(unit) == worker]

    def claims_of_the_remote_worker(self) -> float:
        """How many claims of its own it knows of, since it was started; parts are not counted."""
        name = "whisper_job_queue_wait_seconds_count"
        return self.network.near.call(worker_metric, self.service, "worker", name)

    def busy_worker(self, chance: random.Random, deadline_seconds: float = 20) -> str:
        """One that transcribes at this moment; waits for one."""

        def ask() -> list[str]:
            leased = self.raw.zrange(keys.LEASES, 0, -1)
            return sorted({name for unit in leased if (name := self.worker_at(unit))})

        return chance.choice(wait_until(ask, deadline_seconds, "a worker is busy"))

    def api_pids(self, name: str) -> list[int]:
        """The processes of a replica that serve."""
        parent = self.service.popen(name).pid
        return [pid for pid in children(parent) if b"spawn_main" in command(pid)]

    def all_pids(self) -> dict[str, int]:
        """Every process that lasts, by a name of its own."""
        found = {}
        for name in self.service.supervisor.processes:
            found[name] = self.service.popen(name).pid
            for number, pid in enumerate(children(found[name])):
                found[f"{name}'s child {number}"] = pid
        return {name: pid for name, pid in found.items() if alive(pid)}

    # --- disks

    def fill(self, name: str) -> Path:
        """Leaves no room on the file system of `uploads` or `redis`. Unlink it to free that."""
        ballast = self.data / name / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        return ballast

    # --- memory

    @contextmanager
    def little_memory(self, name: str, size: int) -> Iterator[None]:
        """What it allocates from here on may be so many bytes; then the kernel kills it."""
        for parent, limit in zip(MEMORY_GROUPS, MEMORY_LIMITS, strict=True):
            group = parent / f"whisper-chaos-{os.getpid()}"
            with suppress(OSError):
                group.mkdir()
                (group / limit).write_text(str(size))
                (group / "cgroup.procs").write_text(str(self.service.popen(name).pid))
                break
        try:
            yield
        finally:
            for pid in (group / "cgroup.procs").read_text().split():
                (parent / "cgroup.procs").write_text(pid)
            group.rmdir()

    # --- clocks

    def clock(self, name: str) -> Path:
        """Restarts a process under a clock of its own; write `+2h` into the file to set it. Without
        the allocator that it preloads: under libfaketime jemalloc waits for itself."""
        file = self.folder / f"clock of {name}"
        file.write_text("+0")
        process = self.service.supervisor.processes[name]
        self._specs[name] = process.spec
        process.spec = replace(
            process.spec,
            env={
                **process.spec.env,
                "LD_PRELOAD": str(FAKETIME),
                "FAKETIME_TIMESTAMP_FILE": str(file),
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "NO_FAKE_STAT": "1",
            },
        )
        self.service.restart(name)
        return file

    def true_clock(self, name: str) -> None:
        self.service.supervisor.processes[name].spec = self._specs.pop(name)
        self.service.restart(name)


def limit_files(pid: int, most: int) -> int:
    """Returns what the limit was."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, before[1]))
    return before[0]


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def children(pid: int) -> Iterator[int]:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (thread / "children").read_text().split())


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
