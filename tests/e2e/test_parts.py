"""A long recording in parts: over several workers, through crashes, and beside short ones."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from local.service import Service
from tests.conftest import FOX, FOX_WORDS, wait_until
from tests.e2e.conftest import Client, completed_runs, leftovers, worker_metric
from tests.e2e.test_failures import RECOVERY_SECONDS, SHORT_LEASE, log_of, long_file

REPEATS = 80  # five minutes
OPTIONS = {"temperature": "0", "language": "en"}
Begun = tuple[Service, Client, str]


@pytest.fixture
def begun(start, tmp_path) -> Callable[..., Begun]:
    """A service with a recording of which the first part is done."""

    def begin(workers: int = 1, repeats: int = REPEATS, **environment: str) -> Begun:
        service, client = start(PART_SECONDS="30", WORKER_SLOTS="1", **environment)
        for _ in range(1, workers):
            service.wait_ready(60, service.add_worker())
        job = client.submit(long_file(tmp_path / "long.wav", repeats), **OPTIONS)["job_id"]
        wait_until(lambda: done(service), 90, "a part is done")
        assert client.status(job)["status"] == "processing"
        return service, client, job

    return begin


def done(service: Service) -> int:
    return log_of(service).count('"part_done"')


def planned(service: Service) -> int:
    found = re.search(r'"parts":\s*(\d+)', log_of(service))
    return int(found[1]) if found else 0


def parts_folder(service: Service) -> list[Path]:
    return list((service.settings.data_dir / "parts").glob("*"))


def partial(client: Client, job: str) -> dict[str, Any]:
    return client.http.get(f"/jobs/{job}/partial").json()


def assert_whole(client: Client, job: str) -> None:
    """Every sentence is there once, in order."""
    result = client.http.get(f"/result/{job}").json()
    assert result["text"].split() == FOX_WORDS.split() * REPEATS
    assert [segment["id"] for segment in result["segments"]] == list(range(len(result["segments"])))
    edges = [segment["start"] for segment in result["segments"]]
    assert edges == sorted(edges)


def test_all_workers_share_a_long_recording(begun):
    service, client, job = begun(workers=2)
    seen = [client.status(job)["progress"]]
    # Whichever part is done first, the beginning is what the first parts say.
    beginning = wait_until(lambda: (told := partial(client, job))["text"] and told, 60)
    assert beginning["status"] == "processing"
    assert len(beginning["text"]) < len(FOX_WORDS) * REPEATS

    def is_completed() -> bool:
        status = client.status(job)
        seen.append(status["progress"])
        return bool(status["status"] == "completed")

    wait_until(is_completed, 120, "the recording is done")
    assert seen == sorted(seen)
    assert len(set(seen)) > 2, "it is seen growing"
    assert_whole(client, job)
    whole = partial(client, job)
    assert whole["text"] == client.text(job)
    assert whole["text"].startswith(beginning["text"])
    assert whole["segments"][: len(beginning["segments"])] == beginning["segments"]
    assert client.status(job)["attempts"] == 1
    assert done(service) == planned(service) > 5, "no part ran twice"
    workers = ("worker", "worker-2")

    def runs() -> float:
        return sum(completed_runs(service, worker) for worker in workers)

    wait_until(runs, 30, "its end is counted")
    assert runs() == 1
    busy = [
        worker_metric(service, worker, "whisper_worker_busy_seconds_total") for worker in workers
    ]
    assert min(busy) > sum(busy) / 20, "each did a part at least"
    wait_until(lambda: leftovers(service) == [], 30, "the upload is gone")
    assert parts_folder(service) == []


def test_a_killed_worker_costs_one_part(begun):
    service, client, job = begun(**SHORT_LEASE)
    before = done(service)
    service.kill("worker")
    service.popen("worker").wait(30)
    service.restart("worker")
    client.wait(job, within=RECOVERY_SECONDS + 120)
    assert_whole(client, job)
    assert before <= done(service) <= planned(service) + 1
    assert log_of(service).count('"action": "split"') == 1, "it was not begun anew"


def test_a_lost_part_is_cut_again(begun):
    service, client, job = begun()
    shutil.rmtree(service.settings.data_dir / "parts")
    client.wait(job, within=180)
    assert_whole(client, job)
    assert log_of(service).count('"action": "split"') == 2


def test_a_short_recording_passes_a_long_one(begun):
    _, client, job = begun(repeats=5 * REPEATS)
    short = client.submit(FOX, language="en")["job_id"]
    client.wait(short, within=60)
    assert client.status(job)["status"] == "processing", "the long one still runs"
    assert client.text(short) == FOX_WORDS
