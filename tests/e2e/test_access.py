"""AUTH=keys as callers see it: who has no key gets nothing, who has one gets its own jobs and no
others, and no more than its limits."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from api.keys import parser, run
from example_client import RateLimited, RequestRejected, WhisperClient
from local.service import Service
from shared import keys
from tests.conftest import FOX, FOX_WORDS, PLAIN, ROOT, wait_until
from tests.e2e.conftest import QUICK, Client, long_ago, metric, running, variant

MIB = 1024 * 1024
WORKERS = 2  # API processes, which count together


def command(service: Service, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "api.keys", *words],
        env={"PATH": "", "PYTHONPATH": str(ROOT), "REDIS_URL": service.redis_url},
        cwd=service.settings.data_dir,  # no .env here
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def new_key(service: Service, name: str, *words: str) -> str:
    """What the command does, without a process of its own, which would take a second."""
    arguments = parser().parse_args(["create", "--name", name, *words])
    with redirect_stdout(StringIO()) as printed:
        assert asyncio.run(run(arguments, service.settings)) == 0
    return printed.getvalue().strip()


class Holder(Client):
    """A caller with a key."""

    def __init__(self, service: Service, key: str):
        super().__init__(service)
        self.key = key
        self.http.headers["Authorization"] = f"Bearer {key}"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("service")
    settings = {"auth": "keys", "workers": str(WORKERS), "max_file_size_mb": "300"}
    with running(folder, {**QUICK, **settings, "log_level": "WARNING"}) as service:
        yield service


@pytest.fixture(scope="module")
def open_handed(tmp_path_factory: pytest.TempPathFactory):
    """Callers share transcripts here, and some other origins may ask."""
    settings = {"auth": "keys", "share_results": "true"}
    settings["cors_origins"] = "https://app.example.org, http://localhost:3000"
    folder = tmp_path_factory.mktemp("open-handed")
    with running(folder, {**QUICK, **settings}) as service:
        yield service


@pytest.fixture
def holder(service: Service):
    """Makes callers, each with a key of a new name."""
    made: list[Holder] = []

    def make(*words: str, name: str = "", of: Service = service) -> Holder:
        made.append(Holder(of, new_key(of, name or f"key-{uuid4().hex[:8]}", *words)))
        return made[-1]

    yield make
    for each in made:
        each.http.close()


def problem(answer: httpx2.Response) -> dict[str, Any]:
    """What a refusal says, but for what differs in each."""
    told = answer.json()
    assert told.pop("request_id") == answer.headers["x-request-id"]
    return told


def guarded(job_id: str) -> list[tuple[str, str]]:
    return [
        ("GET", f"/status/{job_id}"),
        ("GET", f"/result/{job_id}"),
        ("GET", f"/result/{job_id}?format=srt"),
        ("GET", f"/jobs/{job_id}/partial"),
        ("POST", f"/jobs/{job_id}/cancel"),
        ("DELETE", f"/jobs/{job_id}"),
        ("DELETE", f"/job/{job_id}"),
    ]


# --- Who has no key -------------------------------------------------------------------------------


def test_without_a_valid_key_there_is_nothing_but_health_and_documents(service, holder):
    """Every operation of the document is tried: one that is added later is guarded, too."""
    good = holder().key
    wrong = good[:-1] + ("A" if good[-1] != "A" else "B")
    with httpx2.Client(base_url=service.base_url, trust_env=False, timeout=30) as http:
        document = http.get("/openapi.json").json()
        operations = [
            (method.upper(), re.sub(r"{\w+}", str(uuid4()), path), operation)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        ]
        is_open = {path for _, path, operation in operations if "security" not in operation}
        assert is_open == {"/health", "/health/live", "/health/ready"}
        for path in (*is_open, "/docs", "/docs/errors", "/static/docs.js"):
            assert http.get(path).status_code == 200, path
        unheard = [("GET", "/nothing"), ("PUT", "/transcribe"), ("GET", "/metrics%0A")]
        headers: list[dict[str, str]] = [
            {},
            {"Authorization": f"Bearer {wrong}"},
            {"X-API-Key": wrong},
            {"Authorization": "Bearer"},
            {"Authorization": f"Basic {good}"},
            {"Cookie": f"key={good}"},
        ]
        tried = [(m, p) for m, p, _ in operations if p not in is_open] + unheard
        assert len(tried) > 8
        for method, path in tried:
            for shown in headers:
                answer = http.request(method, f"{path}?api_key={good}", headers=shown)
                assert answer.status_code == 401, (method, path, shown)
                assert answer.headers["www-authenticate"] == "Bearer"
                if path.startswith("/v1/"):
                    assert answer.json()["error"]["code"] == "invalid_api_key"
                else:
                    assert answer.json()["code"] == "unauthorized"
        for path in ("/static/%2e%2e/metrics", "/static/..%2fmetrics"):
            assert http.get(path).status_code == 404, path
        for shown in ({"Authorization": f"bearer {good}"}, {"X-API-Key": good}):
            assert http.get(f"/status/{uuid4()}", headers=shown).status_code == 404


def test_an_upload_with_a_bad_key_is_refused_before_its_body(service):
    """200 MB, 20 times at once: some kilobytes of each are read, and nothing is written."""
    size, bad = 200 * MIB, f"fwa_{'0' * 12}_{'A' * 43}"
    head = (
        f"POST /transcribe HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bad}\r\n"
        f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {size}\r\n\r\n"
    )
    seconds, before = [], bytes_read(service)

    def send() -> None:
        import socket

        with socket.create_connection(("127.0.0.1", service.settings.port)) as line:
            line.settimeout(20)
            began = time.perf_counter()
            line.sendall(head.encode())
            pump = threading.Thread(target=pour, args=(line, size), daemon=True)
            pump.start()
            assert line.recv(64).startswith(b"HTTP/1.1 401 ")
            seconds.append(time.perf_counter() - began)
            pump.join(20)
            assert not pump.is_alive(), "the connection was closed"

    senders = [threading.Thread(target=send) for _ in range(20)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(30)
    assert len(seconds) == 20
    each = (bytes_read(service) - before) / 20
    slow = sorted(seconds)[18]
    print(f"\n{each / 1024:.0f} KiB read of each, 95 % answered within {slow * 1000:.0f} ms")
    assert each <= 256 * 1024, "so it was answered before nearly all of it was sent"
    assert list((service.settings.data_dir / "uploads").iterdir()) == []


def pour(line: Any, size: int) -> None:
    try:
        for _ in range(size // 65536):
            line.sendall(bytes(65536))
    except OSError:
        return


def bytes_read(service: Service) -> int:
    """By the API's processes, from files and connections."""
    main = service.popen("API").pid
    children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
    counters = [Path(f"/proc/{pid}/io").read_text() for pid in (main, *children)]
    return sum(int(re.search(r"rchar: (\d+)", text)[1]) for text in counters)


# --- What is whose --------------------------------------------------------------------------------


def test_a_foreign_job_is_answered_as_one_that_never_was(service, holder, tmp_path):
    """On every endpoint, in every state: the same status, headers and words."""
    owner, stranger, admin = holder(), holder(), holder("--scopes", "admin")
    done = owner.submit(variant(tmp_path / "done.wav", 1))["job_id"]
    owner.wait(done)
    cancelled = owner.submit(variant(tmp_path / "cancelled.wav", 2))["job_id"]
    owner.http.delete(f"/jobs/{cancelled}").raise_for_status()
    for job in (done, cancelled):
        for (method, foreign), (_, missing) in zip(
            guarded(job), guarded(str(uuid4())), strict=True
        ):
            seen, never = (stranger.http.request(method, path) for path in (foreign, missing))
            assert seen.status_code == never.status_code == 404, (method, foreign)
            assert problem(seen) == problem(never)
            ignored = {"x-request-id", "date"}
            for name in (set(seen.headers) | set(never.headers)) - ignored:
                assert seen.headers[name] == never.headers[name], name
    assert owner.text(done).strip() == FOX_WORDS
    assert admin.text(done).strip() == FOX_WORDS
    assert owner.status(cancelled)["status"] == "cancelled"
    assert admin.http.delete(f"/jobs/{done}").json()["status"] == "deleted"
    assert owner.http.get(f"/status/{done}").status_code == 404


def test_the_answer_does_not_tell_whether_another_had_the_file(service, holder, tmp_path):
    file = variant(tmp_path / "same.wav", 3)
    first, second = holder(), holder()
    first.wait(first.submit(file)["job_id"])
    told = second.submit(file)
    assert (told["deduplicated"], told["status"]) == (False, "queued")
    seen = second.wait(told["job_id"])
    assert (seen["attempts"], seen["deduplicated"]) == (1, False)
    again = first.submit(file)
    assert (again["deduplicated"], again["status"]) == (True, "completed")


def test_a_new_key_of_the_same_name_takes_over(service, holder, tmp_path):
    name = "rotated"
    old = holder(name=name)
    job = old.submit(variant(tmp_path / "a.wav", 4))["job_id"]
    refused = command(service, "create", "--name", name)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "--another" in refused.stderr
    new = holder("--another", name=name)
    new.wait(job)
    old_id = old.key.split("_")[1]
    assert command(service, "revoke", old_id).returncode == 0
    wait_until(lambda: old.http.get(f"/status/{job}").status_code == 401, 30, "it is revoked")
    assert new.text(job).strip() == FOX_WORDS


def test_the_local_command_finds_the_redis_of_its_folder(service, tmp_path):
    def local(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "local", "keys", *words],
            env={"PATH": "", "PYTHONPATH": str(ROOT), "DATA_DIR": str(folder)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    made = local(service.settings.data_dir, "create", "--name", "local")
    assert made.returncode == 0, made.stderr
    headers = {"X-API-Key": made.stdout.strip()}
    asked = httpx2.get(f"{service.base_url}/status/{uuid4()}", headers=headers, trust_env=False)
    assert asked.status_code == 404
    assert " local " in local(service.settings.data_dir, "list").stdout
    nothing = local(tmp_path, "list")
    assert nothing.returncode != 0
    assert "make run" in nothing.stderr


def test_scopes_are_kept_apart(service, holder):
    missing = str(uuid4())
    asked = {
        "submit": ("DELETE", f"/jobs/{missing}", 404),
        "read": ("GET", f"/status/{missing}", 404),
        "metrics": ("GET", "/metrics", 200),
    }
    for scope in asked:
        caller = holder("--scopes", scope)
        for wanted, (method, path, status) in asked.items():
            answer = caller.http.request(method, path)
            assert answer.status_code == (status if wanted == scope else 403), (scope, wanted)
            if wanted != scope:
                assert f"`{wanted}`" in answer.json()["detail"]
        upload = caller.http.post("/transcribe", files={"file": b"\x00"})
        assert upload.status_code == (202 if scope == "submit" else 403)
        for path in ("/stats", "/metrics%0A"):  # the router takes the latter for /metrics
            answer = caller.http.get(path)
            assert answer.status_code == (200 if scope == "metrics" else 403), path
    admin = holder("--scopes", "admin")
    assert [admin.http.get(path).status_code for path in ("/stats", "/metrics")] == [200, 200]


def test_a_key_that_may_not_hurry_sends_no_high_priority(service, holder, tmp_path):
    """Whichever way in; and a refusal leaves nothing."""
    path = variant(tmp_path / "new.wav", 1)
    audio = path.read_bytes()
    ways: list[tuple[str, dict[str, Any]]] = [
        ("/transcribe", {"files": {"file": audio}, "data": {}}),
        ("/batches", {"files": [("file", audio)] * 2, "data": {}}),
        ("/v1/audio/transcriptions", {"files": {"file": audio}, "data": {"model": "whisper-1"}}),
        ("/transcribe/by-digest", {"data": {"sha256": hashlib.sha256(audio).hexdigest()}}),
    ]
    plain = holder()
    first = plain.submit(path, priority="low")["job_id"]
    uploads = set((service.settings.data_dir / "uploads").iterdir())
    for way, sent in ways:
        sent["data"]["priority"] = "high"
        answer = plain.http.post(way, **sent)
        assert (answer.status_code, "scope `priority`" in answer.text) == (403, True), way
    assert set((service.settings.data_dir / "uploads").iterdir()) <= uploads
    assert [job["job_id"] for job in plain.http.get("/jobs").json()["jobs"]] == [first]
    for scopes in ("submit,read,priority", "admin"):
        hurried = holder("--scopes", scopes)
        assert hurried.submit(FOX, priority="high")["priority"] == "high"


# --- Limits ---------------------------------------------------------------------------------------


def test_requests_are_limited_over_all_processes(service, holder):
    caller = holder("--rate", "30/hour")
    answers = [
        httpx2.get(  # a connection each, so that both processes get some
            f"{service.base_url}/status/{uuid4()}",
            headers={"X-API-Key": caller.key, "X-Forwarded-For": f"203.0.113.{n}"},
            **PLAIN,
        )
        for n in range(60)
    ]
    assert [answer.status_code for answer in answers].count(404) == 30
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 30
    assert {answer.json()["code"] for answer in refused} == {"rate_limited"}
    assert all(100 <= int(answer.headers["retry-after"]) <= 120 for answer in refused)
    with (
        WhisperClient(service.base_url, api_key=caller.key, max_retries=0) as client,
        pytest.raises(RateLimited) as limited,
    ):
        client.status(str(uuid4()))
    assert 100 <= limited.value.retry_after <= 120


def test_unfinished_jobs_and_audio_are_limited(service, holder, raw_of, tmp_path):
    caller = holder("--concurrent", "2", "--audio-minutes", "1")
    name = raw_of(service).hget(keys.api_key(caller.key.split("_")[1]), "name")
    raw_of(service).hset(keys.unfinished(name), mapping={"one": 0, "two": 0})  # they take long
    with FOX.open("rb") as file:
        refused = caller.http.post("/transcribe", files={"file": file})
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_jobs")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert caller.http.post(f"/jobs/{uuid4()}/cancel").status_code == 404, "that makes room"
    raw_of(service).delete(keys.unfinished(name))
    seen = caller.wait(caller.submit(variant(tmp_path / "a.wav", 5))["job_id"])
    assert int(raw_of(service).get(keys.audio_used(name))) == round(seen["duration"] * 1000)

    raw_of(service).set(keys.audio_used(name), 60_000)
    with FOX.open("rb") as file:
        refused = caller.http.post("/transcribe", files={"file": file})
    assert (refused.status_code, refused.json()["code"]) == (429, "audio_minutes_used")
    assert 0 < int(refused.headers["retry-after"]) <= 86_400
    page = holder("--scopes", "metrics").http.get("/metrics").text
    assert metric(page, "whisper_jobs_rejected_total", reason="limit") == 2


# --- The rest -------------------------------------------------------------------------------------


def test_the_client_and_its_command_use_a_key(service, holder):
    key = holder().key
    with WhisperClient(service.base_url, api_key=key) as client:
        assert client.transcribe_file(FOX, language="en")["text"].strip() == FOX_WORDS
    with WhisperClient(service.base_url) as client, pytest.raises(RequestRejected) as refused:
        client.submit(FOX)
    assert (refused.value.status, refused.value.code) == (401, "unauthorized")
    done = subprocess.run(
        [sys.executable, "example_client.py", "--url", service.base_url, "--format", "text", FOX],
        env={"PATH": "", "WHISPER_API_KEY": key, "NO_PROXY": "*"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, FOX_WORDS), done.stderr


def test_the_log_says_who_did_what_to_which_job_and_no_secret(service, holder, tmp_path):
    """Whatever LOG_LEVEL is: here it is WARNING."""
    caller, admin = holder(), holder("--scopes", "admin")
    job = caller.submit(variant(tmp_path / "a.wav", 6))["job_id"]
    caller.wait(job)
    caller.text(job)
    admin.http.get(f"/jobs/{job}/partial")
    admin.http.delete(f"/jobs/{job}")
    caller.http.delete(f"/jobs/{job}")  # it is not there any more: nothing was done
    httpx2.get(f"{service.base_url}/stats", headers={"X-API-Key": caller.key}, trust_env=False)
    log = (service.settings.data_dir.parent / "service.log").read_text()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    audit = [line for line in lines if line["logger"] == "audit"]
    ids = {holder.key.split("_")[1]: holder for holder in (caller, admin)}
    done = [(line["action"], line["key"]) for line in audit if line.get("job_id") == job]
    assert [(action, ids[key]) for action, key in done] == [
        ("job_submitted", caller),
        ("result_read", caller),
        ("partial_read", admin),
        ("job_erased", admin),
    ]
    assert all(line["caller"] and line["request_id"] for line in audit if "job_id" in line)
    assert any(line["action"] == "refused" for line in audit)
    for secret in (caller.key, caller.key.split("_", 2)[2], "brown fox"):
        assert secret not in log
    listed = command(service, "list").stdout
    assert caller.key.split("_")[1] in listed
    assert caller.key not in listed


def test_who_owns_a_job_is_known_after_redis_lost_everything(
    start: Callable[..., tuple[Service, Client]], holder, raw_of
):
    """The keys are lost with it; a new one of the same name has its jobs again."""
    service, _ = start(auth="keys", max_run_seconds="600")
    owner = holder(name="team", of=service)
    service.kill("worker")
    job = owner.submit()["job_id"]
    raw_of(service).flushall()
    wait_until(lambda: owner.http.get(f"/status/{job}").status_code == 401)
    long_ago(service, job)
    owner, stranger = holder(name="team", of=service), holder(of=service)
    service.restart("worker")
    wait_until(lambda: owner.http.get(f"/status/{job}").status_code == 200, 60)
    assert stranger.http.get(f"/status/{job}").status_code == 404
    owner.wait(job)
    assert owner.text(job).strip() == FOX_WORDS


def test_callers_share_transcripts_where_the_setting_says_so(open_handed, holder):
    first, second = holder(of=open_handed), holder(of=open_handed)
    job = first.submit()["job_id"]
    first.wait(job)
    told = second.submit()
    assert (told["status"], told["deduplicated"]) == ("completed", True)
    assert second.http.delete(f"/jobs/{told['job_id']}").json()["status"] == "deleted"
    assert first.text(job).strip() == FOX_WORDS, "each has a job of its own"
    assert second.http.get(f"/result/{job}").status_code == 404


def test_pages_of_other_origins_read_answers_only_where_the_setting_names_them(open_handed):
    ours, theirs = "https://app.example.org", "https://evil.example"
    asks = {"Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization, if-none-match, last-event-id"
    with httpx2.Client(base_url=open_handed.base_url, trust_env=False) as http:
        for origin, is_ours in ((ours, True), ("http://localhost:3000", True), (theirs, False)):
            before = http.options("/transcribe", headers={"Origin": origin, **asks})
            assert before.status_code == (200 if is_ours else 400)
            refused = http.get(f"/status/{uuid4()}", headers={"Origin": origin})
            assert refused.status_code == 401
            allowed = origin if is_ours else None
            assert "ETag" in refused.headers["access-control-expose-headers"]
            for answer in (before, refused):
                assert answer.headers.get("access-control-allow-origin") == allowed
                assert "access-control-allow-credentials" not in answer.headers


def test_no_origin_is_named_by_default(service):
    answer = httpx2.get(
        f"{service.base_url}/health", headers={"Origin": "https://evil.example"}, trust_env=False
    )
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]
