"""Many files in one request, and lists of jobs, as a caller meets them."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from local.service import Service
from shared import keys
from tests.conftest import FOX, FOX_WORDS, wait_until
from tests.e2e.conftest import (
    QUICK,
    Client,
    counted_runs,
    expect_completed_runs,
    leftovers,
    long_ago,
    running,
    variant,
)
from tests.e2e.test_api import problem

NOTE = b"note\x04\x00\x00\x00"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    settings = {**QUICK, "list_jobs": "true", "max_file_size_mb": "1", "workers": "2"}
    with running(folder, settings) as service:
        yield service


def sound(number: int) -> bytes:
    """A recording that no other test has."""
    return FOX.read_bytes() + NOTE + uuid4().bytes[:3] + bytes([number])


def send(client: Client, *contents: bytes, key: str = "", **fields: str) -> httpx2.Response:
    files = [("file", (f"{n}.wav", content)) for n, content in enumerate(contents)]
    headers = {"Idempotency-Key": key} if key else {}
    return client.http.post("/batches", files=files, data=fields, headers=headers)


def batch_of(client: Client, *contents: bytes, **fields: str) -> dict[str, Any]:
    answer = send(client, *contents, **fields)
    assert answer.status_code == 202, answer.text
    return answer.json()


def done(client: Client, batch_id: str) -> dict[str, Any]:
    def ask() -> dict[str, Any] | None:
        seen = client.http.get(f"/batches/{batch_id}").json()
        return seen if seen["is_done"] else None

    return wait_until(ask, 60, "the batch is done")


@contextmanager
def frozen(service: Service) -> Iterator[None]:
    """Nothing is claimed meanwhile."""
    service.kill("worker", signal.SIGSTOP)
    try:
        yield
    finally:
        service.kill("worker", signal.SIGCONT)


def listed(client: Client, **asked: str) -> list[dict[str, Any]]:
    """All jobs of a list, from all of its pages."""
    found, cursor = [], ""
    while True:
        page = client.http.get("/jobs", params={**asked, "cursor": cursor}).json()
        found += page["jobs"]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def test_every_file_of_a_batch_becomes_a_job_with_the_fields_of_the_form(client):
    contents = [sound(n) for n in range(4)]
    batch = batch_of(client, *contents, metadata='{"order":17}', priority="low", language="en")
    assert (batch["accepted"], batch["refused"]) == (4, 0)
    assert [each["file"] for each in batch["jobs"]] == [0, 1, 2, 3]
    seen = done(client, batch["batch_id"])
    assert seen["counts"] == {
        "queued": 0,
        "processing": 0,
        "completed": 4,
        "failed": 0,
        "cancelled": 0,
    }
    ids = [each["job"]["job_id"] for each in batch["jobs"]]
    assert [job["job_id"] for job in seen["jobs"]] == ids, "in the order of the files"
    for job, job_id in zip(seen["jobs"], ids, strict=True):
        assert job == client.status(job_id)
        assert job["batch_id"] == batch["batch_id"]
        assert (job["metadata"], job["priority"]) == ({"order": 17}, "low")
        assert client.text(job_id) == FOX_WORDS
    assert client.http.get(batch["links"]["jobs"]).json()["jobs"] == seen["jobs"][::-1]


def test_a_bad_file_spoils_no_other(service, client):
    """Each has its own error, as it would alone; what only decoding shows is the job's."""
    sent = [sound(0), b"", b"hello\n" * 500, b"\0" * (1024 * 1024 + 1), b"\0" * 5000, sound(1)]
    answer = send(client, *sent)
    batch = answer.json()
    assert (answer.status_code, batch["accepted"], batch["refused"]) == (202, 3, 3)
    codes = [each["error"] and each["error"]["code"] for each in batch["jobs"]]
    assert codes == [None, "empty_file", "unsupported_media", "file_too_large", None, None]
    assert all((each["job"] is None) != (each["error"] is None) for each in batch["jobs"])
    counts = done(client, batch["batch_id"])["counts"]
    assert (counts["completed"], counts["failed"]) == (2, 1)
    wait_until(lambda: leftovers(service) == [], 30, "nothing of the refused is left")


def test_a_batch_without_a_good_file_is_an_error_and_leaves_nothing(service, client):
    assert problem(send(client, b"", b"hello\n" * 500)) == (422, "empty_file")
    assert problem(send(client, b"hello\n" * 500)) == (415, "unsupported_media")
    wait_until(lambda: leftovers(service) == [])


def test_a_batch_that_is_wrong_as_a_whole_submits_nothing(service, client, raw_of):
    """Whatever is wrong, and wherever in the body it stands."""
    before = client.stats()["jobs"]["submitted"]
    good = [sound(n) for n in range(3)]
    big = b"\0" * (1024 * 1024)
    refused = {
        "too many": (send(client, *[b"\0"] * 1000), (422, "invalid_field")),
        "too much": (send(client, *[big] * 9), (413, "batch_too_large")),
        "no file": (client.http.post("/batches", data={"language": "en"}, files={}), None),
        "wrong field": (send(client, *good, beam_size="99"), (422, "invalid_field")),
        "wrong metadata": (send(client, *good, metadata="[" * 9000), (422, "invalid_field")),
        "unknown field": (send(client, *good, langauge="en"), (422, "invalid_field")),
        "wrong key": (send(client, *good, key="x" * 256), (422, "invalid_field")),
    }
    for what, (answer, expected) in refused.items():
        assert problem(answer) == (expected or (400, "malformed_upload")), what
    announced = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(10**9)}
    with service_socket(service, "/batches", announced) as answer:
        assert b" 413 " in answer
    assert client.stats()["jobs"]["submitted"] == before
    wait_until(lambda: leftovers(service) == [], 30, "nothing is left on disk")


@contextmanager
def service_socket(service: Service, path: str, headers: dict[str, str]) -> Iterator[bytes]:
    """The first line of the answer to a request whose body never comes."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", *(f"{k}: {v}" for k, v in headers.items())]
    with socket.create_connection(("127.0.0.1", service.settings.port), timeout=10) as line:
        line.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        yield line.recv(1000)


def test_a_broken_batch_submits_nothing(service, client):
    """The connection ends in the middle of the last file."""
    before = client.stats()["jobs"]["submitted"]

    def body() -> Iterator[bytes]:
        for n in range(3):
            head = f'--x\r\nContent-Disposition: form-data; name="file"; filename="{n}"\r\n\r\n'
            yield head.encode() + sound(n) + b"\r\n"
        raise OSError("the line is cut")

    with pytest.raises(OSError, match="cut"):
        client.http.post(
            "/batches",
            content=body(),
            headers={"Content-Type": "multipart/form-data; boundary=x"},
        )
    wait_until(lambda: leftovers(service) == [], 30, "nothing stays")
    assert client.stats()["jobs"]["submitted"] == before


def test_deleting_a_batch_cancels_and_erases_all_of_it(service, client, raw_of):
    """Twice: what was cancelled is erased then. No trace of it is left in Redis or on disk."""
    finished = batch_of(client, sound(0))
    done(client, finished["batch_id"])
    assert client.http.delete(finished["links"]["cancel"]).json()["jobs"][0]["status"] == "deleted"
    with frozen(service):
        secret = f"prompt-{uuid4().hex}"
        batch = batch_of(client, sound(1), sound(2), initial_prompt=secret, metadata='{"a":1}')
        ids = [each["job"]["job_id"] for each in batch["jobs"]]
        path = batch["links"]["cancel"]
        assert [job["status"] for job in client.http.delete(path).json()["jobs"]] == [
            "cancelled",
            "cancelled",
        ]
        assert client.http.get(path).json()["counts"]["cancelled"] == 2
        assert [job["status"] for job in client.http.delete(path).json()["jobs"]] == [
            "deleted",
            "deleted",
        ]
    for method in ("GET", "DELETE"):
        assert problem(client.http.request(method, path)) == (404, "batch_not_found")
    everything = json.dumps(dump(raw_of(service)))
    for trace in (*ids, batch["batch_id"], secret):
        assert trace not in everything
    wait_until(lambda: leftovers(service) == [], 30, "nothing is left on disk")


def dump(raw: Any) -> dict[str, Any]:
    """All that Redis holds."""
    read: dict[str, Callable[[str], Any]] = {
        "string": raw.get,
        "hash": raw.hgetall,
        "set": lambda key: sorted(raw.smembers(key)),
        "zset": lambda key: raw.zrange(key, 0, -1),
        "list": lambda key: raw.lrange(key, 0, -1),
    }
    kinds = {key: raw.type(key) for key in raw.keys("*")}
    return {key: read[kind](key) for key, kind in kinds.items() if kind != "none"}  # just ended


def test_a_batch_comes_back_when_redis_has_lost_everything(start, raw_of, tmp_path):
    """With its id, its order and its metadata."""
    service, client = start()
    service.kill("worker")
    batch = batch_of(client, sound(0), sound(1), metadata='{"n":1}')
    raw_of(service).flushall()
    long_ago(service, *(each["job"]["job_id"] for each in batch["jobs"]))
    service.restart("worker")

    def is_back() -> bool:
        seen = client.http.get(f"/batches/{batch['batch_id']}").json()
        return len(seen.get("jobs", [])) == 2 and bool(seen["is_done"])

    wait_until(is_back, 90, "the batch is back and done")
    seen = client.http.get(f"/batches/{batch['batch_id']}").json()
    assert [job["job_id"] for job in seen["jobs"]] == [
        each["job"]["job_id"] for each in batch["jobs"]
    ]
    assert [job["metadata"] for job in seen["jobs"]] == [{"n": 1}] * 2


def test_the_memory_of_the_api_stays_flat_while_a_batch_arrives(start, tmp_path):
    """Eight files of 30 MB, of which no more than one write is held."""
    service, client = start(max_file_size_mb="30")

    def peak() -> int:
        status = Path(f"/proc/{service.popen('API').pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    batch_of(client, sound(0))
    before = peak()
    large = tmp_path / "large"
    large.write_bytes(FOX.read_bytes() + b"data" * (29 * 1024 * 1024 // 4))
    with frozen(service):
        with ExitStack() as opened:
            files = [opened.enter_context(large.open("rb")) for _ in range(8)]
            form = [("file", (f"{n}.wav", file)) for n, file in enumerate(files)]
            answer = client.http.post("/batches", files=form)
        assert answer.json()["accepted"] == 8, answer.text
        client.http.delete(answer.json()["links"]["cancel"])
    assert peak() - before < 40 * 1024 * 1024


def test_a_batch_that_is_sent_again_with_its_key_is_the_same_batch(service, client):
    """Also by two clients at the same time, and where only some of it had been accepted."""
    runs = counted_runs(service)
    contents, key = [sound(0), b"hello\n" * 500, sound(1)], uuid4().hex
    first, again = (send(client, *contents, key=key) for _ in range(2))
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert first.json()["batch_id"] == again.json()["batch_id"]
    ids = [
        [each["job"] and each["job"]["job_id"] for each in answer.json()["jobs"]]
        for answer in (first, again)
    ]
    assert ids[0] == ids[1]
    done(client, first.json()["batch_id"])
    expect_completed_runs(service, runs + 2)
    assert problem(send(client, sound(0), key=key)) == (409, "idempotency_conflict")
    wait_until(lambda: leftovers(service) == [])


# --- Lists ----------------------------------------------------------------------------------------


def test_the_newest_jobs_come_first_page_by_page(client, tmp_path):
    jobs = [client.submit(variant(tmp_path / f"{n}.wav", 800 + n))["job_id"] for n in range(5)]
    client.wait(jobs[-1])
    first = client.http.get("/jobs", params={"limit": 2}).json()
    assert [job["job_id"] for job in first["jobs"]] == jobs[:2:-1]
    second = client.http.get("/jobs", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [job["job_id"] for job in second["jobs"]] == jobs[2::-1]
    everything = listed(client)
    assert [job["job_id"] for job in everything[:5]] == jobs[::-1]
    assert everything[-1]["job_id"] == listed(client, limit="7")[-1]["job_id"]


def test_a_list_by_status_has_those_alone(service, client, tmp_path):
    with frozen(service):
        waiting = client.submit(variant(tmp_path / "a.wav", 810))["job_id"]
        gone = client.submit(variant(tmp_path / "b.wav", 811))["job_id"]
        client.http.post(f"/jobs/{gone}/cancel").raise_for_status()
        queued = listed(client, status="queued")
        assert [job["job_id"] for job in queued] == [waiting]
        assert queued[0]["queue_position"] == 1
        assert gone in [job["job_id"] for job in listed(client, status="cancelled")]
    client.wait(waiting)
    assert listed(client, status="queued") == []
    assert {job["status"] for job in listed(client, status="completed")} == {"completed"}


@pytest.mark.parametrize(
    "asked",
    [
        {"cursor": "x"},
        {"cursor": "-1"},
        {"cursor": "1e9"},
        {"cursor": "9" * 18},
        {"cursor": "1 2"},
        {"cursor": "+inf"},
        {"limit": "0"},
        {"limit": "101"},
        {"limit": "ten"},
        {"status": "done"},
        {"batch": "x" * 65},
    ],
)
def test_a_list_that_nobody_can_ask_for_is_refused(client, asked):
    assert problem(client.http.get("/jobs", params=asked)) == (422, "invalid_field")


def test_a_batch_or_cursor_that_leads_nowhere_is_an_empty_list(client):
    for asked in ({"batch": str(uuid4())}, {"batch": "x/../*"}, {"cursor": "1"}):
        assert client.http.get("/jobs", params=asked).json() == {"jobs": [], "next_cursor": None}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A service with every setting at its default, in which each test erases its jobs."""
    with running(tmp_path_factory.mktemp("plain"), QUICK) as service:
        client = Client(service)
        yield client
        client.http.close()


def test_jobs_are_not_listed_without_keys_unless_a_setting_says_so(plain):
    """Their ids are what guards them. Who knows a batch's id knows enough to see its jobs."""
    batch = batch_of(plain, sound(0))
    assert problem(plain.http.get("/jobs")) == (403, "listing_off")
    assert problem(plain.http.get("/jobs", params={"status": "queued"})) == (403, "listing_off")
    assert len(plain.http.get(batch["links"]["jobs"]).json()["jobs"]) == 1
    done(plain, batch["batch_id"])
    plain.http.delete(batch["links"]["cancel"]).raise_for_status()


# --- Cancel and erase -----------------------------------------------------------------------------


def test_cancelling_never_erases(service, client, tmp_path):
    with frozen(service):
        job_id = client.submit(variant(tmp_path / "a.wav", 820), metadata='{"a":1}')["job_id"]
        answer = client.http.post(f"/jobs/{job_id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        assert answer.json()["metadata"] == {"a": 1}
    finished = client.submit()["job_id"]
    client.wait(finished)
    for ended in (job_id, finished):
        assert problem(client.http.post(f"/jobs/{ended}/cancel")) == (409, "job_ended")
    assert client.text(finished) == FOX_WORDS
    for missing in (str(uuid4()), "x"):
        assert problem(client.http.post(f"/jobs/{missing}/cancel")) == (404, "job_not_found")


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
def test_an_erased_job_leaves_no_trace(plain, raw_of, tmp_path, end):
    """However it ended: no key, list, cache entry or file of it, and none of what it said."""
    service, client = plain.service, plain
    secret = f"secret-{uuid4().hex}"
    content = b"\0" * 5000 if end == "failed" else sound(0)
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    if end == "cancelled":
        service.kill("worker", signal.SIGSTOP)
    answer = client.http.post(
        "/transcribe",
        files={"file": (secret, content)},
        data={"metadata": json.dumps({"a": secret}), "initial_prompt": secret},
        headers={"Idempotency-Key": secret},
    )
    job_id = answer.json()["job_id"]
    if end == "cancelled":
        client.http.delete(f"/jobs/{job_id}").raise_for_status()
        service.kill("worker", signal.SIGCONT)
    client.wait(job_id, end)
    raw = raw_of(service)
    fingerprint = raw.hget(keys.job(job_id), "fingerprint")
    assert secret in json.dumps(dump(raw)), "it was there"
    assert client.http.delete(f"/jobs/{job_id}").json()["status"] == "deleted"
    left = dump(raw)
    if end == "cancelled":  # a moment's note for a worker that may be at work on it
        assert left.pop(keys.transcription(fingerprint)) == {"status": "cancelled"}
        assert 0 < raw.pttl(keys.transcription(fingerprint)) <= 60_000
    everything = json.dumps(left)
    for trace in (job_id, fingerprint, secret, "brown fox"):
        assert trace not in everything
    wait_until(lambda: leftovers(service) == [], 30, "nothing is left on disk")
