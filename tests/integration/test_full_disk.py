"""A Redis that dies after its disk was full starts again, with all that it was told."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest
import redis

from local.redis_server import RedisServer, bundled_binary, why_silent
from shared.broker import celery_app
from shared.settings import Settings
from tests.chaos.world import children
from tests.conftest import wait_until
from worker.full_disk import FileRenewal
from worker.store import WorkerStore

pytestmark = pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="limiting another process's files is Linux's"
)


class Disk:
    """A Redis of local mode, and how large its files may grow: a disk that can be full."""

    def __init__(self, server: RedisServer):
        self._argv = server.spec().argv
        self.folder = server.folder / "appendonlydir"
        self.url = server.url
        self.client = redis.Redis.from_url(server.url, retry=None, decode_responses=True)
        self.told: dict[str, str] = {}
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.popen.poll() is None:
            self.kill()
        self.client.close()

    def start(self, mended: bool = True) -> None:
        # SIGXFSZ stays ignored, so a write beyond the limit is cut short, as on a full disk.
        self.popen = subprocess.Popen(
            self._argv if mended else self._argv[3:],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            restore_signals=False,
        )

    def serves(self) -> bool:
        wait_until(lambda: self.popen.poll() is not None or why_silent(self.url) is None)
        return self.popen.poll() is None

    def kill(self) -> str:
        """Returns what it had printed."""
        with self.popen as ended:
            ended.kill()
            assert ended.stdout
            return ended.stdout.read().decode()

    def tell(self, size: int = 500) -> None:
        for _ in range(20):
            name = f"key {len(self.told)}"
            self.client.set(name, value := os.urandom(size).hex())
            self.told[name] = value

    def about(self, name: str) -> object:
        return self.client.info("persistence")[name]

    def rewrite(self) -> None:
        self.client.bgrewriteaof()
        wait_until(lambda: not self.about("aof_rewrite_in_progress"), what="the rewrite ends")

    def fail_to_rewrite(self) -> None:
        self.client.config_set("rdb-key-save-delay", 100_000)
        if not self.about("aof_rewrite_in_progress"):
            self.client.bgrewriteaof()
        os.kill(wait_until(lambda: next(children(self.popen.pid), None)), signal.SIGKILL)
        wait_until(lambda: self.about("aof_last_bgrewrite_status") == "err")
        self.client.config_set("rdb-key-save-delay", 0)

    def two_files(self) -> list[Path]:
        """Both with something in them."""
        self.fail_to_rewrite()
        self.tell()
        wait_until(lambda: self.about("aof_buffer_length") == 0)
        return sorted(self.folder.glob("*.incr.aof"))

    def fill(self) -> None:
        """Full in the middle of the next write, and then not full any more."""
        wait_until(lambda: self.about("aof_buffer_length") == 0)
        size = self.newest().stat().st_size
        limits = resource.prlimit(self.popen.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.popen.pid, resource.RLIMIT_FSIZE, (size + 700, limits[1]))
        with suppress(redis.ResponseError):  # it refuses writes as soon as it knows
            while True:
                self.tell()
        resource.prlimit(self.popen.pid, resource.RLIMIT_FSIZE, limits)
        wait_until(lambda: self.about("aof_last_write_status") == "ok", what="it writes again")

    def newest(self) -> Path:
        return max(self.folder.glob("*.incr.aof"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(params=["valkey", "redis"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    binary = bundled_binary()
    if request.param == "redis":
        if not (found := shutil.which("redis-server")):
            pytest.skip("no redis-server on this machine; the same tests ran on Valkey")
        binary = Path(found)
    assert binary is not None
    with Disk(RedisServer(tmp_path, binary)) as disk:
        assert disk.serves()
        disk.tell()
        disk.rewrite()
        disk.tell()
        yield disk


@pytest.fixture
def workers(disk: Disk, tmp_path: Path) -> Iterator[tuple[WorkerStore, WorkerStore]]:
    settings = Settings(_env_file=None, redis_url=disk.url, data_dir=tmp_path, model_size="demo")
    stores = [WorkerStore(settings, celery_app(disk.url), f"worker-{n}") for n in range(2)]
    yield stores[0], stores[1]
    for store in stores:
        store.close()


def test_nothing_is_lost_when_it_dies_after_its_disk_was_full(disk):
    disk.fill()
    disk.tell()
    assert bytes(100) in disk.newest().read_bytes(), "this Redis leaves no hole: is mend.sh needed?"
    wait_until(lambda: disk.about("aof_buffer_length") == 0)
    disk.kill()
    disk.start()
    assert disk.serves(), disk.kill()
    assert {name: disk.client.get(name) for name in disk.client.scan_iter()} == disk.told


def test_it_starts_when_its_disk_was_full_again_and_again(disk):
    """What was written last before a disk is full once more may be torn: not more than that."""
    for _ in range(3):
        disk.fill()
        disk.tell()
    wait_until(lambda: disk.about("aof_buffer_length") == 0)
    disk.kill()
    disk.start()
    assert disk.serves(), disk.kill()
    there = {name: disk.client.get(name) for name in disk.client.scan_iter()}
    assert there.items() <= disk.told.items()
    assert len(disk.told) - len(there) <= 4


def test_mending_that_was_interrupted_goes_on(disk):
    """Killed while it put a file together from its good beginning and the rest."""
    wait_until(lambda: disk.about("aof_buffer_length") == 0)
    good = disk.newest().stat().st_size
    disk.tell()
    wait_until(lambda: disk.about("aof_buffer_length") == 0)
    disk.kill()
    file = disk.newest()
    whole = file.read_bytes()
    file.with_name(f"{file.name}.rest.{good}").write_bytes(whole[good:])
    file.write_bytes(whole[: good + 1000])
    disk.start()
    assert disk.serves(), disk.kill()
    assert file.read_bytes() == whole
    assert {name: disk.client.get(name) for name in disk.told} == disk.told


@pytest.mark.parametrize("missing", [1, 2, 3, 600])
def test_a_torn_end_is_cut(disk, missing):
    """Of the last file by Redis itself; of an earlier one it would not start."""
    files = disk.two_files()
    disk.kill()
    for file in files:
        os.truncate(file, file.stat().st_size - missing)
    disk.start()
    assert disk.serves(), disk.kill()
    there = {name: disk.client.get(name) for name in disk.client.scan_iter()}
    assert there.items() <= disk.told.items()
    assert len(disk.told) - len(there) == 2


def test_a_file_that_is_broken_otherwise_is_left_as_it_is(disk):
    """Nobody but its owner can say what may be thrown away."""
    file, _ = disk.two_files()
    disk.kill()
    broken = file.read_bytes().replace(b"$3\r\nSET", b"$x\r\nSET", 1)
    file.write_bytes(broken)
    disk.start()
    assert not disk.serves()
    printed = disk.kill()
    assert "not by a full disk" in printed
    assert "DEPLOYMENT.md" in printed
    assert file.read_bytes() == broken


def test_a_worker_has_a_new_file_written(disk, workers):
    """So the hole is gone within seconds, whoever dies then."""
    first, second = (FileRenewal(store) for store in workers)
    first.look()
    began = disk.about("aof_rewrites")
    disk.fill()
    disk.tell()
    for _ in range(2):
        for each in (first, second):
            each.look()
            wait_until(lambda: not disk.about("aof_rewrite_in_progress"), what="the rewrite ends")
    assert disk.about("aof_rewrites") == began + 1, "one of them asks, once"
    disk.kill()
    disk.start(mended=False)
    assert disk.serves(), disk.kill()
    assert {name: disk.client.get(name) for name in disk.told} == disk.told


def test_a_rewrite_that_fails_is_asked_for_again(disk, workers, monkeypatch):
    monkeypatch.setattr("worker.full_disk.PAUSE_SECONDS", 1)
    first, second = (FileRenewal(store) for store in workers)
    disk.fill()
    began = disk.about("aof_rewrites")
    disk.client.config_set("rdb-key-save-delay", 100_000)
    first.look()
    disk.fail_to_rewrite()

    def asks_again() -> bool:
        second.look()
        return disk.about("aof_rewrites") == began + 2

    wait_until(asks_again, 5, "another rewrite")


@pytest.mark.parametrize("forbidden", ["info", "bgrewriteaof"])
def test_a_redis_that_lets_nobody_ask_does_not_stop_the_reaper(disk, tmp_path, forbidden):
    """As managed ones do: such a worker goes on with all that it has to do besides."""
    disk.client.acl_setuser(
        "app", enabled=True, passwords="+word", commands=["+@all", f"-{forbidden}"], keys="*"
    )
    url = f"redis://app:word@{disk.url.rpartition('@')[2]}"
    settings = Settings(_env_file=None, redis_url=url, data_dir=tmp_path, model_size="demo")
    store = WorkerStore(settings, celery_app(url), "worker-1")
    disk.fill()
    FileRenewal(store).look()
    store.close()
