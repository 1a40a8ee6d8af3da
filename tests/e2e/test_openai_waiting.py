"""Who waits at the OpenAI-compatible endpoints: for a stream, in vain, too long, not to the end."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from openai import OpenAI

from api.openai.attendance import RETURN_SECONDS
from local.service import Service
from tests.conftest import FOX, FOX_WORDS, SAMPLES, wait_until
from tests.e2e.conftest import Client, completed_runs, leftovers, metric, variant
from tests.e2e.sdk import WHISPER, details, early_answer, frozen, jobs_of, sdk_of
from tests.e2e.test_failures import long_file

KNOWN = json.loads((SAMPLES / "transcripts.json").read_text())


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
    path = long_file(tmp_path / "long.wav", 80)
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
        assert done.text.split() == FOX_WORDS.split() * 80
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
    runs, joined = completed_runs(service), client.stats()["cache"]["joined"]
    with sdk_of(service, timeout=3, max_retries=3) as sdk, ThreadPoolExecutor(1) as pool:
        with frozen(service):
            call = pool.submit(sdk.audio.transcriptions.create, file=path, model=WHISPER)
            wait_until(
                lambda: client.stats()["cache"]["joined"] == joined + 1, 20, "it is there again"
            )
        assert call.result(30).text == FOX_WORDS
    assert completed_runs(service) == runs + 1


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_vanishes_cancels_its_job(service, client, tmp_path, is_streamed):
    """Once it has had the time to come back; and only its own, if it has no key to come back to."""
    alone, shared, keyed = (
        variant(tmp_path / f"{number}.wav", 2 * number + is_streamed) for number in (3, 4, 5)
    )
    cancelled, runs = jobs_of(client, "cancelled"), completed_runs(service)
    wait_until(lambda: leftovers(service) == [], 20, "nothing is under way")
    with frozen(service):
        other = client.submit(shared)["job_id"]
        began = time.monotonic()
        for path in (keyed, alone, shared):
            key = {"Idempotency-Key": f"key-{is_streamed}"} if path == keyed else {}
            with sdk_of(service, timeout=1, default_headers=key) as sdk:
                create = sdk.audio.transcriptions.create
                if is_streamed:
                    create(file=path, model=WHISPER, stream=True).close()
                else:
                    with pytest.raises(openai.APITimeoutError):
                        create(file=path, model=WHISPER)
        wait_until(
            lambda: jobs_of(client, "cancelled") == cancelled + 2, 40, "their jobs are cancelled"
        )
        assert time.monotonic() - began > RETURN_SECONDS
        assert client.stats()["queue"]["queued"] == 2
        assert other in leftovers(service)
        assert len(leftovers(service)) == 2
    client.wait(other)
    assert client.text(other) == FOX_WORDS
    wait_until(lambda: completed_runs(service) == runs + 2, 20, "the one with a key is done")
    page = client.http.get("/metrics").text
    assert metric(page, "whisper_waiters", kind="openai") == 0


@pytest.fixture
def busy(start, tmp_path) -> Iterator[tuple[Service, Client]]:
    """A service whose queue is longer than half a second, and whose worker sleeps."""
    service, client = start(worker_slots="1", cpu_threads="1")
    client.wait(client.submit(FOX)["job_id"])
    with frozen(service):
        for number in range(30):
            last = client.submit(variant(tmp_path / "queued.wav", 100 + number))["job_id"]
        wait_until(
            lambda: (client.status(last)["estimated_wait_seconds"] or 0) > 1, 10, "it is predicted"
        )
        yield service, client


IMPATIENT = {"x-stainless-read-timeout": "0.5"}


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
        early_answer(service, fields + stream + file, 2, **impatient)
    again = {**impatient, "x_stainless_retry_count": "1"}
    with pytest.raises(TimeoutError):
        early_answer(service, fields + file, 2, **again)


def test_the_sdk_comes_back_when_it_is_told_to(busy, tmp_path):
    """After Retry-After, with the same file; by then the queue is short."""
    service, _ = busy
    path = variant(tmp_path / "a.wav", 1)
    with sdk_of(service, max_retries=5) as sdk:
        threading.Timer(0.5, service.kill, ("worker", signal.SIGCONT)).start()
        answer = sdk.audio.transcriptions.with_raw_response.create(
            file=path, model=WHISPER, extra_headers=IMPATIENT
        )
    assert answer.retries_taken > 0
    assert answer.parse().text == FOX_WORDS


def test_a_transcription_that_takes_too_long_can_be_fetched_by_its_job(start, tmp_path):
    """Or waited for again: the job goes on."""
    service, client = start(max_wait_seconds="1")
    with frozen(service), sdk_of(service) as sdk:
        with pytest.raises(openai.InternalServerError) as caught:
            sdk.audio.transcriptions.create(file=FOX, model=WHISPER)
        assert caught.value.status_code == 503
        assert details(caught.value)["code"] == "still_running"
    job = caught.value.response.headers["x-job-id"]
    client.wait(job)
    assert client.text(job) == FOX_WORDS


def test_a_replica_that_stops_sends_its_waiting_clients_elsewhere(start):
    """503 at once, or an event; the jobs go on, and who sends again joins them."""
    service, _ = start()
    with frozen(service), sdk_of(service) as sdk, ThreadPoolExecutor(1) as pool:
        stream = sdk.audio.transcriptions.create(file=FOX, model=WHISPER, stream=True)
        call = pool.submit(sdk.audio.transcriptions.create, file=FOX, model=WHISPER)
        client = Client(service)
        wait_until(lambda: jobs_of(client) == 2, 10, "both wait")
        client.http.close()
        service.kill("API", signal.SIGTERM)
        with pytest.raises(openai.InternalServerError) as caught:
            call.result(20)
        assert details(caught.value)["code"] == "still_running"
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert details(caught.value)["code"] == "still_running"


def test_a_job_that_somebody_cancels_is_not_tried_again(service, client, tmp_path):
    """409 would be, by OpenAI's clients."""
    path = variant(tmp_path / "a.wav", 4)
    with frozen(service), sdk_of(service, max_retries=2) as sdk, ThreadPoolExecutor(1) as pool:
        before = jobs_of(client)
        call = pool.submit(sdk.audio.transcriptions.create, file=path, model=WHISPER)
        wait_until(lambda: jobs_of(client) == before + 1, 10, "it has begun")
        (job,) = leftovers(service)
        client.http.delete(f"/jobs/{job}")
        with pytest.raises(openai.ConflictError) as caught:
            call.result(20)
    assert details(caught.value)["code"] == "job_cancelled"
    assert jobs_of(client) == before + 1
