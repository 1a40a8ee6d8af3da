"""POST /jobs/{job_id}/retry, on a service with API keys and a worker that can be made to die of
what it transcribes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from local.service import Service
from shared.broker import celery_app
from shared.errors import InputMissing, ServiceError, UnreadableMedia, WorkerLost
from tests.conftest import FOX_WORDS, ROOT, signal, wait_until
from tests.e2e.conftest import QUICK, Client, leftovers, running, variant
from tests.e2e.test_access import Holder, new_key
from tests.receiver import Receiver
from worker.store import WorkerStore

JOBS = 10
SETTINGS = {
    "auth": "keys",
    "worker_slots": str(JOBS),
    "max_attempts": "1",
    "lease_seconds": "5",
    "egress_allow": "127.0.0.1",
}

DEADLY_MODEL = """
import os, signal, sys, time

if sys.orig_argv[-2:] == ["-m", "worker"]:
    import ctranslate2

    generate = ctranslate2.models.Whisper.generate
    here = os.path.dirname(__file__)

    def deadly(self, *args, **options):
        while os.path.exists(f"{here}/wait"):
            time.sleep(0.01)
        if os.path.exists(f"{here}/die"):
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(self, *args, **options)

    ctranslate2.models.Whisper.generate = deadly
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its files `wait` and `die` say what the model does."""
    folder = tmp_path_factory.mktemp("retry")
    (folder / "sitecustomize.py").write_text(DEADLY_MODEL)
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    settings = {**QUICK, **SETTINGS, "PYTHONPATH": f"{folder}:{ROOT}"}
    with running(folder / "service", settings) as service:
        yield service


@pytest.fixture(scope="module")
def user(service: Service) -> Iterator[Holder]:
    with holder(service, "user") as user:
        yield user


@pytest.fixture(scope="module")
def operator(service: Service) -> Iterator[Holder]:
    with holder(service, "operator", "--scopes", "admin") as operator:
        yield operator


@contextmanager
def holder(service: Service, name: str, *words: str) -> Iterator[Holder]:
    made = Holder(service, new_key(service, name, *words))
    yield made
    made.http.close()


def retryable(service: Service, *words: str) -> list[list[str]]:
    """As an operator lists them."""
    done = subprocess.run(
        [sys.executable, "-m", "api.failed", *words],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "REDIS_URL": service.redis_url,
            "DATA_DIR": str(service.settings.data_dir),
        },
        cwd=service.settings.data_dir,  # no .env here
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return [line.split() for line in done.stdout.splitlines()]


def test_ten_dead_jobs_are_done_after_their_cause_is_mended_and_a_retry_each(
    service, user, operator, folder, tmp_path
):
    """Files that killed their worker: transcribed without being sent again, and their webhooks are
    told of that; the log says who did it."""
    (folder / "wait").touch()
    (folder / "die").touch()
    with Receiver() as receiver:
        jobs = [
            user.submit(variant(tmp_path / f"{n}.wav", n), webhook_url=receiver.url())["job_id"]
            for n in range(JOBS)
        ]
        for job in jobs:
            user.wait(job, "processing")
        (folder / "wait").unlink()
        assert service.popen("worker").wait(30) == -signal.SIGKILL
        (folder / "die").unlink()
        service.restart("worker")
        for job in jobs:
            seen = user.wait(job, "failed")
            assert (seen["error"]["code"], seen["attempts"]) == ("worker_lost", 1)
        wait_until(lambda: len(receiver.received) == JOBS, 30, "their ends are told")

        listed = retryable(service)
        assert sorted(line[0] for line in listed) == sorted(jobs)
        assert {(line[1], line[3]) for line in listed} == {("worker_lost", "user")}
        for job in jobs:
            answer = operator.http.post(f"/jobs/{job}/retry")
            assert answer.status_code == 202, answer.text
            assert answer.headers["location"] == f"/status/{job}"
            seen = answer.json()
            assert (seen["job_id"], seen["error"]) == (job, None)
            assert seen["attempts"] <= 1, "a worker may have begun already"
        for job in jobs:
            assert user.wait(job)["attempts"] == 1
            assert user.text(job) == FOX_WORDS
        wait_until(lambda: len(receiver.received) == 2 * JOBS, 30, "their new ends are told")
        told: dict[str, list[tuple[str, str]]] = {job: [] for job in jobs}
        for request in receiver.received:
            event = json.loads(request.body)
            told[event["data"]["job_id"]].append((event["type"], request.headers["webhook-id"]))
    for events in told.values():
        (first, first_id), (second, second_id) = events
        assert (first, second) == ("transcription.failed", "transcription.completed")
        assert first_id != second_id
    log = (folder / "service" / "service.log").read_text().splitlines()
    audit = [json.loads(line) for line in log if '"job_retried"' in line]
    assert sorted(line["job_id"] for line in audit) == sorted(jobs)
    assert {(line["logger"], line["caller"], line["error_code"]) for line in audit} == {
        ("audit", "operator", "worker_lost")
    }


@pytest.fixture
def failed(service, user, tmp_path):
    """Makes jobs that failed: the worker sleeps, and the test says in its place how they ended."""
    service.kill("worker", signal.SIGSTOP)
    store = WorkerStore(service.settings, celery_app(service.redis_url), "in-its-place")
    numbers = iter(range(100, 1000))

    def make(error: ServiceError | None) -> str:
        path = variant(tmp_path / "a.wav", next(numbers))
        job_id = str(user.submit(path)["job_id"])
        if error:
            claim = store.claim()
            assert claim
            assert store.fail(claim, error) == [job_id]
        return job_id

    yield make
    for job_id in leftovers(service):
        user.http.delete(f"/jobs/{job_id}")
    store.close()
    service.kill("worker", signal.SIGCONT)


def test_what_can_not_be_retried_says_why(service, user, failed):
    """And to whom it does not belong, nothing."""
    errors = (UnreadableMedia(), InputMissing(), WorkerLost(), WorkerLost(), None)
    of_file, without_upload, missing, fine, waits = map(failed, errors)
    shutil.rmtree(service.settings.data_dir / "uploads" / missing)
    for job_id, status, code in [
        (waits, 409, "job_not_failed"),
        (of_file, 409, "retry_in_vain"),
        (without_upload, 410, "upload_gone"),
        (missing, 410, "upload_gone"),
        ("none", 404, "job_not_found"),
    ]:
        answer = user.http.post(f"/jobs/{job_id}/retry")
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    with (
        holder(service, "stranger") as stranger,
        holder(service, "user", "--another", "--scopes", "read") as reader,
    ):
        assert stranger.http.post(f"/jobs/{fine}/retry").status_code == 404
        assert reader.http.post(f"/jobs/{fine}/retry").status_code == 403
    assert user.status(fine)["status"] == "failed"
    assert [line[0] for line in retryable(service, "--code", "worker_lost")] == [fine]
    assert user.http.post(f"/jobs/{fine}/retry").status_code == 202
    assert user.http.post(f"/jobs/{fine}/retry").json()["code"] == "job_not_failed"


def test_an_event_stream_that_had_ended_goes_on_after_a_retry(user, failed):
    path = f"/jobs/{(job_id := failed(WorkerLost()))}/events"
    after = {"Last-Event-ID": "failed-0-0-0"}
    assert user.http.get(path, headers=after).status_code == 204
    user.http.post(f"/jobs/{job_id}/retry").raise_for_status()
    with user.http.stream("GET", path, headers=after) as stream:
        assert next(line for line in stream.iter_lines() if "event:" in line) == "event: queued"


def test_a_retry_and_an_erasure_at_once_leave_no_job_without_its_upload(
    user, failed: Callable[[ServiceError | None], str]
):
    """Whichever comes first: the job is gone, or was cancelled, and nothing of it is left."""
    uploads = user.service.settings.data_dir / "uploads"
    with ThreadPoolExecutor(2) as pool, Client(user.service).http as other:
        other.headers.update(user.http.headers)
        for _ in range(30):
            job_id = failed(WorkerLost())
            erasure = pool.submit(user.http.delete, f"/jobs/{job_id}")
            retry = pool.submit(other.post, f"/jobs/{job_id}/retry")
            assert erasure.result().status_code == 200, erasure.result().text
            assert retry.result().status_code in {202, 404, 409, 410}, retry.result().text
            assert user.status(job_id)["status"] in {"cancelled", 404}
            assert not (uploads / job_id / "audio").exists()
