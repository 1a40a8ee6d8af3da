"""The supervisor of local mode, with small stand-ins for what it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from local.processes import CannotRun, Process, Spec
from local.supervisor import EXIT_CONFIG, RestartPolicy, StopRequested, StopSignals, Supervisor
from tests.conftest import ROOT, alive, wait_until

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")

QUICK = RestartPolicy(first_pause_seconds=0.01, longest_pause_seconds=0.02, most_deaths=4)

# A child that writes when it is told to stop, and one that does not listen and has a child itself.
POLITE = """
import signal, sys, time
def stop(*_):
    open(LOG, "a").write(NAME + "\\n")
    sys.exit()
signal.signal(signal.SIGTERM, stop)
open(READY, "w").close()
while True: time.sleep(60)
"""
DEAF = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(READY + ".new", "w") as file: file.write(str(child.pid))
os.rename(READY + ".new", READY)
while True: time.sleep(60)
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Spec]:
    """Makes a spec from a program's text; it is ready when it has made the file READY."""

    def make(name: str, program: str, **more: object) -> Spec:
        ready = tmp_path / f"{name}.ready"
        names = f"NAME, READY, LOG = {name!r}, {str(ready)!r}, {str(tmp_path / 'log')!r}\n"
        return Spec(
            name=name,
            argv=(sys.executable, "-c", names + program),
            env=os.environ,
            ready=ready.exists,
            **more,  # type: ignore[arg-type]
        )

    return make


@pytest.fixture
def supervise() -> Iterator[Callable[..., Supervisor]]:
    """Makes supervisors, and stops what a failed test left."""
    made: list[Supervisor] = []

    def supervise(*specs: Spec, **more: object) -> Supervisor:
        made.append(Supervisor(specs, policy=QUICK, **more))  # type: ignore[arg-type]
        made[-1].start()
        return made[-1]

    yield supervise
    for supervisor in made:
        for process in supervisor.processes.values():
            process.end_group()


def pid_of(supervisor: Supervisor, name: str) -> int:
    popen = supervisor.processes[name].popen
    assert popen is not None
    return popen.pid


def test_what_started_last_stops_first(make, supervise, tmp_path):
    """Worker, then API, then Redis: nobody loses what it still needs."""
    supervisor = supervise(make("first", POLITE), make("second", POLITE), make("third", POLITE))
    supervisor.wait_ready(30)
    supervisor.stop()
    assert (tmp_path / "log").read_text().split() == ["third", "second", "first"]


def test_a_deaf_process_is_killed_after_its_deadline_with_its_children(make, supervise, tmp_path):
    """SIGKILL reaches the whole group, and the user is told."""
    said: list[str] = []
    supervisor = supervise(make("deaf", DEAF, stop_seconds=0.2), say=said.append)
    supervisor.wait_ready(30)
    child = int((tmp_path / "deaf.ready").read_text())
    supervisor.stop()
    wait_until(lambda: not alive(child), what="the child's end")
    assert said == ["deaf did not stop in time and was killed."]


def test_a_second_ctrl_c_kills_at_once(make, supervise):
    """Whoever presses it twice means it; the deadline of an hour does not count."""
    signals = StopSignals()
    supervisor = supervise(make("deaf", DEAF, stop_seconds=3600), stop_signals=signals)
    supervisor.wait_ready(30)
    signals.is_requested = signals.is_urgent = True
    supervisor.stop()
    assert not supervisor.processes["deaf"].is_alive


def test_a_paused_process_stops_in_order_too(make, supervise, tmp_path):
    """SIGTERM waits for ever on a stopped process, so it is continued."""
    supervisor = supervise(make("paused", POLITE, stop_seconds=30))
    supervisor.wait_ready(30)
    supervisor.processes["paused"].send(signal.SIGSTOP)
    supervisor.stop()
    assert (tmp_path / "log").read_text() == "paused\n"


def test_a_process_that_was_killed_is_started_again(make, supervise):
    """One line says so, and the new one becomes ready."""
    said: list[str] = []
    supervisor = supervise(make("polite", POLITE), say=said.append)
    supervisor.wait_ready(30)
    first = pid_of(supervisor, "polite")
    supervisor.processes["polite"].send(signal.SIGKILL)

    def is_another() -> bool:
        supervisor.check(restart=True)
        return pid_of(supervisor, "polite") != first and supervisor.processes["polite"].is_alive

    wait_until(is_another)
    assert said == ["polite was killed by SIGKILL; starting it again in 0.01 s."]


def test_pauses_between_starts_double_up_to_the_longest(make, supervise):
    """A process that can't stay up does not burn the machine."""
    said: list[str] = []
    supervisor = supervise(make("brief", "raise SystemExit(3)"), say=said.append)
    with pytest.raises(CannotRun):
        supervisor.watch()
    assert said == [
        f"brief ended with status 3; starting it again in {pause} s."
        for pause in (0.01, 0.02, 0.02)
    ]


def test_a_process_that_keeps_dying_ends_everything_with_a_sentence(make, supervise, tmp_path):
    """No endless loop, and what it printed is in the sentence."""
    brief = make("brief", "raise SystemExit('no such thing')", log=tmp_path / "output")
    supervisor = supervise(brief)
    with pytest.raises(CannotRun) as caught:
        supervisor.watch()
    assert caught.value.message.startswith("brief ended with status 1, 4 times within 60 s")
    assert caught.value.message.endswith("no such thing")


def test_a_long_life_earns_a_short_pause_again(make):
    """An hour of work is not held against a process because it once had a bad start."""
    said: list[str] = []
    policy = RestartPolicy(first_pause_seconds=0.01, steady_seconds=0, most_deaths=2)
    supervisor = Supervisor([make("brief", "raise SystemExit(3)")], said.append, policy=policy)
    supervisor.start()

    def said_thrice() -> bool:
        supervisor.check(restart=True)
        return len(said) == 3

    wait_until(said_thrice)
    assert {line.rpartition("again in ")[2] for line in said} == {"0.01 s."}
    supervisor.stop()


def test_a_process_that_says_its_setup_is_wrong_is_not_started_again(make, supervise):
    """Exit status 78 ends everything, and becomes ours."""
    said: list[str] = []
    supervisor = supervise(make("misled", f"raise SystemExit({EXIT_CONFIG})"), say=said.append)
    with pytest.raises(CannotRun) as caught:
        supervisor.watch()
    assert caught.value.exit_status == EXIT_CONFIG
    assert said == []


def test_waiting_ends_at_its_deadline_naming_who_is_late(make, supervise):
    """`Not ready` alone would send the user looking."""
    late = make("late", "import time; time.sleep(600)")
    supervisor = supervise(make("polite", POLITE), late)
    with pytest.raises(CannotRun, match=r"Not ready after 1 s: .*late"):
        supervisor.wait_ready(1)


def test_waiting_ends_when_the_process_does(make, supervise, tmp_path):
    """A test that waits for a dead process learns what it printed, not that time is up."""
    supervisor = supervise(make("brief", "raise SystemExit('because')", log=tmp_path / "output"))
    with pytest.raises(CannotRun, match=r"brief ended with status 1. It printed:\nbecause"):
        supervisor.wait_ready(600)


def test_ctrl_c_ends_the_waiting(make, supervise):
    """Also while a model is being fetched."""
    signals = StopSignals()
    supervisor = supervise(make("late", "import time; time.sleep(600)"), stop_signals=signals)
    signals.is_requested = True
    with pytest.raises(StopRequested):
        supervisor.wait_ready(600)


def test_a_program_that_does_not_exist_is_named(make, supervise, tmp_path):
    """It is a sentence, not a traceback."""
    spec = Spec("lost", ("/no/such/program",), os.environ, lambda: True, log=tmp_path / "output")
    supervisor = supervise(spec)
    with pytest.raises(CannotRun, match="/no/such/program can't be started: No such file"):
        wait_until(lambda: supervisor.check(restart=False))


def test_restart_stops_before_it_starts(make, supervise, tmp_path):
    """As a deployment would: the old one gets its SIGTERM."""
    supervisor = supervise(make("polite", POLITE))
    supervisor.wait_ready(30)
    first = pid_of(supervisor, "polite")
    supervisor.restart("polite")
    assert (tmp_path / "log").read_text() == "polite\n"
    assert pid_of(supervisor, "polite") != first


LAUNCHER = """
import os, signal, sys
from local.processes import Spec
from local.supervisor import Supervisor
supervisor = Supervisor([
    Spec(name, (sys.executable, "-c", program), os.environ, lambda: True, death_signal=sign)
    for name, program, sign in [
        ("killed", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)",
         signal.SIGKILL),
        ("told", "import time; time.sleep(600)", signal.SIGTERM),
    ]
])
supervisor.start()
print(*(process.popen.pid for process in supervisor.processes.values()), flush=True)
supervisor.watch()
"""


@linux
def test_no_process_outlives_a_launcher_that_is_killed(tmp_path):
    """kill -9 gives the launcher no chance to stop anybody, so the kernel does it."""
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        children = [int(pid) for pid in launcher.stdout.readline().split()]
        assert len(children) == 2
        launcher.kill()
    for child in children:
        wait_until(lambda pid=child: not alive(pid), what="the end of a launcher's child")


@linux
def test_a_launcher_that_died_too_early_is_noticed(tmp_path):
    """Between its start and its request to the kernel a child may have lost its parent already."""
    another = str(os.getpid() + 1)
    tether = str(ROOT / "local" / "tether.py")
    marker = tmp_path / "ran"
    ended = subprocess.run(
        [sys.executable, tether, str(int(signal.SIGKILL)), another, "touch", str(marker)],
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert not marker.exists()


@linux
def test_a_tethered_program_gets_the_signals_of_a_fresh_one(tmp_path):
    """Python ignores SIGPIPE; what it becomes must not inherit that."""
    output = tmp_path / "output"
    command = ("grep", "^SigIgn", "/proc/self/status")
    process = Process(Spec("grep", command, os.environ, lambda: True, log=output))
    process.start()
    wait_until(lambda: not process.is_alive)
    ignored = int(output.read_text().split()[1], 16)
    assert not ignored & (1 << (signal.SIGPIPE - 1))


def test_a_child_has_a_session_of_its_own(make, supervise):
    """So a terminal's Ctrl-C reaches the launcher alone, which then stops the rest in order."""
    supervisor = supervise(make("polite", POLITE))
    pid = pid_of(supervisor, "polite")
    assert os.getsid(pid) == pid != os.getsid(0)


def test_the_end_of_a_log_is_short_enough_to_print(tmp_path):
    """A failure shows its cause, not an hour of history."""
    log = tmp_path / "log"
    log.write_text("".join(f"line {n}\n" for n in range(1000)))
    words = Process(Spec("any", ("true",), {}, lambda: True, log=log)).last_words(3)
    assert words.splitlines() == ["line 997", "line 998", "line 999"]


def test_signals_become_flags():
    """SIGTERM and the first Ctrl-C ask to stop; only another Ctrl-C is urgent."""
    signals = StopSignals()
    signals._on_signal(signal.SIGINT, None)
    assert (signals.is_requested, signals.is_urgent) == (True, False)
    signals._on_signal(signal.SIGTERM, None)
    assert not signals.is_urgent
    signals._on_signal(signal.SIGINT, None)
    assert signals.is_urgent
    signals._on_signal(signal.SIGTERM, None)
    assert signals.is_urgent


def test_watching_ends_when_the_user_asks(make, supervise):
    """And not before: the loop is the launcher's whole life."""
    signals = StopSignals()
    supervisor = supervise(make("polite", POLITE), stop_signals=signals)
    supervisor.wait_ready(30)
    previous = signal.signal(signal.SIGALRM, signals._on_signal)
    try:
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        supervisor.watch()
        assert time.monotonic() - began >= 0.3
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert supervisor.processes["polite"].is_alive
