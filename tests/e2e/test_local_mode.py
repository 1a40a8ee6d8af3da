"""`make run` and `make demo` as their users meet them: what they print, and what they leave."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import httpx2
import pytest

from local import demo
from local.ports import free_port
from local.processes import CannotRun, Process
from local.redis_server import RedisServer, find_binary
from local.supervisor import StopSignals
from tests.conftest import FOX, FOX_WORDS, PLAIN, ROOT, alive, wait_until
from tests.e2e.conftest import variant

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="processes are found in Linux's /proc"
)


class Launcher:
    """`python -m local ...` in a folder of its own, and every process that comes from it."""

    def __init__(self, folder: Path, command: list[str], environment: dict[str, str]):
        self.folder = folder
        self.marker = uuid4().hex
        self.port = int(environment.get("PORT", 0)) or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / f"out-{self.marker}", folder / f"err-{self.marker}"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.popen = subprocess.Popen(
                command,
                cwd=folder,  # and not where a developer's .env is
                env={
                    **{n: v for n, v in os.environ.items() if not n.startswith("MAKE")},
                    "PYTHONPATH": str(ROOT),
                    "PORT": str(self.port),
                    "TMPDIR": str(folder),
                    "LOCAL_MODE_TEST": self.marker,
                    **environment,
                },
                stdout=out,
                stderr=err,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def processes(self) -> dict[int, str]:
        """Those that run: pid -> command line. What they started inherits their environment, but
        Redis writes its title over that; it works in its folder, which is below ours."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                is_redis = "-server" in words and (entry / "cwd").readlink().is_relative_to(
                    self.folder
                )
                if is_redis or self.marker.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = words
            except OSError:
                continue  # it ended meanwhile
        return {pid: words for pid, words in found.items() if alive(pid)}

    def pid_of(self, words: str) -> int:
        """The oldest process with these words in its command line."""
        return min(self.pids_of(words))

    def pids_of(self, words: str) -> list[int]:
        return [pid for pid, line in self.processes().items() if words in line]

    def wait_ready(self) -> Launcher:
        def is_ready() -> bool:
            assert self.popen.poll() is None, self.out + self.err
            return "Ctrl-C stops it." in self.out

        wait_until(is_ready, 60, "the service is ready")
        return self

    def end(self, sign: signal.Signals) -> int:
        """Sends the signal to the launcher alone; returns its status when nothing is left."""
        self.popen.send_signal(sign)
        return self.ended()

    def ended(self, within: float = 60) -> int:
        status = self.popen.wait(within)
        wait_until(lambda: not self.processes(), 30, f"nothing is left of {self.processes()}")
        return status

    def transcribe(self, path: Path = FOX) -> str:
        """Submits, waits, returns the text; patient with a service that is being mended."""

        def ask(method: str, address: str, **more: object) -> httpx2.Response | None:
            try:
                answer = httpx2.request(method, self.url + address, **PLAIN, timeout=30, **more)
            except httpx2.TransportError:
                return None
            return answer if answer.is_success else None

        def submitted() -> httpx2.Response | None:
            with path.open("rb") as file:
                return ask("POST", "/transcribe", files={"file": file})

        job = wait_until(submitted, 60, "a job is accepted").json()

        def text() -> str | None:
            answer = ask("GET", f"/result/{job['job_id']}")
            return answer.json().get("text") if answer and answer.status_code == 200 else None

        return wait_until(text, 60, "a transcript comes")


Start = Callable[..., Launcher]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts launchers; whatever a failed test leaves of them is killed."""
    started: list[Launcher] = []

    def start(command: str = "run", folder: str = "here", **environment: str) -> Launcher:
        words = [sys.executable, "-m", "local", command]
        started.append(Launcher(tmp_path / folder, words, environment))
        return started[-1]

    yield start
    for launcher in started:
        for pid in launcher.processes():
            os.kill(pid, signal.SIGKILL)
        launcher.popen.wait()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """One that goes on whatever its tests do."""
    words = [sys.executable, "-m", "local", "run"]
    launcher = Launcher(tmp_path_factory.mktemp("running"), words, {}).wait_ready()
    yield launcher
    launcher.end(signal.SIGINT)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_run_prints_a_curl_that_works_and_ctrl_c_stops_everything(start: Start):
    """One command to start, one line to copy, one key to stop; the job is there the next time."""
    launcher = start().wait_ready()
    assert f"{launcher.url}/docs" in launcher.out
    assert f"{launcher.url}/metrics" in launcher.out
    assert str(launcher.folder / ".data") in launcher.out
    assert "demo" in launcher.out
    curl = next(line for line in launcher.out.splitlines() if "curl" in line)
    command = [*shlex.split(curl.strip().removeprefix("or")), "-sS", "--noproxy", "*"]
    job = json.loads(subprocess.check_output(command))["job_id"]
    assert launcher.transcribe() == FOX_WORDS  # joins the job above
    assert launcher.end(signal.SIGINT) == 0
    assert launcher.out.endswith("Stopped.\n")

    again = start().wait_ready()
    result = httpx2.get(f"{again.url}/result/{job}", **PLAIN)
    assert result.json()["text"] == FOX_WORDS
    assert again.end(signal.SIGTERM) == 0


def test_a_closed_terminal_stops_everything(start: Start):
    """SIGHUP is a Ctrl-C of its own kind."""
    assert start().wait_ready().end(signal.SIGHUP) == 0


def test_ctrl_c_during_the_start_stops_everything(start: Start):
    """From the first process on, not only from the moment that the service is ready."""
    launcher = start()
    wait_until(lambda: launcher.pids_of("-m api"), what="the API's start")
    assert launcher.end(signal.SIGINT) == 0


def long_recording(path: Path, seconds: int) -> Path:
    with wave.open(str(FOX)) as source, wave.open(str(path), "wb") as target:
        target.setparams(source.getparams())
        sound = source.readframes(source.getnframes())
        for _ in range(seconds // 3):
            target.writeframes(sound)
    return path


def test_a_killed_launcher_leaves_no_process_behind(start: Start, tmp_path):
    """kill -9 amid a transcription: API processes, decoders, Redis, all gone; the job is not."""
    launcher = start(WORKERS="2").wait_ready()
    recording = long_recording(tmp_path / "long.wav", 1800)
    with recording.open("rb") as file:
        answer = httpx2.post(
            f"{launcher.url}/transcribe", files={"file": file}, **PLAIN, timeout=60
        )
    status = f"{launcher.url}/status/{answer.json()['job_id']}"
    wait_until(
        lambda: httpx2.get(status, **PLAIN).json()["status"] == "processing",
        what="the transcription runs",
    )
    assert len(launcher.processes()) >= 6  # itself, Redis, three of the API, the worker
    assert launcher.end(signal.SIGKILL) == -signal.SIGKILL

    again = start(PORT=str(launcher.port)).wait_ready()
    assert httpx2.get(status, **PLAIN).json()["status"] in {"queued", "processing"}
    again.popen.send_signal(signal.SIGINT)
    again.popen.send_signal(signal.SIGINT)
    assert again.ended() == 0


def test_a_killed_make_leaves_no_process_behind(tmp_path):
    """What a user kills is the process that they started, and that is make."""
    (tmp_path / "Makefile").write_text(f"run:\n\t@exec {sys.executable} -m local run\n")
    launcher = Launcher(tmp_path, ["make", "run"], {}).wait_ready()
    assert launcher.end(signal.SIGKILL) == -signal.SIGKILL


def test_a_port_in_use_is_one_sentence_and_nothing_runs(start: Start):
    """And no file is written that a next run would trip over."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        launcher = start(PORT=str(port))
        assert launcher.ended() == 1
    assert launcher.err.startswith(f"PORT {port} on 127.0.0.1 can't be used: Address already in")
    assert launcher.err.count("\n") == 1
    assert launcher.out == ""


def test_a_second_run_on_one_folder_is_refused_and_the_first_goes_on(running):
    """Two of them would write the same Redis files."""
    second = Launcher(running.folder, running.popen.args, {})
    try:
        assert second.popen.wait(30) == 1
    finally:
        second.popen.kill()
    assert f"(process {running.popen.pid})" in second.err
    assert running.transcribe() == FOX_WORDS


def test_two_runs_on_two_folders_are_two_services(running, start: Start):
    """The second finds a port for its worker by itself."""
    for launcher in (running, start().wait_ready()):
        assert launcher.transcribe() == FOX_WORDS


def test_a_model_that_can_not_be_had_ends_with_one_sentence(start: Start):
    """No loop of restarts: it would fail the same way again."""
    launcher = start(MODEL_SIZE="no-such-model")
    assert launcher.ended() == 78
    assert "There is no model named 'no-such-model'." in launcher.err
    assert launcher.err.endswith("worker can't run as it is set up: the reason is printed above\n")
    assert "starting it again" not in launcher.out


@pytest.mark.parametrize(
    ("number", "name", "words"),
    [(1, "worker", "-m worker"), (2, "API", "-m api"), (3, "Redis", "-server")],
)
def test_whatever_is_killed_comes_back(running, number: int, name: str, words: str, tmp_path):
    """The supervisor starts it again, the others find it, and jobs go on."""
    os.kill(running.pid_of(words), signal.SIGKILL)
    wait_until(lambda: f"{name} was killed by SIGKILL; starting it again" in running.out)
    assert running.transcribe(variant(tmp_path / "another.wav", number)) == FOX_WORDS


def test_a_redis_url_is_used_and_no_redis_started(start: Start, tmp_path):
    """Whoever has a Redis keeps it; it goes on when we stop."""
    server = RedisServer(tmp_path / "elsewhere", find_binary())
    process = Process(server.spec())
    process.start()
    try:
        wait_until(process.spec.ready)
        launcher = start(REDIS_URL=server.url).wait_ready()
        assert launcher.transcribe() == FOX_WORDS
        assert not (launcher.folder / ".data" / "redis").exists()
        assert server.password not in launcher.out + launcher.err
        assert launcher.end(signal.SIGINT) == 0
        assert process.is_alive
    finally:
        process.stop()


@pytest.mark.parametrize("path", [os.environ.get("PATH", ""), "/nowhere"])
def test_demo_prints_the_transcript_and_leaves_nothing(start: Start, tmp_path, path: str):
    """Whatever the user's settings say, with the system's Redis or, on an empty PATH, the bundled
    one; and the transcript is its last line."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / ".env").write_text("REDIS_URL=redis://nowhere/0\nMODEL_SIZE=large-v3\n")
    launcher = start("demo", PATH=path, WORKERS="3", DEVICE="cuda")
    assert launcher.ended(within=180) == 0
    assert launcher.out.splitlines()[-1] == f"Transcript: {FOX_WORDS}"
    assert "Language: en" in launcher.out
    assert "make run" in launcher.out
    assert launcher.err == ""
    left = {path.name.partition("-")[0] for path in launcher.folder.iterdir()}
    assert left == {".env", "out", "err"}


def test_a_demo_that_is_interrupted_says_so_and_leaves_nothing(start: Start):
    """Its exit status tells scripts that no transcript came."""
    launcher = start("demo")
    wait_until(lambda: launcher.pids_of("-m worker"), what="the worker's start")
    assert launcher.end(signal.SIGINT) == 1
    assert launcher.out.endswith("Stopped before a transcript came.\n")
    left = {path.name.partition("-")[0] for path in launcher.folder.iterdir()}
    assert left == {"out", "err"}


def test_a_demo_that_fails_shows_the_end_of_the_log(tmp_path, monkeypatch, capfd):
    """What the processes printed went to a file that is about to be removed."""
    monkeypatch.setattr(demo, "SAMPLE", tmp_path / "no-such-file.wav")
    with pytest.raises(CannotRun, match="no-such-file"):
        demo.show(tmp_path / "demo", 10e9, StopSignals())
    assert "api_started" in capfd.readouterr().err
