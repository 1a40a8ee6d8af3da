"""example_client.py against the whole service: the snippet, the command, and what goes wrong."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest
import srt

from example_client import (
    AsyncWhisperClient,
    JobCancelled,
    JobFailed,
    JobTimeout,
    NotFound,
    RequestRejected,
    WhisperClient,
)
from local.service import Service
from tests.conftest import FOX, FOX_WORDS, ROOT
from tests.e2e.conftest import QUICK, counted_runs, expect_completed_runs, running, variant
from tests.e2e.test_batches import frozen
from tests.e2e.test_failures import EXACT, long_file

SNIPPET = """
    from example_client import WhisperClient

    client = WhisperClient("http://localhost")

    # Transcribe and wait for result
    result = client.transcribe_file(
        "audio.mp3",
        vad_filter=True,
        language="en"
    )

    print(f"Text: {result['text']}")
    print(f"Language: {result['language']}")
    print(f"Duration: {result['duration']}s")
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {**QUICK, "max_file_size_mb": "30"}
    with running(tmp_path_factory.mktemp("service"), settings) as service:
        yield service


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


def run_python(*arguments: str, cwd=ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_python_snippet_of_the_readme_works(service, tmp_path):
    code = textwrap.dedent(SNIPPET).replace("http://localhost", service.base_url)
    (tmp_path / "audio.mp3").write_bytes(FOX.read_bytes())
    done = run_python("-W", "error", "-c", code, cwd=tmp_path)
    assert done.stderr == ""
    text, language, duration = done.stdout.splitlines()
    assert (text, language) == (f"Text: {FOX_WORDS}", "Language: en")
    assert duration.startswith("Duration: 3.")


def test_the_command_prints_the_transcript_in_each_format(service):
    with WhisperClient(service.base_url) as client:
        text = client.transcribe_file(FOX)["text"]
    for name in ("text", "srt", "vtt", "tsv", "json", "verbose_json"):
        url = ["--url", service.base_url, "--format", name, str(FOX)]
        done = run_python("example_client.py", *url)
        assert (done.returncode, done.stderr) == (0, "")
        assert text in done.stdout
        if name == "text":
            assert done.stdout == text + "\n"
        if name == "srt":
            assert [cue.content for cue in srt.parse(done.stdout)] == [text]


async def test_both_clients_return_the_same_result(service, tmp_path):
    path = variant(tmp_path / "a.wav", 501)
    seen = []
    async with AsyncWhisperClient(service.base_url) as client:
        awaited = await client.transcribe_file(path, on_progress=seen.append, temperature=[0, 0.4])
        assert (await client.health())["status"] == "ok"
    with WhisperClient(service.base_url) as client:
        result = client.transcribe_file(path, temperature=[0, 0.4])
        assert client.submit(path, temperature=[0, 0.4])["deduplicated"] is True
    assert result["text"].startswith("the quick brown fox")
    assert (result["text"], result["segments"]) == (awaited["text"], awaited["segments"])
    assert seen[-1]["status"] == "completed"


def test_a_repeated_upload_is_transcribed_once(service, tmp_path):
    """What makes retries of an upload safe."""
    path = variant(tmp_path / "a.wav", 502)
    before = counted_runs(service)
    with WhisperClient(service.base_url) as client:
        jobs = [client.submit(path)["job_id"] for _ in range(3)]
        for job_id in jobs:
            client.wait(job_id, deadline=60)
    expect_completed_runs(service, before + 1)


def test_the_client_sends_batches_lists_them_and_leaves_out_what_is_known(service, tmp_path):
    """As the documents show it."""
    files = [variant(tmp_path / f"{n}.wav", 510 + n) for n in range(3)]
    files[1].write_bytes(b"hello\n" * 500)
    with WhisperClient(service.base_url) as client:
        batch = client.submit_batch(files, metadata={"order": 17}, priority="high")
        jobs = [each["job"] and each["job"]["job_id"] for each in batch["jobs"]]
        assert batch["jobs"][1]["error"]["code"] == "unsupported_media"
        for job_id in (jobs[0], jobs[2]):
            client.wait(job_id, deadline=60)
        assert client.batch(batch["batch_id"])["is_done"]
        listed = client.jobs(batch_id=batch["batch_id"])
        assert [job["job_id"] for job in listed] == [jobs[2], jobs[0]]
        assert listed[0]["metadata"] == {"order": 17}
        result = client.transcribe_file(files[0], ask_first=True, metadata={"order": 18})
        assert (result["text"], result["metadata"]) == (FOX_WORDS, {"order": 18})
        first = client.submit(files[0], idempotency_key="one", ask_first=True)
        assert client.submit(files[0], idempotency_key="one")["job_id"] == first["job_id"]
        ended = client.cancel_batch(batch["batch_id"])
        assert {job["status"] for job in ended["jobs"]} == {"deleted"}
        with pytest.raises(NotFound):
            client.batch(batch["batch_id"])


def test_a_refused_request_says_why(service, tmp_path):
    with WhisperClient(service.base_url) as client:
        with pytest.raises(RequestRejected) as caught:
            client.submit(FOX, language="klingon", beam=3)
        assert caught.value.code == "invalid_field"
        assert {e["field"] for e in caught.value.errors} == {"language", "beam"}
        text = tmp_path / "notes.txt"
        text.write_text("This is no recording." * 100)
        with pytest.raises(RequestRejected) as caught:
            client.submit(text)
        assert (caught.value.status, caught.value.code) == (415, "unsupported_media")
        with pytest.raises(NotFound):
            client.status("00000000-0000-4000-8000-000000000000")
    done = run_python("example_client.py", "--url", service.base_url, str(text))
    assert done.returncode == 2
    assert "unsupported_media" in done.stderr


def test_a_damaged_file_is_a_failed_job(service, tmp_path):
    damaged = tmp_path / "damaged.mp3"
    damaged.write_bytes(b"ID3\x04\x00" + bytes(range(256)) * 40)
    with WhisperClient(service.base_url) as client:
        with pytest.raises(JobFailed) as waited:
            client.transcribe_file(damaged, deadline=60)
        with pytest.raises(JobFailed) as asked:
            client.result(waited.value.job_id)
    assert waited.value.code == asked.value.code
    assert waited.value.message == asked.value.message
    done = run_python("example_client.py", "--url", service.base_url, str(damaged))
    assert (done.returncode, done.stdout) == (1, "")
    assert waited.value.message in done.stderr


def test_a_file_that_is_too_large_is_refused_before_it_has_arrived(service, tmp_path):
    """The server answers after the headers and closes; the answer must reach the caller."""
    big = tmp_path / "big.wav"
    with big.open("wb") as file:
        file.truncate(200 * 1024 * 1024)
    with WhisperClient(service.base_url) as client:
        for _ in range(5):
            with pytest.raises(RequestRejected, match="larger than 30 MB") as caught:
                client.submit(big)
            assert (caught.value.status, caught.value.code) == (413, "file_too_large")


def test_a_job_can_time_out_be_waited_for_again_and_be_cancelled(service, tmp_path):
    path = variant(tmp_path / "a.wav", 503)
    with frozen(service), WhisperClient(service.base_url) as client:
        with pytest.raises(JobTimeout) as caught:
            client.transcribe_file(path, deadline=1, poll_interval=0.1)
        job_id = caught.value.job_id
        assert client.status(job_id)["status"] == "queued"
        with pytest.raises(RequestRejected, match="result_not_ready"):
            client.result(job_id)
        assert client.cancel(job_id)["status"] == "cancelled"
        for ask in (client.wait, client.result):
            with pytest.raises(JobCancelled):
                ask(job_id)


def test_waiting_outlives_a_restart_of_the_api(service, tmp_path):
    path = long_file(tmp_path / "long.wav", repeats=60)
    seen: list[str] = []
    is_polling = threading.Event()

    def on_progress(status):
        seen.append(status["status"])
        if not is_polling.is_set():
            is_polling.set()
            service.kill("API")
            service.popen("API").wait(30)
            service.restart("API")

    with WhisperClient(service.base_url, max_retries=0) as client:
        result = client.transcribe_file(path, on_progress=on_progress, deadline=120, **EXACT)
    assert result["text"].startswith("the quick brown fox")
    assert seen[-1] == "completed"
