"""A rolling restart of everything under load: no request fails and no job is lost. A real nginx
before two real API replicas, with Redis and workers behind them."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, Self

import httpx2
import pytest

from example_client import WhisperClient
from local.ports import free_port
from local.service import Service, answers
from tests.conftest import FOX_WORDS, wait_until
from tests.deploy.nginx import Nginx, Resolver
from tests.e2e.conftest import Client, variant
from tests.e2e.streams import ENDS, Event, Hand, Stream, segments

ADDRESSES = ("127.0.0.2", "127.0.0.3")
TURNS = int(os.environ.get("DRAIN_TURNS", "6"))
LARGE_BYTES = 3_000_000


@contextmanager
def replicas(folder: Path, **environment: str) -> Iterator[Service]:
    """Two API replicas (`API`, `API-2`) on one port of two addresses, and a worker."""
    given = {"host": ADDRESSES[0], "port": str(free_port()), "lease_seconds": "5", **environment}
    with Service.in_folder(folder, {**given, "reap_interval_seconds": "0.5"}) as service:
        first = service.supervisor.processes["API"].spec
        url = f"http://{ADDRESSES[1]}:{service.settings.port}/health/ready"
        second = {**first.env, "HOST": ADDRESSES[1]}
        service.supervisor.add(replace(first, name="API-2", env=second, ready=lambda: answers(url)))
        service.wait_ready(60)
        yield service


@dataclass
class Users:
    """Send small and large files and read, without a pause, each with connections of its own.
    `failures`: every answer that was not as it should be. `jobs`: every id of a 202."""

    url: str
    folder: Path
    count: int = 4
    requests: int = 0
    jobs: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._use, args=(n,)) for n in range(self.count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int) -> None:
        goal = len(self.jobs) + more
        wait_until(lambda: len(self.jobs) >= goal, 30, f"{more} more uploads: {self.failures}")

    def _use(self, user: int) -> None:
        new = variant(self.folder / f"{user}.wav", user).read_bytes()
        small, large = new, new + b"note" + LARGE_BYTES.to_bytes(4, "little") + bytes(LARGE_BYTES)
        job = None
        with httpx2.Client(base_url=self.url, timeout=60, trust_env=False) as http:
            while not self._stopping.is_set():
                content = large if self.requests % 8 == 0 else small
                accepted = self._ask(http, "POST", "/transcribe", files={"file": content})
                job = accepted["job_id"] if accepted else job
                if job:
                    self._ask(http, "GET", f"/status/{job}")
                if accepted:
                    self.jobs.append(accepted["job_id"])

    def _ask(self, http: httpx2.Client, method: str, path: str, **more: Any) -> dict | None:
        self.requests += 1
        try:
            answer = http.request(method, path, **more)
        except httpx2.TransportError as exc:
            self.failures.append(f"{method} {path}: {exc!r}")
            return None
        if not answer.is_success:
            self.failures.append(f"{method} {path}: {answer.status_code} {answer.text}")
            return None
        return answer.json()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("processes", "turns"), [(1, 3), (2, 1)])
def test_a_rolling_restart_fails_no_request_and_loses_no_job(processes, turns, tmp_path):
    """Each API replica in turn, the worker among them, and nginx reads its files again."""
    with (
        replicas(tmp_path / "service", workers=str(processes)) as service,
        Resolver(*ADDRESSES) as names,
        Nginx(
            tmp_path / "nginx",
            NGINX_API=f"api:{service.settings.port}",
            NGINX_RESOLVER=names.resolver,
            NGINX_LIMITS="off",
        ) as nginx,
    ):
        wait_until(lambda: answers(nginx.url + "/health/ready"), 30, "nginx knows the replicas")
        with Users(nginx.url, tmp_path) as users:
            for turn in range(int(os.environ.get("DRAIN_TURNS", turns))):
                users.wait_for(5)
                name = ("API", "API-2")[turn % 2]
                service.restart(name)
                service.wait_ready(30, name)
                nginx.process.send_signal(signal.SIGHUP)
                if turn == 0:
                    service.restart("worker")
            users.wait_for(5)
        print(f"\n{users.requests} requests, {len(users.jobs)} uploads, {users.failures}")
        assert users.failures == []
        with httpx2.Client(base_url=nginx.url, timeout=30, trust_env=False) as http:

            def ended() -> bool:
                return http.get("/stats").json()["jobs"]["completed"] == len(users.jobs)

            wait_until(ended, 60, "every job that was accepted is done")
            texts = {http.get(f"/result/{job}").json()["text"].strip() for job in users.jobs[-20:]}
        assert texts == {FOX_WORDS}


@dataclass
class Follower:
    """Follows a job's events as a browser does: whenever the stream ends, it comes back with the id
    of the last event. `failures`: every answer and every end that was not as it should be."""

    client: Client
    job: str
    events: list[Event] = field(default_factory=list)
    streams: int = 0
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)

    def _follow(self) -> None:
        while not self.events or self.events[-1].name not in ENDS:
            self.streams += 1
            with Stream(self.client, self.job, self.events[-1].id if self.events else "") as stream:
                if stream.answer.status_code != 200:
                    self.failures.append(stream.answer.read().decode())
                    return
                wait_until(lambda s=stream: s.is_over or s.error, 60)
                self.events += stream.events
                if stream.error:
                    self.failures.append(repr(stream.error))


@pytest.mark.timeout(120)
def test_who_waits_misses_nothing_of_a_rolling_restart(tmp_path):
    """Streams end and are taken up at another replica, segment by segment; long polls go on."""
    with (
        replicas(tmp_path / "service", lease_seconds="600") as service,
        Resolver(*ADDRESSES) as names,
        Nginx(
            tmp_path / "nginx",
            NGINX_API=f"api:{service.settings.port}",
            NGINX_RESOLVER=names.resolver,
        ) as nginx,
    ):
        wait_until(lambda: answers(nginx.url + "/health/ready"), 30, "nginx knows the replicas")
        hand = Hand(service, tmp_path)
        hand.client.http.base_url = nginx.url
        job, whole = hand.begin()
        hand.store.split(whole, '{"duration":9}', [0.25] * 4)
        with ExitStack() as waiting, ThreadPoolExecutor(1) as pool:
            followers = [waiting.enter_context(Follower(hand.client, job)) for _ in range(8)]
            client = waiting.enter_context(WhisperClient(nginx.url))
            wait = pool.submit(client.wait, job, deadline=60)
            for number, name in enumerate(("API", "API-2", "API", "API-2")):
                hand.finish_part(hand.claim(), [f"{number} a", f"{number} b"])
                service.restart(name)
                service.wait_ready(30, name)
            texts = [f"{number} {letter}" for number in range(4) for letter in "ab"]
            hand.complete(hand.claim(), segments(texts))
            assert wait.result(30)["status"] == "completed"
        for follower in followers:
            assert follower.failures == []
            assert follower.streams > 1, "its replica was restarted"
            told = [event.data for event in follower.events if event.name == "segment"]
            assert [segment["id"] for segment in told] == list(range(8))
            assert [segment["text"] for segment in told] == texts
            assert follower.events[-1].name == "completed"
        hand.close()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_who_is_connected_when_the_api_is_told_to_stop_is_still_served(processes, tmp_path):
    """Also when the request comes after the signal; the next one goes to another replica."""
    with Service.in_folder(tmp_path, {"workers": processes}) as service, ExitStack() as open_ones:
        wait_until(lambda: answers(service.base_url + "/health/ready"), 30, "the API is there")
        address = (service.settings.host, service.settings.port)
        clients = [
            open_ones.enter_context(socket.create_connection(address, 10)) for _ in range(50)
        ]
        service.kill("API", signal.SIGTERM)
        wait_until(lambda: is_refused(address), 30, "nobody else gets in")
        for client in clients:
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        for client in clients:
            with HTTPResponse(client) as answer:
                answer.begin()
                assert answer.status == 200
        wait_until(lambda: service.popen("API").poll() is not None, 20, "it ends")


def is_refused(address: tuple[str, int]) -> bool:
    """Does the port say no, and not nothing at all?"""
    try:
        socket.create_connection(address, 0.1).close()
    except (ConnectionRefusedError, TimeoutError) as exc:
        return isinstance(exc, ConnectionRefusedError)
    return False
