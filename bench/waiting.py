"""The rows about very many clients that wait for jobs at one API process."""

from __future__ import annotations

import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import httpx2
import redis

from api.__main__ import raise_file_limit
from bench.pairs import Arm, Measured, Spent, compare
from bench.stage import Client, Stage
from local.ports import free_port
from local.service import ROOT, answers
from shared.schemas import Segment, Transcript
from shared.scripts import has_script_flags, source
from shared.storage import Manifest

WAITERS = 5000
BATCH = 100  # jobs that end in one round trip
DAY_MS = 86_400_000
DEADLINE_SECONDS = 60.0
WORDS = Segment(
    id=0,
    start=0,
    end=3,
    text=" the quick brown fox jumps over the lazy dog",
    avg_logprob=-0.1,
    compression_ratio=1,
    no_speech_prob=0,
    temperature=0,
)
TRANSCRIPT = Transcript(
    text=WORDS.text,
    language="en",
    language_probability=1,
    duration=3,
    duration_after_vad=3,
    segments=[WORDS],
    task="transcribe",
    model="demo",
    processing_seconds=0.2,
).model_dump_json(exclude_none=True)


class Crowd:
    """Clients that each ask once, and hear of an end in the end."""

    def __init__(self, address: tuple[str, int], paths: Sequence[str]):
        self._selector = selectors.DefaultSelector()
        self.begun: set[int] = set()  # have had some of their answer
        self.heard: dict[int, float] = {}  # of the end, and when
        for number, path in enumerate(paths):
            one = socket.create_connection(address, DEADLINE_SECONDS)
            one.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
            self._selector.register(one, selectors.EVENT_READ, (number, bytearray()))
            self.listen(0)

    def listen(self, seconds: float) -> None:
        """Reads what is there, or comes within so long."""
        for key, _ in self._selector.select(seconds):
            (number, seen), one = key.data, key.fileobj
            assert isinstance(one, socket.socket)
            content = one.recv(65536)
            assert content, f"client {number} was left after {seen!r}"
            seen += content
            assert seen.startswith(b"HTTP/1.1 200"), seen
            self.begun.add(number)
            if b"completed" in seen:
                self.heard[number] = time.perf_counter()
                self._selector.unregister(one)
                one.close()

    def listen_until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.perf_counter() + DEADLINE_SECONDS
        while not is_so():
            assert time.perf_counter() < deadline, "they wait for ever"
            self.listen(0.05)


@dataclass(frozen=True)
class Server:
    """Something to wait at."""

    pid: int
    url: str
    begin: Callable[[], Sequence[str]]  # what is waited for; returns a path for each waiter
    waiters: Callable[[], int]
    end: Callable[[], Sequence[float]]  # ends it; returns when that was, for each waiter

    @property
    def kilobytes(self) -> int:
        """Resident memory of the process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])


def turn(server: Server) -> tuple[float, float]:
    """(KB that each waiter takes, seconds until the last one has heard). The former is of use once:
    a process keeps much of the memory that it had."""
    raise_file_limit()
    address = urlsplit(server.url)
    paths, before = server.begin(), server.kilobytes
    crowd = Crowd((str(address.hostname), int(address.port or 80)), paths)
    crowd.listen_until(lambda: server.waiters() == len(paths))
    each = (server.kilobytes - before) / len(paths)
    ends = server.end()
    crowd.listen_until(lambda: len(crowd.heard) == len(paths))
    return each, max(crowd.heard[number] - end for number, end in enumerate(ends))


@dataclass(frozen=True)
class Kind:
    name: str
    path: str
    bare_path: str
    jobs: int


KINDS = [
    Kind(f"{name}, {jobs:,} job{'s' * (jobs > 1)}", path, bare_path, jobs)
    for jobs in (WAITERS, 1)
    for name, path, bare_path in (
        ("event streams", "/jobs/{job}/events", "/events"),
        ("long polls", "/status/{job}?wait=60", "/status"),
    )
]


@contextmanager
def service(stage: Stage, kind: Kind) -> Iterator[Server]:
    """One API process of the service. A worker has claimed what is waited for."""
    with stage.service(model_size="demo", min_free_disk_mb="0", log_level="WARNING") as client:
        client.service.kill("worker", signal.SIGKILL)
        client.service.popen("worker").wait()
        url, store = client.service.base_url, Store(client)
        each = WAITERS // kind.jobs
        ids = store.claimed(1)
        store.end(ids)
        for _ in range(100):  # warm up
            get(url + kind.path.format(job=ids[0]))

        def begin() -> list[str]:
            ids[:] = store.claimed(kind.jobs)
            return [kind.path.format(job=job) for job in ids] * each

        def waiters() -> int:
            found = re.findall(r"^whisper_waiters{.*} (.+)$", get(url + "/metrics"), re.MULTILINE)
            return int(sum(map(float, found)))

        pid = client.service.popen("API").pid
        yield Server(pid, url, begin, waiters, lambda: store.end(ids) * each)


@contextmanager
def bare(kind: Kind) -> Iterator[Server]:
    """bench/bare.py."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([sys.executable, "-m", "bench.bare", str(port)], cwd=ROOT) as popen:

        def end() -> list[float]:
            now = time.perf_counter()
            get(url + "/end")
            return [now] * WAITERS

        try:
            while not answers(url + "/end"):
                time.sleep(0.05)
            yield Server(
                popen.pid,
                url,
                lambda: [kind.bare_path] * WAITERS,
                lambda: int(get(url + "/count")),
                end,
            )
        finally:
            popen.terminate()


def get(url: str) -> str:
    return httpx2.get(url, trust_env=False, timeout=60).raise_for_status().text


class Store:
    """The job store, written to as fast as no worker could."""

    def __init__(self, client: Client):
        self._redis = redis.Redis.from_url(client.service.redis_url, decode_responses=True)
        self._model = client.service.settings.model_key
        has_flags = has_script_flags(str(self._redis.info("server")["redis_version"]))
        self._scripts = {
            verb: self._redis.script_load(source(verb, has_flags=has_flags))
            for verb in ("submit", "claim", "finish")
        }

    def claimed(self, number: int) -> list[str]:
        """Ids of new jobs; each is the fingerprint of its transcription, and its claim, too."""
        ids = [str(uuid4()) for _ in range(number)]
        for job in ids:
            manifest = Manifest(job, job, job, "{}", self._model, 100_000)
            self._run("submit", *manifest.identity, DAY_MS, DAY_MS, "")
            self._run("claim", job, "bench", DAY_MS, 0, 0)
        return ids

    def end(self, ids: Sequence[str]) -> list[float]:
        """When each was committed."""
        ends: list[float] = []
        about = ("completed", TRANSCRIPT, self._model, "3.0", "", "", DAY_MS, DAY_MS)
        for start in range(0, len(ids), BATCH):
            pipe = self._redis.pipeline(transaction=False)
            for job in ids[start : start + BATCH]:
                pipe.evalsha(self._scripts["finish"], 0, job, job, *about)
            replies = pipe.execute()
            assert all(reply[0] == "ok" for reply in replies)
            ends += [time.perf_counter()] * len(replies)
        return ends

    def _run(self, verb: str, *args: str | int) -> None:
        self._redis.evalsha(self._scripts[verb], 0, *args)


def memory(stage: Stage) -> Measured:
    """Of each waiter at the service, over each at a bare ASGI application; the worst kind."""

    def each(of: AbstractContextManager[Server]) -> Spent:
        with of as server:
            return Spent(turn(server)[0])

    return worst(
        Measured(
            kind.name,
            f"bare {kind.bare_path}",
            each(service(stage, kind)),
            each(bare(kind)),
            1,
            "KB",
        )
        for kind in KINDS
    )


def notifying(stage: Stage) -> Measured:
    """Until the last waiter has heard of the end that it waits for, over the same at a bare ASGI
    application, where one event ends all; the worst kind."""

    def arm(name: str, server: Server) -> Arm:
        return Arm(name, lambda: Spent(turn(server)[1]))

    def of(kind: Kind) -> Measured:
        with service(stage, kind) as ours, bare(kind) as theirs:
            arms = arm(kind.name, ours), arm(f"bare {kind.bare_path}", theirs)
            return compare(*arms, stage.pairs)

    return worst(of(kind) for kind in KINDS)


def worst(kinds: Iterable[Measured]) -> Measured:
    rows = []
    for row in kinds:
        print(
            f"   {row.ratio:.2f}: {row.first}, {row.first_spent.value:.2f} {row.unit}"
            f" / {row.second}, {row.second_spent.value:.2f} {row.unit}",
            flush=True,
        )
        rows.append(row)
    return max(rows, key=lambda row: row.first_spent.value)
