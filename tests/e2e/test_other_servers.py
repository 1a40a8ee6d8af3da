"""The service and other servers: those that it tells when a job has ended, and those that it
fetches recordings from. Whole services, real receivers on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from standardwebhooks import Webhook

from local.ports import free_port
from local.service import Service
from tests.conftest import FOX, FOX_WORDS, ROOT, wait_until
from tests.e2e.conftest import QUICK, Client, leftovers, long_ago, metric, running, variant
from tests.e2e.test_access import Holder, new_key
from tests.receiver import Canary, Receiver, Reply

SETTINGS = {
    "egress_allow": "127.0.0.1",
    "list_jobs": "true",
    "webhook_timeout_seconds": "2",
    "webhook_retry_seconds": ",".join(["0.5"] * 20),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with running(folder, {**QUICK, **SETTINGS}) as service:
        yield service


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def shop() -> Iterator[Receiver]:
    """A server that has the sample."""
    with Receiver(Reply(body=FOX.read_bytes())) as shop:
        yield shop


def secret_of(service: Service, *words: str) -> str:
    """As its operator asks for it."""
    done = subprocess.run(
        [sys.executable, "-m", "api.webhook_secret", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "DATA_DIR": str(service.settings.data_dir)},
        cwd=service.settings.data_dir,  # no .env here
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.strip()


def webhook(client: Client, job_id: str) -> dict:
    answer = client.http.get(f"/jobs/{job_id}/webhook")
    assert answer.status_code == 200, answer.text
    return answer.json()


def told(client: Client, job_id: str, state: str = "delivered", within: float = 30) -> dict:
    def ask() -> dict | None:
        try:
            answer = client.http.get(f"/jobs/{job_id}/webhook")
        except httpx2.TransportError:
            return None
        seen = answer.json()
        return seen if seen.get("state") == state else None

    return wait_until(ask, within, f"the webhook is {state}")


def refused(client: Client, **body: object) -> dict:
    answer = client.http.post("/transcribe", json=body)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.json()


# --- Webhooks -------------------------------------------------------------------------------------


def test_a_job_that_has_ended_is_told_signed_and_its_links_lead_to_the_result(
    service, client, receiver, tmp_path
):
    """Nothing was set up for it but the address."""
    fox = variant(tmp_path / "fox.wav", 1)
    metadata = {"order": 17}
    job_id = client.submit(
        fox, webhook_url=receiver.url("/hook?token=1"), metadata=json.dumps(metadata)
    )["job_id"]
    assert told(client, job_id)["attempts"][0]["status_code"] == 200
    (request,) = receiver.received
    secret = secret_of(service)
    assert secret not in (service.settings.data_dir.parent / "service.log").read_text()
    event = Webhook(secret).verify(request.body, request.headers)
    OpenAI(api_key="-", webhook_secret=secret).webhooks.verify_signature(
        request.body, request.headers
    )
    assert event["type"] == "transcription.completed"
    data = event["data"]
    assert (data["job_id"], data["metadata"], data["error"]) == (job_id, metadata, None)
    result = client.http.get(data["links"]["result"])
    assert result.json()["text"] == FOX_WORDS
    assert data["duration"] == result.json()["duration"]
    page = client.http.get("/metrics").text
    assert metric(page, "whisper_webhook_deliveries_total", result="delivered") >= 1
    assert metric(page, "whisper_webhooks_pending") == 0


def test_failed_and_cancelled_jobs_are_told_too(service, client, receiver, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"\0" * 5000)
    failed = client.submit(broken, webhook_url=receiver.url())["job_id"]
    told(client, failed)
    event = json.loads(receiver.received[0].body)
    assert event["type"] == "transcription.failed"
    assert event["data"]["error"]["code"] == "unreadable_media"
    again = client.http.post(f"/jobs/{failed}/webhook/redeliver")
    assert (again.status_code, again.json()["job_id"]) == (202, failed)
    wait_until(lambda: len(receiver.received) == 2, 30, "it is told again")
    first, second = receiver.received
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body
    service.kill("worker", signal.SIGSTOP)
    fox = variant(tmp_path / "fox.wav", 3)
    cancelled = client.submit(fox, webhook_url=receiver.url())["job_id"]
    client.http.delete(f"/jobs/{cancelled}")
    service.kill("worker", signal.SIGCONT)
    told(client, cancelled)
    assert json.loads(receiver.received[2].body)["type"] == "transcription.cancelled"
    client.http.delete(f"/jobs/{cancelled}")  # now it is erased
    assert client.http.get(f"/jobs/{cancelled}/webhook").json()["code"] == "job_not_found"


def test_however_a_job_came_its_webhook_is_told_once(client, shop, receiver, tmp_path):
    """And nobody but the receiver gets to see the address."""
    fox = variant(tmp_path / "fox.wav", 4)
    token = "canary-of-an-address"
    hook, content = {"webhook_url": receiver.url(f"/{token}?{token}")}, fox.read_bytes()

    def post(path: str, **request: Any) -> httpx2.Response:
        answer = client.http.post(path, **request)
        assert answer.status_code in {200, 202}, answer.text
        return answer

    parts = [("file", ("a.wav", content)), ("file", ("b.wav", FOX.read_bytes()))]
    batch = post("/batches", files=parts, data=hook).json()
    known = batch["jobs"][0]["job"]["job_id"]
    client.wait(known)
    by_digest = {"sha256": hashlib.sha256(content).hexdigest(), **hook}
    named = {"url": shop.url(f"/{token}"), "metadata": {"a": 1}, "priority": "high", **hook}
    with_key = {"headers": {"Idempotency-Key": "k"}, "files": {"file": content}, "data": hook}
    by_key, replayed = (post("/transcribe", **with_key).json() for _ in range(2))
    waited = {"files": {"file": ("a.wav", content)}, "data": {"model": "whisper-1", **hook}}
    ids = [
        *(each["job"]["job_id"] for each in batch["jobs"]),
        client.submit(fox, **hook)["job_id"],  # answered from the cache
        post("/transcribe/by-digest", json=by_digest).json()["job_id"],
        by_key["job_id"],
        post("/transcribe", json=named).json()["job_id"],
        post("/v1/audio/transcriptions", **waited).headers["X-Job-Id"],
    ]
    assert replayed["job_id"] == by_key["job_id"]
    for job_id in ids:
        told(client, job_id)
    events = {}
    for request in receiver.received:
        assert request.path == f"/{token}?{token}"
        event = json.loads(request.body)
        assert event["type"] == "transcription.completed"
        events[event["data"]["job_id"]] = event["data"]
    assert sorted(events) == sorted(ids)
    assert len(receiver.received) == len(ids)
    assert events[ids[5]]["metadata"] == {"a": 1}
    answer = client.http.get("/jobs", params={"limit": 50})
    assert answer.status_code == 200, answer.text
    listed = answer.json()["jobs"]
    shown = {job["job_id"]: job for job in listed}
    assert shown.keys() >= set(ids)
    assert (shown[ids[5]]["metadata"], shown[ids[5]]["priority"]) == ({"a": 1}, "high")
    seen = [client.http.get(f"/{path}").text for path in ("jobs?limit=50", "metrics", "stats")]
    seen += [
        client.http.get(f"/{p}").text for i in ids for p in (f"status/{i}", f"jobs/{i}/webhook")
    ]
    assert not any(token in text for text in seen)


def test_what_receivers_do_and_what_becomes_of_it(client, tmp_path):
    """Down, slow, failing, refusing, leading elsewhere: all at once; none delays another."""
    tested, began = threading.Event(), time.monotonic()
    with (
        Receiver() as fine,
        Receiver(Reply(after=tested.wait), Reply()) as slow,
        Receiver(Reply(500), Reply(503, {"Retry-After": "1"}), Reply()) as failing,
        Receiver(Reply(404)) as refusing,
        Canary("127.0.0.2") as inside,
        Receiver(Reply(307, {"Location": f"http://127.0.0.2:{inside.port}/"})) as leading,
    ):
        port = free_port()
        urls = {
            "fine": fine.url(),
            "down, then up": f"http://127.0.0.1:{port}/hook",
            "slow once": slow.url(),
            "500, 503, 200": failing.url(),
            "404": refusing.url(),
            "redirect to loopback": leading.url(),
        }
        jobs = {
            name: client.submit(FOX, webhook_url=url, language="en")["job_id"]
            for name, url in urls.items()
        }
        wait_until(lambda: len(webhook(client, jobs["down, then up"])["attempts"]) >= 2)
        with Receiver(port=port):
            seen = {
                name: told(client, job_id, "failed" if name == "404" else "delivered", 20)
                for name, job_id in jobs.items()
                if name != "redirect to loopback"
            }
        tested.set()
        away = "redirect to loopback"
        wait_until(lambda: len(webhook(client, jobs[away])["attempts"]) >= 3)
        seen[away] = webhook(client, jobs[away])
        client.http.delete(f"/jobs/{jobs[away]}")  # enough
    rows = {name: (each["state"], *said(each)) for name, each in seen.items()}
    print(f"\n{'receiver':<22}{'state':<11}{'after s':<9}attempts")
    for name, (state, *attempts) in rows.items():
        first, last = (datetime.fromisoformat(seen[name]["attempts"][n]["at"]) for n in (0, -1))
        print(f"{name:<22}{state:<11}{(last - first).total_seconds():<9.1f}{', '.join(attempts)}")
    print(f"all in {time.monotonic() - began:.1f} s")
    assert rows["fine"] == ("delivered", "200")
    assert rows["slow once"] == ("delivered", "timeout", "200")
    assert rows["500, 503, 200"] == ("delivered", "500", "503", "200")
    assert rows["404"] == ("failed", "404")
    state, *attempts, last = rows["down, then up"]
    assert (state, set(attempts), last) == ("delivered", {"connection"}, "200")
    state, *attempts = rows[away]
    assert state == "pending"
    assert set(attempts) <= {"307", "interrupted"}
    assert inside.accepted == 0


def said(delivery: dict) -> list[str]:
    """Of each attempt, the status or why there is none."""
    return [str(each["status_code"] or each["error"]) for each in delivery["attempts"]]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.2:9/hook",
        "http://localhost/hook",
        "http://redis:6379/",
        "https://10.0.0.1/hook",
        "http://example.org/hook",
        "https://user:password@example.org/hook",
        "ftp://example.org/hook",
        "hook",
    ],
)
def test_a_webhook_that_would_not_be_asked_is_refused_with_its_job(service, client, url):
    """At once, and nothing of the upload is kept."""
    before = leftovers(service)
    with FOX.open("rb") as file:
        answer = client.http.post("/transcribe", files={"file": file}, data={"webhook_url": url})
    assert (answer.status_code, answer.json()["code"]) == (422, "url_not_allowed")
    assert answer.json()["detail"].startswith("webhook_url: It")
    assert set(leftovers(service)) <= set(before)


def test_a_job_without_a_webhook_says_so(client, tmp_path):
    job_id = client.submit(variant(tmp_path / "fox.wav", 2))["job_id"]
    for answer in (
        client.http.get(f"/jobs/{job_id}/webhook"),
        client.http.post(f"/jobs/{job_id}/webhook/redeliver"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "webhook_not_found")
    unknown = client.http.get("/jobs/00000000-0000-0000-0000-000000000000/webhook")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "job_not_found")


def test_a_webhook_is_told_although_api_and_redis_die_meanwhile(service, client, tmp_path):
    """Its receiver is down all the time, and back at the end."""
    port = free_port()
    job_id = client.submit(
        variant(tmp_path / "fox.wav", 5), webhook_url=f"http://127.0.0.1:{port}/hook"
    )["job_id"]
    client.wait(job_id)
    wait_until(lambda: len(webhook(client, job_id)["attempts"]) >= 2, 30, "it was tried")
    service.kill("API")
    service.popen("API").wait(30)
    service.restart("API")
    service.wait_ready(30, "API")
    seen = webhook(client, job_id)
    assert seen["state"] == "pending"
    wait_until(lambda: len(webhook(client, job_id)["attempts"]) > len(seen["attempts"]))
    wait_until(lambda: _saved(service, job_id), 30, "the append-only file is written each second")
    service.kill("Redis")
    service.popen("Redis").wait(30)
    service.restart("Redis")
    with Receiver(port=port) as receiver:
        seen = told(client, job_id)
        assert seen["attempts"][-1]["status_code"] == 200
        assert {a["error"] for a in seen["attempts"][:-1]} <= {"connection", "interrupted"}
        Webhook(secret_of(service)).verify(receiver.received[0].body, receiver.received[0].headers)
        assert len(receiver.received) == 1


def _saved(service: Service, job_id: str) -> bool:
    folder = service.settings.data_dir / "redis"
    return any(job_id.encode() in path.read_bytes() for path in folder.rglob("*.aof"))


def test_an_attempt_that_dies_with_its_process_is_made_again_under_the_same_id(
    service, client, tmp_path
):
    """By another process, once its lease has ended: a receiver may hear it twice."""
    tested = threading.Event()
    with Receiver(Reply(after=tested.wait), Reply()) as receiver:
        job_id = client.submit(variant(tmp_path / "fox.wav", 6), webhook_url=receiver.url())[
            "job_id"
        ]
        wait_until(lambda: receiver.received, 30, "it is being told")
        service.kill("API")
        service.popen("API").wait(30)
        service.restart("API")
        service.wait_ready(30, "API")
        seen = told(client, job_id)
        tested.set()
    assert [attempt["error"] for attempt in seen["attempts"]] == ["interrupted", None]
    ids = [request.headers["webhook-id"] for request in receiver.received]
    assert ids == [seen["webhook_id"]] * 2


def test_a_job_that_an_emptied_redis_had_lost_still_tells_its_webhook(
    service, client, raw_of, tmp_path
):
    with Receiver() as receiver:
        service.kill("worker", signal.SIGSTOP)
        job_id = client.submit(variant(tmp_path / "fox.wav", 7), webhook_url=receiver.url())[
            "job_id"
        ]
        raw_of(service).flushall()
        long_ago(service, job_id)
        service.kill("worker", signal.SIGCONT)
        wait_until(lambda: receiver.received, 60, "it is told")
        assert json.loads(receiver.received[0].body)["data"]["job_id"] == job_id


def test_with_keys_a_webhook_is_its_owner_s_alone(start, tmp_path):
    """Its log, its being told again, and its signature."""
    service, _ = start(**SETTINGS, auth="keys")
    acme, globex = (
        Holder(service, new_key(service, name, "--concurrent", "1")) for name in ("acme", "globex")
    )
    with Receiver() as receiver:
        job_id = acme.submit(variant(tmp_path / "fox.wav", 1), webhook_url=receiver.url())["job_id"]
        told(acme, job_id)
        for answer in (
            globex.http.get(f"/jobs/{job_id}/webhook"),
            globex.http.post(f"/jobs/{job_id}/webhook/redeliver"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")
        service.kill("worker", signal.SIGSTOP)
        acme.submit(variant(tmp_path / "fox.wav", 2))
        again = acme.http.post(f"/jobs/{job_id}/webhook/redeliver")
        assert again.status_code == 202, "it is no job, which a limit of jobs could refuse"
        service.kill("worker", signal.SIGCONT)
        wait_until(lambda: len(receiver.received) == 2, 30, "it is told again")
    for request in receiver.received:
        Webhook(secret_of(service, "acme")).verify(request.body, request.headers)
        for words in ((), ("globex",)):
            with pytest.raises(Exception, match="No matching signature"):
                Webhook(secret_of(service, *words)).verify(request.body, request.headers)
    for holder in (acme, globex):
        holder.http.close()


# --- Recordings by their address ------------------------------------------------------------------


def test_a_recording_is_fetched_from_its_address(client, shop, tmp_path):
    """By form and by JSON; the same bytes as an upload are the same file."""
    url = shop.url("/fox.wav?signature=1")
    by_form = client.http.post("/transcribe", files={"url": (None, url), "language": (None, "en")})
    assert by_form.status_code == 202, by_form.text
    job_id = by_form.json()["job_id"]
    client.wait(job_id)
    assert client.text(job_id) == FOX_WORDS
    body = {"url": url, "temperature": [0.0, 0.4], "word_timestamps": True, "metadata": {"a": 1}}
    by_field = client.http.post("/transcribe", data={"url": url, "language": "en"})
    assert by_field.json()["deduplicated"] is True, "a form without files is one, too"
    by_json = client.http.post("/transcribe", json=body).json()
    assert by_json["metadata"] == {"a": 1}
    client.wait(by_json["job_id"])
    result = client.http.get(f"/result/{by_json['job_id']}").json()
    assert result["segments"][0]["words"]
    uploaded = client.submit(FOX, temperature="0,0.4", word_timestamps="true")
    assert uploaded["deduplicated"] is True
    page = client.http.get("/metrics").text
    assert metric(page, "whisper_fetches_total", result="fetched") >= 2


def test_a_fetched_recording_can_have_a_webhook(client, shop, receiver):
    answer = client.http.post(
        "/transcribe", json={"url": shop.url(), "webhook_url": receiver.url(), "beam_size": 2}
    )
    told(client, answer.json()["job_id"])
    assert len(receiver.received) == 1


def test_what_can_not_be_fetched_is_refused_with_the_cause(service, client):
    """And leaves nothing behind."""
    before = leftovers(service)
    with (
        Receiver(Reply(404)) as missing,
        Receiver(Reply(body=b"<!doctype html><title>A player</title>")) as page,
        Canary("127.0.0.2") as canary,
        Receiver(Reply(302, {"Location": f"http://127.0.0.2:{canary.port}/"})) as redirecting,
    ):
        for url, status, code in [
            (missing.url(), 424, "url_status"),
            (page.url(), 415, "unsupported_media"),
            (redirecting.url(), 422, "url_not_allowed"),
            (f"http://127.0.0.2:{canary.port}/", 422, "url_not_allowed"),
            ("http://127.0.0.1:1/", 424, "url_unreachable"),
        ]:
            problem = refused(client, url=url)
            assert (problem["status"], problem["code"]) == (status, code), problem
        assert canary.accepted == 0
    assert set(leftovers(service)) <= set(before)


def test_a_body_that_names_no_recording_says_what_to_send(client, shop):
    for body, status, code in [
        ({}, 422, "missing_file"),
        ({"url": ""}, 422, "missing_file"),
        ({"url": 7}, 422, "invalid_field"),
        ({"url": shop.url(), "beam_size": 99}, 422, "invalid_field"),
        ({"url": shop.url(), "unknown": 1}, 422, "invalid_field"),
        ({"url": shop.url(), "webhook_url": "http://10.0.0.1/"}, 422, "url_not_allowed"),
    ]:
        asked = shop.accepted
        problem = refused(client, **body)
        assert (problem["status"], problem["code"]) == (status, code), problem
        assert shop.accepted == asked, "what is wrong is said before anything is fetched"
    for content in (b"[]", b"{", b"[" * 30_000, b"\xff", b" " * 100_000):
        answer = client.http.post(
            "/transcribe", content=content, headers={"Content-Type": "application/json"}
        )
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed_body")
    both = client.http.post(
        "/transcribe", files={"file": FOX.read_bytes(), "url": (None, shop.url())}
    )
    assert (both.status_code, both.json()["errors"][0]["field"]) == (422, "url")


def test_who_fetches_slowly_delays_nobody_else(client, tmp_path):
    """A server that says nothing holds one request of ours, and no more."""
    tested = threading.Event()
    with Receiver(Reply(after=tested.wait)) as silent:
        answers: list[int] = []
        asking = threading.Thread(
            target=lambda: answers.append(
                client.http.post("/transcribe", json={"url": silent.url()}).status_code
            )
        )
        asking.start()
        wait_until(lambda: silent.received, 30, "it is asked")
        job_id = client.submit(variant(tmp_path / "fox.wav", 9))["job_id"]
        client.wait(job_id, within=60)
        assert answers == []
        tested.set()
        asking.join(30)
    assert answers == [415], "what it sent in the end was text"
