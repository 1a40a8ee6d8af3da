"""Who waits at the OpenAI-compatible endpoints: for a stream, in vain, too long, not to the end."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import openai
import pytest
from openai import OpenAI
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from api.openai.attendance import RETURN_SECONDS
from local.service import Service
from tests.conftest import FOX, FOX_WORDS, SAMPLES, wait_until
from tests.e2e.conftest import (
    QUICK,
    Client,
    counted_runs,
    expect_completed_runs,
    leftovers,
    metric,
    running,
    variant,
)
from tests.e2e.sdk import WHISPER, details, early_answer, frozen, jobs_of, sdk_of, waiters
from tests.e2e.test_failures import long_file
from tests.receiver import Receiver

KNOWN = json.loads((SAMPLES / "transcripts.json").read_text())


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Which tells webhooks on this machine."""
    settings = {**QUICK, "egress_allow": "127.0.0.1"}
    with running(tmp_path_factory.mktemp("service"), settings) as service:
        yield service


@pytest.fixture
def sdk(service: Service) -> Iterator[OpenAI]:
    with sdk_of(service) as made:
        yield made


# --- Streams


def test_a_stream_is_its_deltas_and_one_end(sdk, service):
    file = SAMPLES / "two-sentences.wav"
    plain = sdk.audio.transcriptions.create(file=file, model=WHISPER).text
    *deltas, done = sdk.audio.transcriptions.create(file=file, model=WHISPER, stream=True)
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert len(deltas) == len(KNOWN["two-sentences.wav"]["segments"])
    assert done.type == "transcript.text.done"
    assert "".join(event.delta for event in deltas) == done.text == plain


def test_a_stream_begins_at_once_and_names_its_job(service, client, sdk, tmp_path):
    """Its headers come while the job still waits, so that the job can be asked for."""
    with (
        frozen(service),
        sdk.audio.transcriptions.with_streaming_response.create(
            file=variant(tmp_path / "a.wav", 3), model=WHISPER, stream=True
        ) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        job = answer.headers["x-job-id"]
        lines = answer.iter_lines()
        assert next(lines) == ": keep-alive"
        assert client.status(job)["status"] == "queued"
        service.kill("worker", signal.SIGCONT)
        assert "data: [DONE]" in list(lines)
    assert client.text(job) == FOX_WORDS


def test_the_beginning_of_a_long_recording_comes_before_its_end(start, tmp_path):
    """Parts that are done are told meanwhile, and altogether it is the text."""
    service, client = start(part_seconds="30", worker_slots="1")
    path = long_file(tmp_path / "long.wav", 40)
    with sdk_of(service) as sdk:
        answer = sdk.audio.transcriptions.with_raw_response.create(
            file=path, model=WHISPER, language="en", stream=True
        )
        job = answer.headers["x-job-id"]
        events = iter(answer.parse())
        first = next(events)
        assert client.status(job)["status"] == "processing"
        *deltas, done = events
        assert {event.type for event in deltas} == {"transcript.text.delta"}
        assert first.delta + "".join(event.delta for event in deltas) == done.text
        assert done.text.split() == FOX_WORDS.split() * 40
        assert sdk.audio.transcriptions.create(file=path, model=WHISPER, language="en").text == (
            done.text
        )


def test_a_failure_in_a_stream_is_an_error_event(sdk, tmp_path):
    garbage = tmp_path / "garbage.mp3"
    garbage.write_bytes(bytes(range(256)) * 40)
    stream = sdk.audio.transcriptions.create(file=garbage, model=WHISPER, stream=True)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert details(caught.value)["code"] == "unreadable_media"
    assert caught.value.body["param"] == "file"


# --- Waiting


def test_a_client_that_lost_patience_joins_what_runs(service, client, tmp_path):
    """It times out, sends all again as the SDK does by itself, and the model runs once."""
    path = variant(tmp_path / "a.wav", 5)
    runs, joined = counted_runs(service), client.stats()["cache"]["joined"]
    with sdk_of(service, timeout=3, max_retries=9) as sdk, ThreadPoolExecutor(1) as pool:
        with frozen(service):
            call = pool.submit(sdk.audio.transcriptions.create, file=path, model=WHISPER)
            wait_until(
                lambda: client.stats()["cache"]["joined"] == joined + 1, 30, "it is there again"
            )
        assert call.result(30).text == FOX_WORDS
    expect_completed_runs(service, runs + 1)


def leave(service: Service, path: Path, *, is_streamed: bool, key: str = "", **ours: str) -> None:
    """Asks for a transcription, and is gone before its end."""
    headers = {"Idempotency-Key": key} if key else {}
    with sdk_of(service, timeout=3, default_headers=headers) as sdk:
        create = sdk.audio.transcriptions.create
        if is_streamed:
            create(file=path, model=WHISPER, stream=True, extra_body=ours).close()
        else:
            with pytest.raises(openai.APITimeoutError):
                create(file=path, model=WHISPER, extra_body=ours)


def test_a_client_that_vanishes_cancels_what_nobody_else_waits_for(service, client, tmp_path):
    """Once it has had the time to come back; and only its own, unless that is of use without it: to
    one who has a key to come back with, and to a webhook, which is told once."""
    cancelled, runs = jobs_of(client, "cancelled"), counted_runs(service)
    wait_until(lambda: leftovers(service) == [], 30, "nothing is under way")
    files = [variant(tmp_path / f"{number}.wav", number) for number in range(6, 14)]
    others = []
    with Receiver() as receiver:
        with frozen(service), ThreadPoolExecutor(len(files)) as pool:
            began = time.monotonic()
            left = []
            for is_streamed, (alone, shared, keyed, hooked) in enumerate([files[:4], files[4:]]):
                others.append(client.submit(shared)["job_id"])
                how = {"is_streamed": bool(is_streamed)}
                left += [
                    pool.submit(leave, service, alone, **how),
                    pool.submit(leave, service, shared, **how),
                    pool.submit(leave, service, keyed, **how, key=keyed.name),
                    pool.submit(leave, service, hooked, **how, webhook_url=receiver.url()),
                ]
            for each in left:
                each.result(30)
            wait_until(
                lambda: jobs_of(client, "cancelled") == cancelled + 4, 40, "their jobs are gone"
            )
            assert time.monotonic() - began > RETURN_SECONDS
            assert client.stats()["queue"]["queued"] == 6
            assert set(others) < set(leftovers(service))
            wait_until(lambda: len(leftovers(service)) == 6, 30, "what is cancelled leaves nothing")
        for other in others:
            client.wait(other)
            assert client.text(other) == FOX_WORDS
        expect_completed_runs(service, runs + 6)
        wait_until(lambda: len(receiver.received) == 2, 30, "both webhooks are told")
        events = [json.loads(request.body) for request in receiver.received]
        assert {event["type"] for event in events} == {"transcription.completed"}
        assert len({event["data"]["job_id"] for event in events}) == 2
        with sdk_of(service, default_headers={"Idempotency-Key": keyed.name}) as sdk:
            back = sdk.audio.transcriptions.with_raw_response.create(file=keyed, model=WHISPER)
        assert back.headers["idempotent-replayed"] == "true"
        assert back.parse().text == FOX_WORDS
    assert jobs_of(client, "cancelled") == cancelled + 4
    assert waiters(client) == 0


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A service with one slot, whose pace is known."""
    settings = {**QUICK, "worker_slots": "1", "cpu_threads": "1"}
    with running(tmp_path_factory.mktemp("narrow"), settings) as service:
        client = Client(service)
        client.wait(client.submit(FOX)["job_id"])
        yield client
        client.http.close()


@pytest.fixture
def busy(narrow, tmp_path) -> Iterator[tuple[Service, Client]]:
    """A service whose queue is longer than half a second, and whose worker sleeps."""
    service, client = narrow.service, narrow
    numbers = count(100 + jobs_of(client))

    def has_grown() -> bool:
        last = client.submit(variant(tmp_path / "queued.wav", next(numbers)))["job_id"]
        return (client.status(last)["estimated_wait_seconds"] or 0) > 1

    with frozen(service):
        wait_until(has_grown, 30, "a long wait is predicted")
        yield service, client


IMPATIENT = {"x-stainless-read-timeout": "0.5"}


def refusals(client: Client) -> float:
    return metric(client.http.get("/metrics").text, "whisper_jobs_rejected_total")


def test_a_wait_that_would_be_too_long_is_refused_before_it_begins(busy, tmp_path):
    """A large upload without being read; one who gets a stream may wait."""
    service, client = busy
    path = variant(tmp_path / "a.wav", 1)
    before = jobs_of(client)
    with sdk_of(service) as sdk:
        with pytest.raises(openai.InternalServerError) as caught:
            sdk.audio.transcriptions.create(file=path, model=WHISPER, extra_headers=IMPATIENT)
        assert caught.value.status_code == 503
        assert details(caught.value)["code"] == "wait_too_long"
        assert caught.value.type == "overloaded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert jobs_of(client) == before
        sdk.audio.transcriptions.create(
            file=path, model=WHISPER, stream=True, extra_headers=IMPATIENT
        ).close()
    fields = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
    stream = b'--x\r\nContent-Disposition: form-data; name="stream"\r\n\r\ntrue\r\n'
    file = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nRIFF\0\0'
    impatient = {"x_stainless_read_timeout": "0.5"}
    status, headers, error = early_answer(service, fields + file, **impatient)
    assert (status, error["code"]) == (503, "wait_too_long")
    assert int(headers["retry-after"]) >= 1
    with pytest.raises(TimeoutError):
        early_answer(service, fields + stream + file, 1, **impatient)
    again = {**impatient, "x_stainless_retry_count": "1"}
    with pytest.raises(TimeoutError):
        early_answer(service, fields + file, 1, **again)


def test_the_sdk_comes_back_when_it_is_told_to(busy, tmp_path):
    """After Retry-After, with the same file; by then the queue is short."""
    service, client = busy
    path = variant(tmp_path / "a.wav", 2)
    before = refusals(client)
    with sdk_of(service, max_retries=9) as sdk, ThreadPoolExecutor(1) as pool:
        call = pool.submit(
            sdk.audio.transcriptions.with_raw_response.create,
            file=path,
            model=WHISPER,
            extra_headers=IMPATIENT,
        )
        wait_until(lambda: refusals(client) > before, 30, "it is told to come back")
        service.kill("worker", signal.SIGCONT)
        answer = call.result(90)
    assert answer.retries_taken > 0
    assert answer.parse().text == FOX_WORDS


def test_who_leaves_is_noticed_however_the_upload_ended(service, client, tmp_path):
    """Also when all the rest of it came at once, more than the API reads ahead."""
    audio = variant(tmp_path / "a.wav", 77).read_bytes()
    assert len(audio) > HIGH_WATER_LIMIT + 20_000
    model = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    body = model + head + audio + b"\r\n--x--\r\n"
    begin = len(model + head) + 5_000
    request = (
        "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\n"
        f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    before = set(leftovers(service))
    address = (service.settings.host, service.settings.port)
    with frozen(service):
        with socket.create_connection(address, 10) as client_leaving:
            client_leaving.sendall(request.encode() + body[:begin])
            wait_until(lambda: set(leftovers(service)) - before, 30, "it waits for the rest")
            service.kill("API", signal.SIGSTOP)
            client_leaving.sendall(body[begin:])
            service.kill("API", signal.SIGCONT)
            wait_until(lambda: waiters(client) == 1, 30, "the job is queued")
        wait_until(lambda: waiters(client) == 0, 30, "its client is gone")


def test_a_transcription_that_takes_too_long_can_be_fetched_by_its_job(start):
    """Or waited for again: the job goes on. More than may wait are refused before that."""
    service, client = start(max_wait_seconds="1", max_waiters="1")
    with frozen(service), sdk_of(service) as sdk:
        stream = sdk.audio.transcriptions.create(file=FOX, model=WHISPER, stream=True)
        with pytest.raises(openai.InternalServerError) as caught:
            sdk.audio.transcriptions.create(file=FOX, model=WHISPER)
        assert details(caught.value)["code"] == "too_many_waiters"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert jobs_of(client) == 1
        assert early_answer(service, b"")[2]["code"] == "too_many_waiters"
        stream.close()
        wait_until(lambda: waiters(client) == 0, 30, "there is a place again")
        with pytest.raises(openai.InternalServerError) as caught:
            sdk.audio.transcriptions.create(file=FOX, model=WHISPER)
        assert caught.value.status_code == 503
        assert details(caught.value)["code"] == "still_running"
    job = caught.value.response.headers["x-job-id"]
    client.wait(job)
    assert client.text(job) == FOX_WORDS


def test_a_replica_that_stops_sends_its_waiting_clients_elsewhere(service, client, tmp_path):
    """503 at once, or an event; the jobs go on, and who sends again joins them. Nor does it wait
    for one who has left to come back."""
    wait_until(lambda: leftovers(service) == [], 30, "nothing is under way")
    before = jobs_of(client)
    gone, path = (variant(tmp_path / f"{number}.wav", number) for number in (20, 21))
    with frozen(service), sdk_of(service) as sdk, ThreadPoolExecutor(1) as pool:
        stream = sdk.audio.transcriptions.create(file=path, model=WHISPER, stream=True)
        call = pool.submit(sdk.audio.transcriptions.create, file=path, model=WHISPER)
        wait_until(lambda: waiters(client) == 2 and jobs_of(client) == before + 2, 30, "two wait")
        leaving = sdk.audio.transcriptions.create(file=gone, model=WHISPER, stream=True)
        began = time.monotonic()
        leaving.close()
        wait_until(lambda: waiters(client) == 2, 30, "one has left")
        service.kill("API", signal.SIGTERM)
        with pytest.raises(openai.InternalServerError) as caught:
            call.result(30)
        assert details(caught.value)["code"] == "still_running"
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert details(caught.value)["code"] == "still_running"
        service.popen("API").wait(30)
        assert time.monotonic() - began < RETURN_SECONDS
        jobs = leftovers(service)
        assert len(jobs) == 3
        service.restart("API")
        service.wait_ready(30, "API")
    for job in jobs:
        client.wait(job)
        assert client.text(job) == FOX_WORDS


def test_who_waits_outlives_redis(service, client, tmp_path):
    """Killed and back: nobody is sent away."""
    before, path = jobs_of(client), variant(tmp_path / "a.wav", 22)
    with frozen(service), sdk_of(service) as sdk, ThreadPoolExecutor(1) as pool:
        stream = sdk.audio.transcriptions.create(file=path, model=WHISPER, stream=True)
        call = pool.submit(sdk.audio.transcriptions.create, file=path, model=WHISPER)
        wait_until(lambda: waiters(client) == 2, 30, "both wait")
        service.kill("Redis")
        service.popen("Redis").wait(30)
        wait_until(lambda: client.http.get("/stats").status_code == 503, 30, "it is missed")
        with pytest.raises(openai.InternalServerError) as caught:
            sdk.audio.transcriptions.create(file=path, model=WHISPER)
        assert details(caught.value)["code"] == "store_unavailable"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        service.restart("Redis")
        service.wait_ready(20, "Redis")
        service.kill("worker", signal.SIGCONT)
        assert call.result(30).text == FOX_WORDS
        assert list(stream)[-1].text == FOX_WORDS
    assert jobs_of(client) == before + 2


def test_a_job_that_somebody_cancels_is_not_tried_again(service, client, tmp_path):
    """409 would be, by OpenAI's clients."""
    path = variant(tmp_path / "a.wav", 4)
    others = set(leftovers(service))
    with frozen(service), sdk_of(service, max_retries=2) as sdk, ThreadPoolExecutor(1) as pool:
        before = jobs_of(client)
        call = pool.submit(sdk.audio.transcriptions.create, file=path, model=WHISPER)
        wait_until(lambda: jobs_of(client) == before + 1, 30, "it has begun")
        (job,) = set(leftovers(service)) - others
        client.http.delete(f"/jobs/{job}")
        with pytest.raises(openai.ConflictError) as caught:
            call.result(30)
    assert details(caught.value)["code"] == "job_cancelled"
    assert jobs_of(client) == before + 1
