"""One run for each data folder: a second one would start another Redis on the same files."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from local.processes import CannotRun

LEFTOVER_SECONDS = 10  # what the processes of a killed launcher may take to end


class DataLock:
    """Holds <data dir>/lock. Our Redis inherits `fd`, so the lock lasts as long as either lives."""

    def __init__(self, data_dir: Path):
        self.path = data_dir / "lock"
        self.fd = -1

    def __enter__(self) -> Self:
        """Raises CannotRun when another run holds the folder, or the folder can't be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise CannotRun(f"DATA_DIR can't be used: {self.path}: {exc.strerror}.") from exc
        deadline = time.monotonic() + LEFTOVER_SECONDS
        while not self._taken():
            holder = self._holder()
            if _is_alive(holder):
                self._refuse(
                    f"It already runs on {self.path.parent} (process {holder}). Stop that one, or "
                    "give this one its own state and port: DATA_DIR=.data-2 PORT=8001 make run"
                )
            if time.monotonic() > deadline:
                self._refuse(
                    f"An earlier run on {self.path.parent} was killed and its Redis still runs. "
                    f"Stop it with: kill $(cat {self.path.parent / 'redis' / 'redis.pid'})"
                )
            time.sleep(0.05)
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.fd)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _holder(self) -> int:
        text = os.pread(self.fd, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else 0

    def _refuse(self, message: str) -> None:
        os.close(self.fd)
        raise CannotRun(message)


def _is_alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's process
    return True
