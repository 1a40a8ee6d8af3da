"""One child process: how it starts, how it stops, and that it never outlives the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TETHER = Path(__file__).with_name("tether.py")


class CannotRun(Exception):
    """Ends local mode; the message is the one sentence that the user reads."""

    def __init__(self, message: str, exit_status: int = 1):
        self.message = message
        self.exit_status = exit_status
        super().__init__(message)


@dataclass(frozen=True)
class Spec:
    """What a supervisor needs to know of a process."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]  # the whole environment, not additions
    ready: Callable[[], bool]  # does it serve? Answers within seconds, never raises
    stop_seconds: float = 10  # from SIGTERM to SIGKILL
    death_signal: signal.Signals = signal.SIGTERM  # what it gets when the launcher is killed
    log: Path | None = None  # where its output goes; None: to the launcher's
    cwd: Path | None = None
    pass_fds: tuple[int, ...] = ()


class Process:
    """A spec that can run again and again, each time in a session of its own, so that a terminal's
    Ctrl-C reaches the launcher alone and the whole group can be killed.

    Start it from a thread that lives as long as the process shall: Linux sends the death signal
    when the thread that started it ends, not the program.
    """

    def __init__(self, spec: Spec):
        self.spec = spec
        self.popen: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0  # time.monotonic()

    @property
    def is_alive(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def start(self) -> None:
        spec = self.spec
        output = None if spec.log is None else os.open(spec.log, _APPEND, 0o600)
        try:
            self.popen = subprocess.Popen(
                [*_tethered(spec.death_signal), *spec.argv],
                env=dict(spec.env),
                cwd=spec.cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=spec.pass_fds,
                start_new_session=True,
            )
        finally:
            if output is not None:
                os.close(output)
        self.started_at = time.monotonic()

    def send(self, sign: signal.Signals) -> None:
        """To the process alone, as the kernel or an operator would; nothing when it is gone."""
        if self.popen is not None:
            self.popen.send_signal(sign)

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> bool:
        """SIGTERM, then SIGKILL after the deadline or as soon as `hurry` says so.

        Whatever the process leaves of its group is killed. True when it ended by itself in time.
        """
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)  # a paused process would never see the other
        deadline = time.monotonic() + self.spec.stop_seconds
        while self.is_alive and time.monotonic() < deadline and not hurry():
            time.sleep(0.02)
        ended = not self.is_alive
        self.end_group()
        return ended

    def end_group(self) -> None:
        """Kills what is left of the process and of its children."""
        if self.popen is not None:
            with suppress(ProcessLookupError, PermissionError):  # macOS: no permission for zombies
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()

    def ending(self) -> str:
        """How it ended, in words: `ended with status 1`, `was killed by SIGSEGV`."""
        code = self.popen.poll() if self.popen else None
        if code is None:
            return "runs"
        return f"ended with status {code}" if code >= 0 else f"was killed by {_name_of(-code)}"

    def last_words(self, lines: int = 15) -> str:
        """The end of its log file; empty when its output went to the terminal."""
        if self.spec.log is None or not self.spec.log.exists():
            return ""
        text = self.spec.log.read_text("utf-8", errors="replace")
        return "\n".join(text.strip().splitlines()[-lines:])


_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def _tethered(sign: signal.Signals) -> list[str]:
    if sys.platform != "linux":
        return []
    return [sys.executable, "-IS", str(TETHER), str(int(sign)), str(os.getpid())]


def _name_of(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
