"""The whole service as real processes, and the few calls that the end-to-end tests make."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from local.service import Service
from local.supervisor import StopSignals
from tests.conftest import FOX, PLAIN, wait_until

QUICK = {"lease_seconds": "30", "reap_interval_seconds": "0.5", "drain_seconds": "1"}
"""The lease is for machines that stand still now and then: a test that waits for its end has a
shorter one."""


class Client:
    """The service as its users see it: HTTP and nothing else."""

    def __init__(self, service: Service):
        self.service = service
        self.http = httpx2.Client(base_url=service.base_url, timeout=60, **PLAIN)

    def submit(self, path: Path = FOX, **fields: str) -> dict[str, Any]:
        with path.open("rb") as file:
            answer = self.http.post("/transcribe", files={"file": file}, data=fields)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def status(self, job_id: str) -> dict[str, Any]:
        return self.http.get(f"/status/{job_id}").json()

    def wait(self, job_id: str, status: str = "completed", within: float = 60) -> dict[str, Any]:
        """The job's status once it is the wanted one; fails at once when it ended otherwise."""

        def ask() -> dict[str, Any] | None:
            try:
                seen = self.status(job_id)
            except httpx2.TransportError:
                return None
            ended = seen.get("status") in {"completed", "failed", "cancelled"}
            assert not ended or seen["status"] == status, seen
            return seen if seen.get("status") == status else None

        return wait_until(ask, within, f"job is {status}")

    def text(self, job_id: str) -> str:
        answer = self.http.get(f"/result/{job_id}")
        assert answer.status_code == 200, answer.text
        return str(answer.json()["text"])

    def stats(self) -> dict[str, Any]:
        return self.http.get("/stats").json()


def metric(page: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry these labels."""
    total = 0.0
    for line in page.splitlines():
        match = re.fullmatch(r"(\w+)(?:\{(.*)\})? ([^ ]+)", line)
        if match and match[1] == name:
            found = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            if labels.items() <= found.items():
                total += float(match[3])
    return total


def worker_metric(service: Service, worker: str, name: str, **labels: str) -> float:
    page = httpx2.get(service.worker_url_of(worker) + "/metrics", **PLAIN, timeout=30)
    return metric(page.text, name, **labels)


def completed_runs(service: Service, worker: str = "worker") -> float:
    return worker_metric(service, worker, "whisper_jobs_total", status="completed")


def counted_runs(service: Service) -> float:
    """How many there were until now, when the worker has counted them all."""
    stats = httpx2.get(f"{service.base_url}/stats", **PLAIN).json()
    runs = stats["transcriptions"]["completed"]
    expect_completed_runs(service, runs)
    return float(runs)


def expect_completed_runs(service: Service, number: float, worker: str = "worker") -> None:
    """So many and no more. The store knows of an end a moment before the worker counts it."""
    wait_until(lambda: completed_runs(service, worker) >= number, 30, f"{number} runs are counted")
    assert completed_runs(service, worker) == number


def variant(path: Path, number: int, source: Path = FOX) -> Path:
    """The same sound in other bytes: a WAV with a note at its end."""
    path.write_bytes(source.read_bytes() + b"note\x04\x00\x00\x00" + number.to_bytes(4, "little"))
    return path


def leftovers(service: Service) -> list[str]:
    return [path.name for path in (service.settings.data_dir / "uploads").iterdir()]


def long_ago(service: Service, *jobs: str) -> None:
    """They were submitted before the last minute: what is younger a reaper leaves to its API."""
    for job in jobs:
        folder = service.settings.data_dir / "uploads" / job
        for path in (*folder.iterdir(), folder):
            os.utime(path, (time.time() - 60,) * 2)


@contextmanager
def running(folder: Path, environment: Mapping[str, str]) -> Iterator[Service]:
    """A service that is ready. In the end it is killed: a stop takes seconds, and the tests that
    are about one stop it themselves."""
    stop = StopSignals()
    given = {"TMPDIR": str(folder), **environment}  # what it has no time to remove is pytest's
    with Service.in_folder(folder, given, stop) as service:
        try:
            service.wait_ready(60)
            yield service
        finally:
            stop.is_urgent = True


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for the tests of a module that leave it as they found it."""
    with running(tmp_path_factory.mktemp("service"), QUICK) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    made = Client(service)
    yield made
    made.http.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[Service, Client]]]:
    """Starts services of the test's own, to break."""
    numbers = count()
    with ExitStack() as stack:

        def begin(**environment: str) -> tuple[Service, Client]:
            folder = tmp_path / f"service-{next(numbers)}"
            service = stack.enter_context(running(folder, {**QUICK, **environment}))
            client = Client(service)
            stack.callback(client.http.close)
            return service, client

        yield begin


@pytest.fixture
def raw_of() -> Callable[[Service], redis.Redis]:
    """A plain client of a service's Redis."""
    return lambda service: redis.Redis.from_url(service.redis_url, decode_responses=True)
