"""The row about a long queue: what each endpoint costs when very much waits."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import redis

from bench.pairs import Measured, compare, timed
from bench.stage import Client, Stage
from shared.scripts import has_script_flags, source
from shared.storage import Manifest, Storage

REQUESTS = 300  # of each endpoint in a turn
BATCH = 1000
DAY_MS = 86_400_000


def endpoints(stage: Stage, few: int = 100, many: int = 100_000) -> Measured:
    """Each with so many jobs in Redis, over itself with few: the worst of them."""
    with queue_of(stage, many) as long, queue_of(stage, few) as short:
        rows = [
            compare(
                timed(f"{name}, {many:,} jobs", lambda m=name: repeat(long, m), long.pids),
                timed(f"{few} jobs", lambda m=name: repeat(short, m), short.pids),
                stage.pairs,
            )
            for name in CALLS
        ]
    for row in rows:
        print(f"   {row.ratio:.2f} (CPU {row.cpu_ratio:.2f}) {row.first} / {row.second}")
    return max(rows, key=lambda row: row.ratio)


class Queue:
    """A service without a worker, in which so many jobs wait, and one is done."""

    def __init__(self, client: Client, done: str, waiting: str, content: bytes):
        self.client, self.done, self.waiting, self.content = client, done, waiting, content
        self.http = client._http

    def pids(self) -> list[int]:
        return [self.client.service.popen(name).pid for name in ("Redis", "API")]


@contextmanager
def queue_of(stage: Stage, jobs: int) -> Iterator[Queue]:
    (file,) = stage.clips(1, 1)
    settings = {
        "model_size": "demo",
        "max_queue_seconds": str(10**9),
        "min_free_disk_mb": "0",
        "list_jobs": "true",
        "egress_allow": "127.0.0.1",
    }
    with stage.service(**settings) as client:
        done = client.submit(file, webhook_url="http://127.0.0.1:9/nobody")
        client.text(done)
        client.service.kill("worker", signal.SIGKILL)
        client.service.popen("worker").wait()
        waiting = fill(client, jobs)
        yield Queue(client, done, waiting, file.read_bytes())


def fill(client: Client, jobs: int) -> str:
    """Returns the id of the job in the middle."""
    raw = redis.Redis.from_url(client.service.redis_url, decode_responses=True)
    storage = Storage(client.service.settings.data_dir)
    version = str(raw.info("server")["redis_version"])
    script = raw.script_load(source("submit", has_flags=has_script_flags(version)))
    ids = [str(uuid4()) for _ in range(jobs)]
    for start in range(0, jobs, BATCH):
        pipe = raw.pipeline(transaction=False)
        for job in ids[start : start + BATCH]:
            storage.begin(job)
            identity = Manifest(job, job * 2, job, "{}", "bench", 100_000).identity
            pipe.evalsha(script, 0, *identity, DAY_MS, DAY_MS, "")
        pipe.execute()
    raw.close()
    return ids[jobs // 2]


def submit_and_delete(queue: Queue) -> None:
    new = queue.content + b"note\x10\x00\x00\x00" + uuid4().bytes
    answer = queue.http.post("/transcribe", files={"file": ("a.wav", new)})
    queue.http.delete(answer.raise_for_status().headers["location"].replace("status", "jobs"))


def known(queue: Queue) -> bytes:
    note = queue.client._note.to_bytes(4, "little")
    return queue.content + b"note\x04\x00\x00\x00" + note


def submit_known(queue: Queue) -> None:
    answer = queue.http.post("/transcribe", files={"file": ("a.wav", known(queue))})
    assert answer.json()["status"] == "completed"


def submit_by_digest(queue: Queue) -> None:
    digest = hashlib.sha256(known(queue)).hexdigest()
    answer = queue.http.post("/transcribe/by-digest", json={"sha256": digest})
    assert answer.json()["status"] == "completed"


def batch(queue: Queue) -> None:
    new = [queue.content + b"note\x10\x00\x00\x00" + uuid4().bytes for _ in range(3)]
    answer = queue.http.post("/batches", files=[("file", ("a.wav", each)) for each in new])
    path = answer.raise_for_status().headers["location"]
    queue.http.get(path).raise_for_status()
    queue.http.delete(path).raise_for_status()


CALLS: dict[str, Callable[[Queue], object]] = {
    "POST and DELETE": submit_and_delete,
    "POST of a known file": submit_known,
    "POST by digest": submit_by_digest,
    "a batch": batch,
    "GET /jobs": lambda queue: queue.http.get("/jobs").raise_for_status(),
    "GET /jobs, none found": lambda queue: queue.http.get("/jobs?status=failed"),
    "GET /status, queued": lambda queue: queue.http.get(f"/status/{queue.waiting}"),
    "GET /status, completed": lambda queue: queue.http.get(f"/status/{queue.done}"),
    "GET /result": lambda queue: queue.http.get(f"/result/{queue.done}"),
    "GET /jobs/{id}/partial": lambda queue: queue.http.get(f"/jobs/{queue.waiting}/partial"),
    "GET /jobs/{id}/webhook": lambda queue: queue.http.get(f"/jobs/{queue.done}/webhook"),
    "GET /stats": lambda queue: queue.http.get("/stats"),
    "GET /metrics": lambda queue: queue.http.get("/metrics"),
    "GET /health": lambda queue: queue.http.get("/health"),
    "GET /health/ready": lambda queue: queue.http.get("/health/ready"),
}


def repeat(queue: Queue, name: str) -> None:
    for _ in range(REQUESTS):
        CALLS[name](queue)
