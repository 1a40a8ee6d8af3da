"""The API as a user meets it: the seed's own commands, sharing, bad input, big input."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import httpx2
import pytest
import srt
import webvtt

from shared import keys
from tests.conftest import FOX, FOX_WORDS, wait_until
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
from tests.e2e.streams import Stream
from tests.e2e.test_failures import long_file
from tests.model.media import encode, tone, video

AS_JSON = {"Content-Type": "application/json"}
HALF_A_LETTER = rb'{"url": "http://example.org/\ud800"}'  # of a surrogate pair


def problem(answer: httpx2.Response) -> tuple[int, str]:
    """Checks the shape that every error has; returns status and code."""
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == answer.status_code
    assert isinstance(body["detail"], str)
    assert body["detail"]
    assert body["request_id"] == answer.headers["x-request-id"]
    return answer.status_code, body["code"]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_three_curl_commands_of_the_readme_work(service, client):
    """Submit, status, result: as a user types them."""
    curl = ["curl", "-sS", "--noproxy", "*"]
    form = ["-F", f"file=@{FOX}", "-F", "vad_filter=true", "-F", "language=en"]
    submit = [*curl, "-X", "POST", f"{service.base_url}/transcribe", *form]
    job = json.loads(subprocess.check_output(submit))
    assert job["status"] == "queued"
    assert job["message"] == "Transcription job submitted successfully"
    client.wait(job["job_id"])
    status = json.loads(
        subprocess.check_output([*curl, f"{service.base_url}/status/{job['job_id']}"])
    )
    assert (status["status"], status["progress"]) == ("completed", 1.0)
    result = json.loads(
        subprocess.check_output([*curl, f"{service.base_url}/result/{job['job_id']}"])
    )
    assert result["text"] == FOX_WORDS
    assert result["language"] == "en"
    assert result["duration"] == pytest.approx(3.2, abs=0.3)


def test_form_fields_reach_the_model_as_they_were_sent(client, tmp_path):
    """Fields of the form, not of the query: the model is told German, and believes it."""
    job = client.submit(language="de", vad_filter="false", word_timestamps="true")
    client.wait(job["job_id"])
    result = client.http.get(f"/result/{job['job_id']}").json()
    assert (result["language"], result["language_probability"]) == ("de", 1.0)
    assert result["duration_after_vad"] == result["duration"]
    assert result["segments"][0]["words"]
    detected = client.submit(variant(tmp_path / "a.wav", 1))
    client.wait(detected["job_id"])
    result = client.http.get(f"/result/{detected['job_id']}").json()
    assert (result["language"], result["text"]) == ("en", FOX_WORDS)
    assert result["segments"][0].get("words") is None


def test_metadata_comes_back_wherever_the_job_is_shown(client, tmp_path):
    """Each job has its own, although they share a transcription."""
    path, mine = (
        variant(tmp_path / "a.wav", 4),
        {"order": 17, "who": 'Müller "&<>\u0000', "n": [None]},
    )
    first = client.submit(path, metadata=json.dumps(mine), priority="high")
    assert (first["metadata"], first["priority"]) == (mine, "high")
    status = client.wait(first["job_id"])
    assert (status["metadata"], status["priority"]) == (mine, "high")
    second = client.submit(path, metadata='{"order": 18}')
    assert (second["status"], second["metadata"], second["priority"]) == (
        "completed",
        {"order": 18},
        "normal",
    )
    for job_id, expected in ((first["job_id"], mine), (second["job_id"], {"order": 18})):
        result = client.http.get(f"/result/{job_id}").json()
        assert (result["metadata"], result["text"]) == (expected, FOX_WORDS)
        assert client.http.get(f"/jobs/{job_id}/partial").json()["metadata"] == expected
        assert client.http.delete(f"/jobs/{job_id}").json()["metadata"] == expected


def test_the_same_file_twice_is_one_model_run(service, client, tmp_path):
    path = variant(tmp_path / "a.wav", 2)
    before = counted_runs(service)
    first = client.submit(path)
    client.wait(first["job_id"])
    second = client.submit(path)
    assert (second["status"], second["deduplicated"]) == ("completed", True)
    assert client.text(second["job_id"]) == FOX_WORDS
    expect_completed_runs(service, before + 1)
    other = client.submit(path, beam_size="1")
    assert not other["deduplicated"]
    client.wait(other["job_id"])
    expect_completed_runs(service, before + 2)


def test_fifty_identical_uploads_at_once_are_one_model_run(service, client, tmp_path):
    path = variant(tmp_path / "a.wav", 3)
    before = counted_runs(service)
    with ThreadPoolExecutor(25) as pool:
        jobs = list(pool.map(lambda _: client.submit(path), range(50)))
    assert len({job["job_id"] for job in jobs}) == 50
    for job in jobs:
        client.wait(job["job_id"])
        assert client.text(job["job_id"]) == FOX_WORDS
    expect_completed_runs(service, before + 1)
    assert sum(job["deduplicated"] for job in jobs) == 49
    wait_until(lambda: leftovers(service) == [], 30, "uploads are gone")


def test_every_format_of_a_finished_job(client):
    job = client.submit()
    client.wait(job["job_id"])
    for name, begin in {
        "json": "{",
        "text": FOX_WORDS,
        "srt": "1\n00:00:0",
        "vtt": "WEBVTT\n",
        "tsv": "start\tend\ttext\n",
        "verbose_json": "{",
    }.items():
        answer = client.http.get(f"/result/{job['job_id']}", params={"format": name})
        assert answer.status_code == 200
        assert answer.text.startswith(begin), name
        assert FOX_WORDS in answer.text
    wrong = client.http.get(f"/result/{job['job_id']}", params={"format": "doc"})
    assert problem(wrong) == (422, "invalid_field")


def test_captions_of_a_finished_job_follow_the_rules_of_each_request(client):
    """The words' times are those of the recording; nothing is transcribed again."""
    job = client.submit(word_timestamps="true")
    client.wait(job["job_id"])

    def captions(**rules) -> str:
        answer = client.http.get(f"/result/{job['job_id']}", params=rules)
        assert answer.status_code == 200, answer.text
        return answer.text

    read = list(srt.parse(captions(format="srt", max_line_chars="12", max_lines="1")))
    assert " ".join(cue.content for cue in read) == FOX_WORDS
    assert all(len(cue.content) <= 12 for cue in read)
    words = client.http.get(f"/result/{job['job_id']}").json()["segments"][0]["words"]
    starts = [word["start"] for word in words]
    assert len(read) > 2
    assert all(round(cue.start.total_seconds(), 3) in starts for cue in read)
    karaoke = captions(format="vtt", words="true")
    assert karaoke.count("<00:00:0") == len(words) - 1
    (cue,) = webvtt.from_string(karaoke, strict=True).captions
    assert cue.text == FOX_WORDS


def test_rules_that_do_not_fit_are_refused_by_name(client):
    job = client.submit()
    client.wait(job["job_id"])
    for query, field in {
        "format=srt&max_lines=0": "max_lines",
        "format=srt&max_line_chars=many": "max_line_chars",
        "format=text&min_duration=1": "min_duration",
        "format=srt&words=true": "words",
        "format=vtt&words=true": "words",
        "fromat=srt": "fromat",
    }.items():
        answer = client.http.get(f"/result/{job['job_id']}?{query}")
        assert problem(answer) == (422, "invalid_field"), query
        assert [error["field"] for error in answer.json()["errors"]] == [field]


def test_a_refused_upload_has_a_code_a_sentence_and_leaves_nothing(service, client):
    """What can be seen in the request is refused at once."""
    post, audio = client.http.post, FOX.read_bytes()
    as_file = {"file": ("a.mp3", audio)}
    refused = {
        "no file": (post("/transcribe", data={"language": "en"}), 422),
        "no body": (post("/transcribe"), 400),
        "empty file": (post("/transcribe", files={"file": ("a.mp3", b"")}), 422),
        "text": (post("/transcribe", files={"file": ("a.mp3", b"hello\n" * 99)}), 415),
        "wrong value": (post("/transcribe", files=as_file, data={"language": "xx"}), 422),
        "unknown field": (post("/transcribe", files=as_file, data={"langauge": "en"}), 422),
        "out of range": (post("/transcribe", files=as_file, data={"beam_size": "0"}), 422),
        "no object": (post("/transcribe", files=as_file, data={"metadata": "[]"}), 422),
        "too deep": (post("/transcribe", files=as_file, data={"metadata": "[" * 9000}), 422),
        "no priority": (post("/transcribe", files=as_file, data={"priority": "9"}), 422),
        "no address": (post("/transcribe", json={"file": "x"}), 422),
        "half a letter": (post("/transcribe", content=HALF_A_LETTER, headers=AS_JSON), 422),
    }
    digits = client.http.get("/jobs", params={"batch": str(uuid4()), "cursor": "\u0661"})
    assert problem(digits)[0] == 422
    for what, (answer, status) in refused.items():
        assert problem(answer)[0] == status, what
    wrong = refused["wrong value"][0].json()
    assert wrong["errors"] == [
        {
            "field": "language",
            "message": "'xx' is no language that Whisper knows; use a code like 'en'",
        }
    ]
    assert refused["unknown field"][0].json()["errors"][0]["field"] == "langauge"
    wait_until(lambda: leftovers(service) == [], 30, "nothing is left behind")


def test_a_file_that_can_not_be_transcribed_fails_with_its_own_code(service, client, tmp_path):
    """What only decoding shows becomes the job's error, and the file is not kept."""
    cut = tmp_path / "cut.wav"
    cut.write_bytes(encode(tmp_path / "whole.wav", tone(20)).read_bytes()[:100_000])
    garbage = tmp_path / "garbage.mp3"
    garbage.write_bytes(bytes(range(256)) * 40)
    for path, code in {
        cut: "truncated_media",
        video(tmp_path / "silent.mp4"): "no_audio_stream",
        garbage: "unreadable_media",
    }.items():
        job = client.submit(path)
        status = client.wait(job["job_id"], "failed")
        assert status["error"]["code"] == code
        assert status["error"]["message"]
        result = client.http.get(f"/result/{job['job_id']}")
        assert problem(result) == (422, code)
    wait_until(lambda: leftovers(service) == [], 30, "uploads are gone")
    partial = client.submit(cut, allow_partial="true")
    client.wait(partial["job_id"])
    result = client.http.get(f"/result/{partial['job_id']}").json()
    assert "truncated_media" in [warning["code"] for warning in result["warnings"]]


def test_an_unknown_job_is_404_everywhere(client):
    for name in (str(uuid4()), "abc123", "../../etc/passwd", "x" * 500):
        for method, path in (("GET", "status"), ("GET", "result"), ("DELETE", "jobs")):
            answer = client.http.request(method, f"/{path}/{name}")
            assert answer.status_code == 404, (path, name)
            assert problem(answer)[1] in {"job_not_found", "not_found"}


def test_unknown_addresses_and_methods_have_the_same_shape(client):
    assert problem(client.http.get("/nowhere")) == (404, "not_found")
    assert problem(client.http.put("/transcribe")) == (405, "method_not_allowed")


def test_deleting_a_finished_job_erases_it(client, tmp_path):
    job = client.submit(variant(tmp_path / "a.wav", 4))
    client.wait(job["job_id"])
    assert client.http.delete(f"/jobs/{job['job_id']}").json()["status"] == "deleted"
    for path in ("status", "result"):
        assert problem(client.http.get(f"/{path}/{job['job_id']}")) == (404, "job_not_found")
    assert not client.submit(tmp_path / "a.wav")["deduplicated"], "the transcript is gone, too"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One that takes small files only, and forgets soon."""
    settings = {**QUICK, "max_file_size_mb": "1", "result_ttl_seconds": "1"}
    with running(tmp_path_factory.mktemp("strict"), settings) as service:
        client = Client(service)
        yield client
        client.http.close()


def test_a_file_over_the_limit_is_refused_while_it_is_sent(strict, tmp_path):
    """By its announced length before a byte is read, and by its bytes when none was announced."""
    service, client = strict.service, strict

    def endless():
        block = bytes(range(256)) * 256
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield head
        for _ in range(3_000):  # 200 MB: this client sends all before it reads the answer
            yield block

    kind = {"content-type": "multipart/form-data; boundary=x"}
    answer = client.http.post("/transcribe", content=endless(), headers=kind)
    assert problem(answer) == (413, "file_too_large")
    assert answer.headers["connection"] == "close"
    with socket.create_connection(("127.0.0.1", service.settings.port), 10) as connection:
        connection.sendall(
            b"POST /transcribe HTTP/1.1\r\nHost: a\r\nContent-Length: 99000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    assert leftovers(service) == []
    small = tmp_path / "small.wav"
    small.write_bytes(FOX.read_bytes()[:1000])
    assert client.submit(small)["job_id"], "the service goes on"


def test_a_client_that_vanishes_leaves_nothing(service, client):
    with socket.create_connection(("127.0.0.1", service.settings.port), 10) as connection:
        connection.sendall(
            b"POST /transcribe HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\nContent-Disposition: "
            b'form-data; name="file"; filename="a"\r\n\r\n' + bytes(2_000_000)
        )
        wait_until(lambda: leftovers(service), 30, "the upload has begun")
    wait_until(lambda: leftovers(service) == [], 30, "and is gone")
    page = client.http.get("/metrics").text
    assert metric(page, "http_requests_total", status="500") == 0, "and is no error of ours"


def test_an_upload_of_a_gigabyte_costs_the_api_no_memory(start, tmp_path):
    """Less than 32 MB above what it had, measured as the peak of its resident memory."""
    service, client = start(max_file_size_mb="2000")
    client.submit()
    path = tmp_path / "big.wav"
    with path.open("wb") as file:
        file.write(bytes(range(256)) * 16)
        file.truncate(1024**3)  # sparse: zeros that need no disk
    before = peak_bytes(service)
    job = client.submit(path)
    assert peak_bytes(service) - before < 32 * 1024**2
    client.http.delete(f"/jobs/{job['job_id']}")


def peak_bytes(service) -> int:
    with open(f"/proc/{service.popen('API').pid}/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (prometheus)")
def test_the_metrics_are_what_prometheus_expects(service, client):
    """Both pages pass promtool's lint."""
    client.wait(client.submit()["job_id"])
    for url in (service.base_url, service.worker_url):
        page = httpx2.get(url + "/metrics", trust_env=False)
        assert page.headers["content-type"].startswith("text/plain")
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=page.content, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_counters_agree_with_what_was_done(service, client, tmp_path):
    """Requests, jobs, cache and audio seconds: each counted once, on the side that saw it."""

    def counted() -> dict[str, float]:
        api = client.http.get("/metrics").text
        worker = httpx2.get(service.worker_url + "/metrics", trust_env=False).text
        return {
            "accepted": metric(api, "whisper_jobs_submitted_total", endpoint="transcribe"),
            "hits": metric(api, "whisper_cache_requests_total", result="hit"),
            "misses": metric(api, "whisper_cache_requests_total", result="miss"),
            "refused": metric(api, "whisper_jobs_rejected_total", reason="empty"),
            "posts": metric(api, "http_requests_total", route="/transcribe", method="POST"),
            "uploads": metric(api, "whisper_upload_size_bytes_count"),
            "runs": metric(worker, "whisper_jobs_total", status="completed"),
            "audio": metric(worker, "whisper_audio_seconds_total"),
            "waits": metric(worker, "whisper_job_queue_wait_seconds_count"),
        }

    runs = counted_runs(service)
    before = counted()
    path = variant(tmp_path / "a.wav", 5)
    for _ in range(2):
        client.wait(client.submit(path)["job_id"])
    client.http.post("/transcribe", files={"file": ("a.wav", b"")})
    expect_completed_runs(service, runs + 1)
    grown = {name: value - before[name] for name, value in counted().items()}
    assert grown.pop("audio") == pytest.approx(3.2, abs=0.3)
    wanted = {"accepted": 2, "hits": 1, "misses": 1, "refused": 1, "posts": 3, "uploads": 2}
    assert grown == {**wanted, "runs": 1, "waits": 1}
    page = client.http.get("/metrics").text
    assert metric(page, "whisper_queue_depth") == 0
    assert metric(page, "whisper_workers", state="warm") == 1
    assert metric(page, "whisper_store_up") == 1
    assert "/nowhere" not in page


def test_health_and_stats_tell_the_truth(service, client):
    health = client.http.get("/health").json()
    assert (health["status"], health["workers"]["warm"]) == ("ok", 1)
    assert client.http.get("/health/live").status_code == 200
    assert client.http.get("/health/ready").status_code == 200
    stats = client.stats()
    assert stats["workers"][0]["model"] == "demo"
    assert stats["queue"] == {
        "queued": 0,
        "parts": 0,
        "oldest_seconds": 0.0,
        "backlog_seconds": 0.0,
        "wait_seconds": 0.0,
        "processing": 0,
    }


def test_an_error_of_ours_has_the_shape_of_every_other(strict):
    """500 with a request id, and without a word of what happened inside."""
    uploads = strict.service.settings.data_dir / "uploads"
    away = uploads.rename(uploads.with_name("elsewhere"))
    answer = strict.http.post("/transcribe", files={"file": FOX.read_bytes()})
    away.rename(uploads)
    assert problem(answer) == (500, "internal_error")
    assert "uploads" not in answer.text
    assert metric(strict.http.get("/metrics").text, "http_requests_total", status="500") == 1


def test_a_request_keeps_the_id_that_a_proxy_gave_it(client):
    known = client.http.get("/health", headers={"X-Request-ID": "abc-123"})
    assert known.headers["x-request-id"] == "abc-123"
    strange = client.http.get("/health", headers={"X-Request-ID": "a b;c"})
    assert strange.headers["x-request-id"] != "a b;c"


def test_a_result_that_is_not_ready_says_when_to_ask_again(start, raw_of, tmp_path):
    """409 with Retry-After while it waits; the place in the queue is told."""
    service, client = start()
    service.kill("worker")
    first, second = (client.submit(variant(tmp_path / f"{n}.wav", n)) for n in (1, 2))
    answer = client.http.get(f"/result/{second['job_id']}")
    assert problem(answer) == (409, "result_not_ready")
    assert int(answer.headers["retry-after"]) >= 1
    status = client.http.get(f"/status/{second['job_id']}")
    assert status.json()["queue_position"] == 2
    assert int(status.headers["retry-after"]) >= 1
    cancelled = client.http.delete(first["links"]["cancel"])
    assert cancelled.json()["status"] == "cancelled"
    assert client.status(second["job_id"])["queue_position"] == 1
    assert problem(client.http.get(first["links"]["result"])) == (409, "job_cancelled")
    raw = raw_of(service)
    for report in raw.keys(keys.worker("*")):
        assert 0 < raw.pttl(report) <= 10_000, "a dead worker is forgotten by itself"
        raw.delete(report)  # and now
    wait_until(lambda: client.http.get("/health").json()["status"] == "degraded")
    service.restart("worker")
    client.wait(second["job_id"])


def test_a_result_past_its_retention_is_410(strict):
    job = strict.submit()
    wait_until(lambda: strict.http.get(job["links"]["result"]).status_code == 410, 30)
    assert problem(strict.http.get(job["links"]["status"])) == (410, "job_expired")
    assert strict.service.popen("worker").poll() is None


def test_a_long_recording_shows_its_progress(client, tmp_path):
    """Between 0 and 1, and never backwards; each heartbeat tells it."""
    job = client.submit(long_file(tmp_path / "long.wav", 200))  # far from its end in this test
    seen: list[float] = []

    def has_grown_twice() -> bool:
        status = client.status(job["job_id"])
        assert status["status"] in {"queued", "processing"}
        seen.append(status["progress"])
        return len(set(seen)) > 2

    wait_until(has_grown_twice, 60)
    assert seen == sorted(seen)
    assert 0 < seen[-1] < 1
    client.http.delete(f"/jobs/{job['job_id']}")


def test_the_events_of_a_job_are_followed_to_its_end(client, tmp_path):
    """The demo model, and what it heard; tests/e2e/test_waiting.py does each step by hand."""
    job = client.submit(variant(tmp_path / "a.wav", 6))["job_id"]
    with Stream(client, job) as stream:
        stream.until_over()
    assert stream.names[-1] == "completed"
    words = [event.data["text"] for event in stream.events if event.name == "segment"]
    assert "".join(words).strip() == FOX_WORDS == client.text(job)
