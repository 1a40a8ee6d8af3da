"""What a client may leave unsent: an upload that the service knows, by its digest; and what it may
send again: a request whose answer was lost, with its key."""

from __future__ import annotations

import base64
import hashlib
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx2
import pytest
import redis

from local.service import Service
from tests.conftest import FOX, FOX_WORDS, wait_until
from tests.e2e.conftest import (
    QUICK,
    Client,
    counted_runs,
    expect_completed_runs,
    leftovers,
    long_ago,
    metric,
    running,
)
from tests.e2e.test_access import Holder, new_key
from tests.e2e.test_api import problem
from tests.e2e.test_batches import frozen, sound

RECOVERY_SECONDS = 60
HALF_A_PAIR = json.dumps({"sha256": "0" * 64, "initial_prompt": "\ud800"}).encode()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two API processes, which decide together."""
    with running(tmp_path_factory.mktemp("service"), {**QUICK, "workers": "2"}) as service:
        yield service


def send(client: Client, content: bytes, key: str, **fields: str) -> httpx2.Response:
    return client.http.post(
        "/transcribe",
        files={"file": ("a.wav", content)},
        data=fields,
        headers={"Idempotency-Key": key},
    )


def ask(client: Client, content: bytes, **fields: Any) -> httpx2.Response:
    digest = hashlib.sha256(content).hexdigest()
    return client.http.post("/transcribe/by-digest", json={"sha256": digest, **fields})


# --- Idempotency-Key ------------------------------------------------------------------------------


def test_a_request_with_a_key_is_one_job_however_often_it_is_sent(service, client):
    """At the same time, over two API processes; and later, when it has ended."""
    content, key = sound(0), uuid4().hex
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: send(client, content, key, priority="high"), range(24)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    first = [each for each in answers if "idempotent-replayed" not in each.headers]
    assert len(first) == 1
    assert not first[0].json()["deduplicated"]
    job_id = first[0].json()["job_id"]
    client.wait(job_id)
    again = send(client, content, key, priority="high")
    assert again.headers["idempotent-replayed"] == "true"
    told = again.json()
    assert (told["job_id"], told["status"], told["priority"]) == (job_id, "completed", "high")
    assert not told["deduplicated"], "as it was told the first time"
    assert again.headers["location"] == f"/status/{job_id}"
    wait_until(lambda: leftovers(service) == [], 30, "what was sent again is gone")


def test_the_same_key_with_another_body_or_other_fields_is_refused(service, client):
    sent, key = sound(1), uuid4().hex
    job_id = send(client, sent, key).json()["job_id"]
    for content, fields in [
        (sent, {"language": "en"}),
        (sent, {"metadata": '{"a":1}'}),
        (sent, {"priority": "high"}),
        (sound(2), {}),
    ]:
        other = send(client, content, key, **fields)
        assert problem(other) == (409, "idempotency_conflict"), fields
    assert send(client, sent, key, priority="normal").json()["job_id"] == job_id, (
        "a default is none"
    )
    client.wait(job_id)
    wait_until(lambda: leftovers(service) == [])


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "\xe9"])
def test_a_key_that_is_none_is_refused(client, key):
    answer = client.http.post(
        "/transcribe",
        files={"file": ("a.wav", FOX.read_bytes())},
        headers=[("Idempotency-Key", key.encode("latin-1"))],
    )
    assert problem(answer) == (422, "invalid_field")
    assert answer.json()["errors"][0]["field"] == "Idempotency-Key"


def test_a_key_that_is_sent_twice_is_refused(client):
    answer = client.http.post(
        "/transcribe",
        files={"file": ("a.wav", FOX.read_bytes())},
        headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "b")],
    )
    assert problem(answer) == (422, "invalid_field")


def test_a_key_of_255_characters_is_a_key(client):
    content, key = sound(3), "~ " * 127 + "!"
    assert (
        send(client, content, key).json()["job_id"] == send(client, content, key).json()["job_id"]
    )


def test_a_lost_answer_and_a_retry_are_one_job(start):
    """Redis gets the submission and its answer comes too late: the caller is told that it failed.
    The upload stays, so that the job which the retry finds is transcribed."""
    service, client = start()
    content, key = sound(0), uuid4().hex
    client.wait(client.submit()["job_id"])  # the scripts are loaded
    wait_until(lambda: leftovers(service) == [])

    def body() -> Iterator[bytes]:
        head = '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield head.encode() + content
        wait_until(lambda: leftovers(service), 30, "it is arriving")
        service.kill("Redis", signal.SIGSTOP)
        yield b"\r\n--x--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=x", "Idempotency-Key": key}
    answer = client.http.post("/transcribe", content=body(), headers=headers)
    assert problem(answer) == (503, "store_unavailable")
    service.kill("Redis", signal.SIGCONT)
    (job_id,) = leftovers(service)
    again = send(client, content, key)
    assert again.status_code == 202, again.text
    assert again.json()["job_id"] == job_id
    client.wait(job_id, within=RECOVERY_SECONDS)
    assert client.text(job_id) == FOX_WORDS
    assert client.stats()["jobs"]["submitted"] == 2
    wait_until(lambda: leftovers(service) == [])


@pytest.fixture(scope="module")
def after_a_loss(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Client, bytes, str, str, str]]:
    """What was submitted before Redis lost everything: its bytes, its key, its id, and the id of
    one that brought none, although the job that had brought them for it is gone."""
    folder = tmp_path_factory.mktemp("loss")
    with running(folder, QUICK) as service:
        client = Client(service)
        service.kill("worker")
        content, other, key = sound(0), sound(1), uuid4().hex
        job_id = send(client, content, key).json()["job_id"]
        gone = send(client, other, "a").json()["job_id"]
        without = ask(client, other, metadata={"a": 1}).json()["job_id"]
        client.http.delete(f"/jobs/{gone}").raise_for_status()
        with redis.Redis.from_url(service.redis_url) as raw:
            raw.flushall()
        long_ago(service, job_id, without)
        service.restart("worker")
        yield client, content, key, job_id, without
        client.http.close()


def test_a_key_is_known_after_redis_lost_everything(after_a_loss):
    client, content, key, job_id, _ = after_a_loss
    wait_until(lambda: client.http.get(f"/status/{job_id}").status_code == 200, RECOVERY_SECONDS)
    assert send(client, content, key).json()["job_id"] == job_id


# --- By digest ------------------------------------------------------------------------------------


def test_a_known_file_needs_no_upload(service, client):
    """As if it had been sent: a job of its own, with its own metadata."""
    content = sound(0)
    assert problem(ask(client, content)) == (404, "digest_unknown")
    first = send(client, content, uuid4().hex).json()["job_id"]
    client.wait(first)
    runs = counted_runs(service)
    answer = ask(client, content, metadata={"a": [1]}, priority="high")
    told = answer.json()
    assert (answer.status_code, told["status"], told["deduplicated"]) == (202, "completed", True)
    assert (told["metadata"], told["priority"]) == ({"a": [1]}, "high")
    assert answer.headers["location"] == f"/status/{told['job_id']}"
    assert told["job_id"] != first
    assert client.text(told["job_id"]) == FOX_WORDS
    assert client.http.get(f"/result/{told['job_id']}").json()["metadata"] == {"a": [1]}
    assert counted_runs(service) == runs
    assert problem(ask(client, content, language="en")) == (404, "digest_unknown")
    wait_until(lambda: leftovers(service) == [])


def test_the_digest_may_come_in_a_form_or_in_a_header(client):
    content = sound(1)
    client.wait(send(client, content, "k", language="en").json()["job_id"])
    digest = hashlib.sha256(content)
    path = "/transcribe/by-digest"
    encoded = base64.b64encode(digest.digest()).decode()
    header = {"Repr-Digest": f"sha-512=:AAAA:, sha-256=:{encoded}:"}
    answers = [
        client.http.post(path, data={"sha256": digest.hexdigest(), "language": "en"}),
        client.http.post(path, json={"sha256": digest.hexdigest().upper(), "language": "en"}),
        client.http.post(path, json={"language": "en"}, headers=header),
        client.http.post(
            path, json={"language": "en", "sha256": digest.hexdigest()}, headers=header
        ),
    ]
    assert [answer.status_code for answer in answers] == [202] * 4
    asked = {"sha256": digest.hexdigest(), "language": "en"}
    assert client.http.head("/transcribe", params=asked).status_code == 200
    assert client.http.head("/transcribe", params=asked | {"language": "de"}).status_code == 404
    assert client.http.head("/transcribe?language=en", headers=header).status_code == 200
    other = {"sha256": "0" * 64, "language": "en"}
    assert problem(client.http.post(path, json=other, headers=header)) == (422, "invalid_field")


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"json": {}}, (422, "invalid_field")),
        ({"json": {"sha256": "abc"}}, (422, "invalid_field")),
        ({"json": {"sha256": "g" * 64}}, (422, "invalid_field")),
        ({"json": {"sha256": 17}}, (422, "invalid_field")),
        ({"json": {"sha256": None}}, (422, "invalid_field")),
        ({"json": {"sha256": "0" * 64, "colour": "red"}}, (422, "invalid_field")),
        ({"json": {"sha256": "0" * 64, "beam_size": [[]]}}, (422, "invalid_field")),
        ({"content": HALF_A_PAIR}, (422, "invalid_field")),
        ({"json": {"sha256": "0" * 64, "metadata": {"a": "x" * 5000}}}, (422, "invalid_field")),
        ({"json": ["0" * 64]}, (400, "malformed_body")),
        ({"json": "x" * 70_000}, (400, "malformed_body")),
        ({"content": b"{"}, (400, "malformed_body")),
        ({"content": b'{"\\ud800": 1}'}, (400, "malformed_body")),
        ({"content": b"[" * 60_000}, (400, "malformed_body")),
        ({"content": b'{"a": \xff}'}, (400, "malformed_body")),
        ({"data": {"sha256": ["0" * 64, "1" * 64]}}, (400, "malformed_body")),
        ({"files": {"file": b"RIFF"}}, (400, "malformed_body")),
        ({}, (400, "malformed_body")),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(client, sent, expected):
    if "content" in sent:
        sent = {**sent, "headers": {"Content-Type": "application/json"}}
    assert problem(client.http.post("/transcribe/by-digest", **sent)) == expected
    assert client.http.head("/transcribe").status_code == 422


def test_a_file_that_is_under_way_is_joined_and_outlives_who_brought_it(service, client):
    """The job has a link to the bytes: the first one may be cancelled."""
    content, runs = sound(2), counted_runs(service)
    with frozen(service):
        first = send(client, content, uuid4().hex).json()["job_id"]
        told = ask(client, content, priority="high").json()
        assert (told["status"], told["deduplicated"]) == ("queued", True)
        uploads = service.settings.data_dir / "uploads"
        mine, theirs = uploads / told["job_id"] / "audio", uploads / first / "audio"
        assert mine.samefile(theirs)
        client.http.delete(f"/jobs/{first}").raise_for_status()
        assert mine.read_bytes() == content
    client.wait(told["job_id"])
    assert client.text(told["job_id"]) == FOX_WORDS
    expect_completed_runs(service, runs + 1)
    wait_until(lambda: leftovers(service) == [])


def test_a_job_that_brought_no_bytes_survives_the_loss_of_redis(after_a_loss):
    """From its manifest and its link."""
    client, *_, job_id = after_a_loss
    wait_until(lambda: client.status(job_id).get("status") == "completed", RECOVERY_SECONDS + 30)
    assert client.text(job_id) == FOX_WORDS
    assert client.status(job_id)["metadata"] == {"a": 1}


def test_a_question_with_a_key_and_the_upload_after_it_are_one_request(client):
    content, key = sound(3), uuid4().hex
    digest = hashlib.sha256(content).hexdigest()

    def question() -> httpx2.Response:
        path, body = "/transcribe/by-digest", {"sha256": digest}
        return client.http.post(path, json=body, headers={"Idempotency-Key": key})

    assert problem(question()) == (404, "digest_unknown")
    job_id = send(client, content, key).json()["job_id"]
    told = question()
    assert told.json()["job_id"] == job_id
    assert told.headers["idempotent-replayed"] == "true"
    client.wait(job_id)
    assert question().json()["job_id"] == job_id


def test_asking_costs_no_job_and_is_no_refusal(service, client):
    """What is unknown is in no list and no count."""
    before = client.stats()["jobs"], client.http.get("/metrics").text
    for n in range(3):
        assert ask(client, sound(n)).status_code == 404
    after = client.stats()["jobs"], client.http.get("/metrics").text
    assert after[0] == before[0]
    name = "whisper_jobs_rejected_total"
    assert metric(after[1], name) == metric(before[1], name)


# --- With API keys --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("keys"), {**QUICK, "auth": "keys"}) as service:
        yield service


def test_a_digest_shows_a_caller_what_is_its_own(guarded):
    """The answers to a stranger are those of a file that nobody ever sent, also while it runs;
    keys, batches and lists are each caller's own."""
    owner, stranger = (Holder(guarded, new_key(guarded, name)) for name in ("owner", "stranger"))
    content, key = sound(0), "the same key"
    with frozen(guarded):
        job_id = send(owner, content, key).json()["job_id"]
        assert problem(ask(stranger, content)) == (404, "digest_unknown")
        assert ask(owner, content).json()["deduplicated"]
    owner.wait(job_id)
    never, seen = ask(stranger, sound(1)), ask(stranger, content)
    assert problem(seen) == problem(never) == (404, "digest_unknown")
    assert seen.json()["detail"] == never.json()["detail"]
    digest = {"sha256": hashlib.sha256(content).hexdigest()}
    assert stranger.http.head("/transcribe", params=digest).status_code == 404
    assert owner.http.head("/transcribe", params=digest).status_code == 200
    other = send(stranger, content, key)
    assert "idempotent-replayed" not in other.headers
    assert (other.json()["job_id"] != job_id, other.json()["deduplicated"]) == (True, False)
    mine = [job["job_id"] for job in owner.http.get("/jobs").json()["jobs"]]
    theirs = [job["job_id"] for job in stranger.http.get("/jobs").json()["jobs"]]
    assert job_id in mine
    assert theirs == [other.json()["job_id"]]
    files = [("file", ("a.wav", sound(n))) for n in range(2)]
    batch = owner.http.post("/batches", files=files).json()
    path = batch["links"]["status"]
    for method in ("GET", "DELETE"):
        foreign = stranger.http.request(method, path)
        missing = stranger.http.request(method, f"/batches/{uuid4()}")
        assert problem(foreign) == problem(missing) == (404, "batch_not_found")
        assert foreign.json()["detail"] == missing.json()["detail"]
    assert stranger.http.get(batch["links"]["jobs"]).json()["jobs"] == []
    first = batch["jobs"][0]["job"]["job_id"]
    assert problem(stranger.http.post(f"/jobs/{first}/cancel")) == (404, "job_not_found")
    assert len(owner.http.get(path).json()["jobs"]) == 2
    for each in (owner, stranger):
        each.http.close()


def test_whoever_knows_a_digest_has_the_file_where_results_are_shared(start):
    """As SECURITY.md says."""
    service, _ = start(auth="keys", share_results="true")
    one, other = (Holder(service, new_key(service, name)) for name in ("one", "other"))
    content = sound(0)
    one.wait(send(one, content, "k").json()["job_id"])
    told = ask(other, content).json()
    assert (told["status"], other.text(told["job_id"])) == ("completed", FOX_WORDS)
    for each in (one, other):
        each.http.close()


def test_a_job_by_digest_counts_against_its_caller_s_limits(guarded):
    holder = Holder(guarded, new_key(guarded, "limited", "--concurrent", "2"))
    content = sound(0)
    with frozen(guarded):
        send(holder, content, "k")
        assert ask(holder, content).status_code == 202
        assert problem(ask(holder, content)) == (429, "too_many_jobs")
    holder.http.close()
