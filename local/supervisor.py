"""Keeps a list of processes running, in order, and stops them in the reverse order.

It knows nothing of what they are. Everything happens in the caller's thread: no thread of its own,
so a process can't lose the thread that started it (see Process).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from local.processes import CannotRun, Process, Spec
from local.tether import die_with_parent

EXIT_CONFIG = 78  # sysexits.h: a child says that it would fail the same way again
TICK_SECONDS = 0.1


@dataclass(frozen=True)
class RestartPolicy:
    """How often, and after which pauses, a process that ended is started again."""

    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 10  # pauses double up to this
    steady_seconds: float = 60  # a process that lived so long has earned a short pause
    most_deaths: int = 5  # within steady_seconds: then it is no use


class StopRequested(Exception):
    """The user asked to stop while we were waiting for something."""


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP as flags to look at, so that nothing is interrupted half-way."""

    def __init__(self) -> None:
        self.is_requested = False
        self.is_urgent = False  # a second Ctrl-C

    def install(self) -> None:
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, self._on_signal)
        if sys.platform == "linux" and "MAKELEVEL" in os.environ:
            # Our parent is make, and that is what the user kills.
            die_with_parent(signal.SIGTERM, os.getppid())

    def _on_signal(self, number: int, _frame: object) -> None:
        self.is_urgent |= self.is_requested and number == signal.SIGINT
        self.is_requested = True


@dataclass
class _Record:
    """How often a process died lately, and when it starts again."""

    deaths: list[float] = field(default_factory=list)  # time.monotonic()
    pause_seconds: float = 0  # before the next start; 0: as the policy begins
    start_at: float | None = None  # it is dead, and waits


class Supervisor:
    """Starts, watches, restarts and stops processes. `say` gets one line for each thing that the
    user should know."""

    def __init__(
        self,
        specs: Iterable[Spec] = (),
        say: Callable[[str], None] = lambda _: None,
        stop_signals: StopSignals | None = None,
        policy: RestartPolicy = RestartPolicy(),
    ):
        self.processes = {spec.name: Process(spec) for spec in specs}
        self._records = {name: _Record() for name in self.processes}
        self._say = say
        self._stop = stop_signals or StopSignals()
        self._policy = policy

    def add(self, spec: Spec) -> None:
        """Takes one more process to look after and starts it."""
        self.processes[spec.name] = Process(spec)
        self._records[spec.name] = _Record()
        self.processes[spec.name].start()

    def start(self) -> None:
        """Starts every process, in order."""
        for process in self.processes.values():
            process.start()

    def wait_ready(self, deadline_seconds: float, *names: str, restart: bool = False) -> None:
        """Returns when the named processes (none named: all) say that they are ready.

        Raises CannotRun at the deadline or, without `restart`, as soon as one of them ends;
        StopRequested when the user asks to stop.
        """
        deadline = time.monotonic() + deadline_seconds
        waiting = list(names or self.processes)
        while True:
            self.check(*waiting, restart=restart)
            waiting = [name for name in waiting if not self.processes[name].spec.ready()]
            if not waiting:
                return
            if self._stop.is_requested:
                raise StopRequested
            if time.monotonic() > deadline:
                names_of = " and ".join(waiting)
                raise CannotRun(f"Not ready after {deadline_seconds:g} s: {names_of}.")
            time.sleep(TICK_SECONDS)

    def watch(self) -> None:
        """Restarts what ends, until the user asks to stop. Raises CannotRun when that is no use."""
        while not self._stop.is_requested:
            self.check(restart=True)
            time.sleep(TICK_SECONDS)

    def check(self, *names: str, restart: bool) -> None:
        """Looks once at the named processes (none named: all) and does what is due."""
        for name in names or self.processes:
            process, record = self.processes[name], self._records[name]
            if process.is_alive:
                continue
            if record.start_at is not None:
                if time.monotonic() >= record.start_at:
                    record.start_at = None
                    process.start()
                continue
            self._on_end(process, record, restart)

    def restart(self, name: str) -> None:
        """Stops one process, if it runs, and starts it again."""
        self.processes[name].stop()
        self.processes[name].start()

    def stop(self) -> None:
        """Stops all, last started first; each has its own deadline, then it is killed."""
        for name, process in reversed(self.processes.items()):
            if process.popen is not None and not process.stop(lambda: self._stop.is_urgent):
                self._say(f"{name} did not stop in time and was killed.")

    def _on_end(self, process: Process, record: _Record, restart: bool) -> None:
        name, ending = process.spec.name, process.ending()
        process.end_group()
        if process.popen is not None and process.popen.returncode == EXIT_CONFIG:
            reason = process.last_words(1) or "the reason is printed above"
            raise CannotRun(f"{name} can't run as it is set up: {reason}", EXIT_CONFIG)
        words = process.last_words()
        printed = f"It printed:\n{words}" if words else "The reason should be printed above."
        if not restart:
            raise CannotRun(f"{name} {ending}. {printed}")
        policy, now = self._policy, time.monotonic()
        if now - process.started_at >= policy.steady_seconds or not record.pause_seconds:
            record.pause_seconds = policy.first_pause_seconds
        record.deaths = [at for at in record.deaths if now - at < policy.steady_seconds] + [now]
        if len(record.deaths) >= policy.most_deaths:
            raise CannotRun(
                f"{name} {ending}, {policy.most_deaths} times within {policy.steady_seconds:g} s, "
                f"so everything is stopped. {printed}"
            )
        self._say(f"{name} {ending}; starting it again in {record.pause_seconds:g} s.")
        record.start_at = now + record.pause_seconds
        record.pause_seconds = min(record.pause_seconds * 2, policy.longest_pause_seconds)
