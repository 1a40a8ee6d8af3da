"""What breaks, and that nothing is lost or done twice: real processes, real signals, real Redis."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import wave
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import numpy as np
import pytest

from local.service import Service
from shared.broker import QUEUE_NAME, celery_app, doorbell
from tests.conftest import FOX, FOX_WORDS, ROOT, wait_until
from tests.e2e.conftest import (
    QUICK,
    Client,
    completed_runs,
    counted_runs,
    expect_completed_runs,
    leftovers,
    long_ago,
    metric,
    running,
    variant,
    worker_metric,
)
from tests.model.media import encode, samples_of

EXACT = {"temperature": "0", "vad_filter": "false", "language": "en"}
LEASE_SECONDS = 5
SHORT_LEASE = {"lease_seconds": str(LEASE_SECONDS)}
RECOVERY_SECONDS = LEASE_SECONDS + 30


def long_file(path: Path, repeats: int = 60) -> Path:
    """Some minutes of the sample, so that there is time to break something meanwhile."""
    once = np.concatenate([samples_of(FOX), np.zeros(8_000, np.int16)])
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.tile(once, repeats).tobytes())
    return path


def log_of(service: Service) -> str:
    return (service.settings.data_dir.parent / "service.log").read_text()


def is_running(client: Client, job_id: str) -> bool:
    status = client.status(job_id)
    assert status["status"] in {"queued", "processing"}, status
    return bool(status["progress"] > 0)


FAULTY_MODEL = """
import os, sys, time

if sys.orig_argv[-2:] == ["-m", "worker"]:
    import ctranslate2

    generate = ctranslate2.models.Whisper.generate
    here = os.path.dirname(__file__)

    def faulty(self, *args, **options):
        if os.path.exists(f"{here}/broken-{os.getpid()}"):
            raise RuntimeError("CUDA failed with error an illegal memory access was encountered")
        while os.path.exists(f"{here}/hung-{os.getpid()}"):
            time.sleep(0.1)
        return generate(self, *args, **options)

    ctranslate2.models.Whisper.generate = faulty
"""


@pytest.fixture
def spoil(tmp_path: Path) -> Callable[[Service, str, str], Path]:
    """Workers whose model can be spoilt while they run: broken raises at every call, as after an
    error of a GPU; hung never returns."""
    (tmp_path / "sitecustomize.py").write_text(FAULTY_MODEL)

    def now(service: Service, worker: str, how: str) -> Path:
        (flag := tmp_path / f"{how}-{service.popen(worker).pid}").touch()
        return flag

    return now


@pytest.fixture
def begun(start, spoil, tmp_path):
    """A service with a job under way in its one slot: (service, client, job id, go). The model of
    its worker does not return before `go` is called, so whatever a test does is in its middle."""

    def begin(**environment: str):
        service, client = start(
            **{"PYTHONPATH": f"{tmp_path}:{ROOT}", "worker_slots": "1", **environment}
        )
        hung = spoil(service, "worker", "hung")
        job = client.submit(**EXACT)["job_id"]
        wait_until(lambda: client.status(job)["status"] == "processing", 30, "it is under way")
        return service, client, job, hung.unlink

    return begin


@pytest.fixture
def long_begun(start, tmp_path):
    """The same with a model that works, on a recording of which it has heard the beginning."""
    service, client = start(worker_slots="1")
    job = client.submit(long_file(tmp_path / "long.wav", 300), **EXACT)["job_id"]
    wait_until(lambda: is_running(client, job), 60, "it is under way")
    return service, client, job


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A service that gives a run three seconds."""
    settings = {**QUICK, "worker_slots": "1", "max_run_seconds": "3"}
    with running(tmp_path_factory.mktemp("strict"), settings) as service:
        client = Client(service)
        yield client
        client.http.close()


@pytest.mark.parametrize("vad_filter", ["true", "false"], ids=["batched", "sequential"])
def test_a_run_that_takes_too_long_is_ended(strict, tmp_path, vad_filter):
    """The job fails with a reason, once, and the worker goes on with the next one. Its upload is
    kept, until it is erased."""
    service, client = strict.service, strict
    job = client.submit(long_file(tmp_path / "long.wav", 150), language="en", vad_filter=vad_filter)
    status = client.wait(job["job_id"], "failed")
    assert status["error"]["code"] == "time_limit"
    assert "MAX_RUN_SECONDS" in status["error"]["message"]
    assert status["attempts"] == 1
    next_job = client.submit(FOX, vad_filter=vad_filter)["job_id"]
    client.wait(next_job)
    assert client.text(next_job) == FOX_WORDS
    wait_until(lambda: leftovers(service) == [job["job_id"]], 30, "the other upload is gone")
    client.http.delete(f"/jobs/{job['job_id']}")
    assert leftovers(service) == []


def test_a_killed_worker_s_job_completes_after_its_restart(begun):
    """kill -9 in the middle: done once, within 30 s of the lease's end, by a new process."""
    service, client, job_id, _ = begun(**SHORT_LEASE)
    service.kill("worker")
    service.popen("worker").wait(30)
    service.restart("worker")
    status = client.wait(job_id, within=RECOVERY_SECONDS + 30)
    assert status["attempts"] == 2
    assert client.stats()["transcriptions"]["completed"] == 1
    wait_until(lambda: leftovers(service) == [], 30, "the upload is gone")
    again = client.submit(**EXACT)
    assert again["status"] == "completed", "and its transcript is kept"


def test_a_killed_worker_s_job_completes_on_another_worker(begun):
    service, client, job_id, _ = begun(**SHORT_LEASE)
    other = service.add_worker()
    service.kill("worker")
    service.wait_ready(60, other)
    client.wait(job_id, within=RECOVERY_SECONDS + 30)
    expect_completed_runs(service, 1, other)


def test_a_frozen_worker_commits_nothing(begun):
    """SIGSTOP past the lease: another worker does the job, and the late one is refused."""
    service, client, job_id, go = begun(**SHORT_LEASE)
    service.kill("worker", signal.SIGSTOP)
    other = service.add_worker()
    service.wait_ready(60, other)
    client.wait(job_id, within=RECOVERY_SECONDS + 30)
    text = client.text(job_id)
    go()
    service.kill("worker", signal.SIGCONT)

    def given_up() -> bool:
        return worker_metric(service, "worker", "whisper_jobs_total", status="lost") == 1

    wait_until(given_up, 60, "the late worker gives up")
    assert completed_runs(service, "worker") == 0
    assert client.text(job_id) == text
    assert client.stats()["transcriptions"]["completed"] == 1


def test_a_killed_redis_loses_nothing(begun, tmp_path):
    """kill -9 of Redis: what ran and what waited completes after its restart, each once."""
    service, client, job_id, go = begun()
    waiting = client.submit(variant(tmp_path / "w.wav", 1), language="en")["job_id"]
    wait_until(lambda: _is_on_disk(service), 30, "the append-only file is written each second")
    service.kill("Redis")
    service.popen("Redis").wait(30)
    answer = client.http.post("/transcribe", files={"file": ("a.wav", FOX.read_bytes())})
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    for path in (f"/status/{job_id}", f"/result/{job_id}", "/health", "/stats", "/health/ready"):
        assert client.http.get(path).status_code == 503, path
    assert client.http.get("/health/live").status_code == 200
    assert metric(client.http.get("/metrics").text, "whisper_store_up") == 0
    service.restart("Redis")
    go()
    for job in (job_id, waiting):
        client.wait(job, within=RECOVERY_SECONDS + 60)
    assert client.text(waiting) == FOX_WORDS
    assert client.stats()["transcriptions"]["completed"] == 2
    wait_until(lambda: leftovers(service) == [], 30, "nothing is left behind")


def _is_on_disk(service) -> bool:
    folder = service.settings.data_dir / "redis"
    return any(path.stat().st_size for path in folder.rglob("*.aof"))


def test_a_stalled_redis_is_an_error_within_seconds_and_no_loss(service, client, tmp_path):
    """SIGSTOP: nobody hangs on it, and what was accepted completes when it goes on."""
    service.kill("worker", signal.SIGSTOP)
    job = client.submit(variant(tmp_path / "a.wav", 1))
    service.kill("Redis", signal.SIGSTOP)
    for path in ("/health/ready", f"/status/{job['job_id']}"):
        answer = client.http.get(path, timeout=20)
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    answer = client.http.post("/transcribe", files={"file": FOX.read_bytes()}, timeout=20)
    assert answer.status_code == 503
    assert client.http.get("/health/live").status_code == 200
    service.kill("Redis", signal.SIGCONT)
    service.kill("worker", signal.SIGCONT)
    client.wait(job["job_id"], within=RECOVERY_SECONDS)
    assert client.text(job["job_id"]) == FOX_WORDS


def test_an_emptied_redis_loses_no_accepted_job(begun, raw_of, tmp_path):
    """FLUSHALL: manifests bring back what ran and what waited; the old claim writes nothing."""
    service, client, job_id, go = begun()
    waiting = [client.submit(variant(tmp_path / f"{n}.wav", n))["job_id"] for n in range(5)]
    raw_of(service).flushall()
    long_ago(service, job_id, *waiting)
    go()
    for job in (job_id, *waiting):
        _wait_through_404(client, job, RECOVERY_SECONDS + 60)
    assert [client.text(job) for job in waiting] == [FOX_WORDS] * 5
    assert client.stats()["transcriptions"]["completed"] == 6
    wait_until(lambda: leftovers(service) == [], 30, "nothing is left behind")


def _wait_through_404(client: Client, job_id: str, within: float) -> None:
    """Between the loss and its repair the id is unknown."""
    wait_until(lambda: client.status(job_id).get("status") == "completed", within, job_id)


def test_finished_work_survives_a_redis_that_is_away(begun):
    """The worker ends while Redis is dead: its transcript is saved and committed later, not made
    again."""
    service, client, job_id, go = begun()
    service.kill("Redis")
    service.popen("Redis").wait(30)
    go()
    uploads = service.settings.data_dir / "uploads"
    wait_until(lambda: list(uploads.glob("*/transcript.json")), 90, "the work is saved")
    service.restart("Redis")
    client.wait(job_id, within=RECOVERY_SECONDS)
    assert worker_metric(service, "worker", "whisper_audio_duration_seconds_count") == 1
    wait_until(lambda: leftovers(service) == [], 30, "nothing is left behind")


def test_a_stopping_worker_hands_its_job_back(long_begun):
    """SIGTERM: what does not end in DRAIN_SECONDS is given back, and no attempt is burnt."""
    service, client, job_id = long_begun
    service.kill("worker", signal.SIGTERM)
    assert service.popen("worker").wait(60) == 0
    status = client.status(job_id)
    assert (status["status"], status["attempts"]) == ("queued", 0)
    service.restart("worker")
    assert client.wait(job_id, "processing", within=60)["attempts"] == 1


def test_cancelling_stops_the_work_within_a_segment(long_begun):
    """The worker is free for the next job, and the upload is gone."""
    service, client, job_id = long_begun
    assert client.http.delete(f"/jobs/{job_id}").json()["status"] == "cancelled"
    assert client.status(job_id)["status"] == "cancelled"
    assert leftovers(service) == []

    def stopped() -> bool:
        return worker_metric(service, "worker", "whisper_jobs_total", status="cancelled") == 1

    wait_until(stopped, 30, "the worker notices")
    client.wait(client.submit()["job_id"])


def test_a_stopping_worker_ends_what_it_can(start, spoil, tmp_path):
    """Work that fits the drain is done before the worker leaves."""
    service, client = start(PYTHONPATH=f"{tmp_path}:{ROOT}", drain_seconds="60")
    hung = spoil(service, "worker", "hung")
    job = client.submit(**EXACT)
    wait_until(lambda: client.status(job["job_id"])["status"] == "processing", 30)
    service.kill("worker", signal.SIGTERM)
    wait_until(lambda: '"action": "drain"' in log_of(service), 30, "it drains")
    hung.unlink()
    assert service.popen("worker").wait(60) == 0
    assert client.status(job["job_id"])["status"] == "completed"


def test_a_worker_whose_model_is_broken_ends_and_no_file_is_blamed(start, spoil, tmp_path):
    """One of three: it takes one job, gives it back, and is gone; all complete at their first
    attempt."""
    service, client = start(PYTHONPATH=f"{tmp_path}:{ROOT}", worker_slots="1")
    others = [service.add_worker() for _ in range(2)]
    service.wait_ready(60)
    spoil(service, "worker", "broken")
    for other in others:  # or there is nothing left for the broken one
        service.kill(other, signal.SIGSTOP)
    jobs = [client.submit(variant(tmp_path / f"{n}.wav", n))["job_id"] for n in range(12)]
    assert service.popen("worker").wait(60) == 1
    for other in others:
        service.kill(other, signal.SIGCONT)
    for job in jobs:
        assert client.wait(job)["attempts"] == 1
        assert client.text(job) == FOX_WORDS
    assert log_of(service).count('"engine_failed"') == 1
    assert log_of(service).count('"model_broken"') == 1


def test_a_worker_whose_model_hangs_ends_and_its_job_goes_on(start, spoil, tmp_path):
    """Its heart beats on, so nobody else would notice."""
    settings = {"worker_slots": "1", "max_call_seconds": "5", **SHORT_LEASE}
    service, client = start(PYTHONPATH=f"{tmp_path}:{ROOT}", **settings)
    spoil(service, "worker", "hung")
    job = client.submit(**EXACT)["job_id"]
    assert service.popen("worker").wait(60) == 1
    service.restart("worker")
    assert client.wait(job, within=60)["attempts"] == 2
    assert client.text(job) == FOX_WORDS


def test_a_file_that_crashes_its_decoder_fails_alone(start, tmp_path):
    """SIGSEGV where FFmpeg works on it: a clear error at the first attempt, no other process is
    hurt, and what runs and waits beside it completes."""
    service, client = start(worker_slots="2")
    worker = service.popen("worker").pid
    silence = encode(tmp_path / "hours.flac", np.zeros(3 * 3600 * 16_000, np.int16))
    crashing = client.submit(silence)["job_id"]
    decoder = wait_until(lambda: _decoder_of(worker, crashing), 30, "its decoder runs")
    beside = [client.submit(variant(tmp_path / f"{n}.wav", n))["job_id"] for n in range(4)]
    os.kill(decoder, signal.SIGSEGV)
    status = client.wait(crashing, "failed")
    assert status["error"]["code"] == "unreadable_media"
    assert "decoder failed on this file (SIGSEGV)" in status["error"]["message"]
    assert status["attempts"] == 1
    for job in beside:
        assert client.wait(job)["attempts"] == 1
        assert client.text(job) == FOX_WORDS
    assert service.popen("worker").pid == worker
    assert worker_metric(service, "worker", "whisper_jobs_total", status="failed") == 1
    wait_until(lambda: leftovers(service) == [], 30, "nothing is left behind")


def _decoder_of(worker: int, job_id: str) -> int | None:
    """The process that has the job's upload open, and is no thread of the worker itself."""
    for server in _children(worker):
        for child in _children(server):
            with suppress(OSError):
                if job_id in os.readlink(f"/proc/{child}/fd/3"):
                    return child
    return None


def test_a_killed_api_loses_no_accepted_job(service, client, tmp_path):
    """What was answered with 202 completes."""
    jobs = [client.submit(variant(tmp_path / f"{n}.wav", n))["job_id"] for n in range(10, 13)]
    service.kill("API")
    service.popen("API").wait(30)
    service.restart("API")
    service.wait_ready(30, "API")
    for job in jobs:
        client.wait(job)
        assert client.text(job) == FOX_WORDS


def test_a_lost_bell_only_delays(service, client, raw_of, tmp_path):
    """The broker's list is emptied: the reaper rings again."""
    service.kill("worker", signal.SIGSTOP)
    job = client.submit(variant(tmp_path / "a.wav", 2))
    raw_of(service).delete(QUEUE_NAME)
    service.kill("worker", signal.SIGCONT)
    client.wait(job["job_id"], within=60)


def test_repeated_bells_change_nothing(service, client, raw_of, tmp_path):
    """A message that arrives five more times costs five looks at an empty queue."""
    runs = counted_runs(service)
    service.kill("worker", signal.SIGSTOP)
    job = client.submit(variant(tmp_path / "a.wav", 3))
    bell = doorbell(celery_app(service.redis_url), "whatever it hints at")
    raw = raw_of(service)
    raw.lpush(QUEUE_NAME, *[bell] * 5)
    service.kill("worker", signal.SIGCONT)
    client.wait(job["job_id"], within=60)
    wait_until(lambda: raw.llen(QUEUE_NAME) == 0)
    expect_completed_runs(service, runs + 1)


def test_two_workers_share_the_work(start, spoil, tmp_path):
    """What one has no place for another takes, and each job is done once."""
    service, client = start(PYTHONPATH=f"{tmp_path}:{ROOT}", worker_slots="1")
    other = service.add_worker()
    service.wait_ready(60, other)
    hung = [spoil(service, name, "hung") for name in ("worker", other)]
    jobs = [client.submit(variant(tmp_path / f"{n}.wav", n))["job_id"] for n in range(12)]
    wait_until(lambda: client.stats()["queue"]["processing"] == 2, 30, "each has one")
    for flag in hung:
        flag.unlink()
    for job in jobs:
        client.wait(job)

    def counted() -> list[float]:
        return [completed_runs(service, name) for name in ("worker", other)]

    wait_until(lambda: sum(counted()) >= 12, 30, "all are counted")
    assert sum(counted()) == 12
    assert all(counted()), counted()


def test_several_api_processes_count_as_one(start, tmp_path):
    """WORKERS=2: the metrics are those of both, whoever answers, also after one is killed."""
    service, _ = start(workers="2")
    for number in range(6):
        path = variant(tmp_path / "a.wav", number)
        with (
            httpx2.Client(base_url=service.base_url, trust_env=False) as fresh,
            path.open("rb") as f,
        ):
            assert fresh.post("/transcribe", files={"file": f}).status_code == 202

    def page() -> str:
        with httpx2.Client(base_url=service.base_url, trust_env=False) as fresh:
            return fresh.get("/metrics").text

    wait_until(lambda: metric(page(), "http_requests_in_progress") == 1, 30, "the others are over")
    for _ in range(4):
        assert metric(page(), "whisper_jobs_submitted_total") == 6
    children = _children(service.popen("API").pid)
    victim = next(pid for pid in children if "spawn_main" in _command(pid))
    subprocess.run(["kill", "-9", str(victim)], check=True)

    def swept() -> bool:
        try:
            return metric(page(), "http_requests_in_progress") == 1
        except httpx2.TransportError:
            return False

    wait_until(swept, 30, "a dead process is no longer counted")
    assert metric(page(), "whisper_jobs_submitted_total") == 6


def _children(pid: int) -> list[int]:
    return [
        int(child)
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("making a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_507_and_leaves_nothing(small_disk, start, tmp_path):
    """Whether it is seen before or while the upload is written; then the service goes on."""
    service, client = start(data_dir=str(small_disk), min_free_disk_mb="0")
    big = tmp_path / "big.wav"
    big.write_bytes(bytes(range(256)) * 4096 * 40)  # 40 MB

    def in_pieces():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        with big.open("rb") as file:
            while block := file.read(65_536):
                yield block
        yield b"\r\n--x--\r\n"

    kind = {"content-type": "multipart/form-data; boundary=x"}
    with big.open("rb") as file:
        answer = client.http.post("/transcribe", files={"file": file})
    assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
    assert int(answer.headers["retry-after"]) > 0
    answer = client.http.post("/transcribe", content=in_pieces(), headers=kind)
    assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
    assert leftovers(service) == []
    job = client.submit()
    client.wait(job["job_id"])
