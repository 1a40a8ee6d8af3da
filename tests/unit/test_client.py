"""example_client.py against a real HTTP server whose answers are scripted."""

from __future__ import annotations

import asyncio
import email.utils
import gc
import hashlib
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import example_client
from example_client import (
    AsyncWhisperClient,
    ConnectionFailed,
    Expired,
    JobCancelled,
    JobFailed,
    JobTimeout,
    NotFound,
    RateLimited,
    RequestRejected,
    Unavailable,
    WhisperClient,
    WhisperError,
)

ROOT = Path(example_client.__file__).parent
MEGABYTE = 1024 * 1024
AUDIO = b"ID3\x04" + bytes(range(256)) * 64
KEPT_BODY_BYTES = MEGABYTE  # of a larger body the server keeps its length only


@dataclass(frozen=True)
class Answer:
    body: Any = None  # text is sent as it is, all else as JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Early:
    """Answers once it has the headers, reads on and closes, as the service does."""

    answer: Answer


class HangUp:
    """Reads the request and closes the connection without an answer."""


class Silence:
    """Reads the request and never answers."""


Step = Answer | Early | HangUp | Silence


@dataclass(frozen=True)
class Received:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    body_bytes: int

    def parts(self) -> dict[str, tuple[str, bytes]]:
        """Form field -> (its headers, its value)."""
        boundary = self.headers["content-type"].partition("boundary=")[2].encode()
        *parts, end = self.body.split(b"--" + boundary)
        assert end == b"--\r\n"
        assert parts[0] == b""
        found = {}
        for part in parts[1:]:
            head, _, value = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
            name = head.partition(b'name="')[2].partition(b'"')[0]
            found[name.decode()] = (head.decode(), value.removesuffix(b"\r\n"))
        return found

    def values(self) -> dict[str, str]:
        """The options of the form, without the file."""
        return {k: v.decode() for k, (_, v) in self.parts().items() if k != "file"}


class Server:
    """An HTTP server on 127.0.0.1 that answers "METHOD /path" by its script; the last step repeats.

    It can be stopped, as in a restart, and started again at the same address."""

    def __init__(self) -> None:
        self.script: dict[str, list[Step]] = {}
        self.received: list[Received] = []
        self.heard = threading.Condition()
        self.released = threading.Event()
        self._connections: set[socket.socket] = set()
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def on(self, request: str, *steps: Step) -> None:
        self.script[request] = list(steps)

    def start(self) -> None:
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:
                    self.close_connection = True

            def serve(self) -> None:
                script._serve(self)

            do_GET = do_POST = do_DELETE = serve  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        class HTTPServer(ThreadingHTTPServer):
            daemon_threads = True

            def get_request(self) -> tuple[socket.socket, Any]:
                connection, address = super().get_request()
                script._connections.add(connection)
                return connection, address

            def handle_error(self, *_: object) -> None:
                """A client that went away is no error of this server."""

        self._http = HTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._http.server_address[1]
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._connections.clear()

    def wait_for(self, request: str, times: int = 1) -> None:
        """Returns once this request has come so many times."""
        with self.heard:
            assert self.heard.wait_for(lambda: self.count(request) >= times, timeout=20)

    def count(self, request: str) -> int:
        return sum(f"{r.method} {r.path}" == request for r in self.received)

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        name = f"{request.command} {request.path}"
        steps = self.script.get(name, [Answer({"detail": f"unscripted: {name}"}, status=418)])
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        body, body_bytes = b"", 0
        if not isinstance(step, Early):
            body, body_bytes = self._read(request)
        headers = {k.lower(): v for k, v in request.headers.items()}
        with self.heard:
            self.received.append(Received(request.command, request.path, headers, body, body_bytes))
            self.heard.notify_all()
        if isinstance(step, HangUp | Silence):
            if isinstance(step, Silence):
                self.released.wait()
            request.close_connection = True
            return
        answer = step.answer if isinstance(step, Early) else step
        is_text = isinstance(answer.body, str)
        payload = answer.body.encode() if is_text else json.dumps(answer.body).encode()
        request.send_response_only(answer.status)
        kind = "text/plain; charset=utf-8" if is_text else "application/json"
        for key, value in {"Content-Type": kind, **answer.headers}.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(payload)))
        if isinstance(step, Early):
            request.send_header("Connection", "close")
        request.end_headers()
        request.wfile.write(payload)
        request.wfile.flush()
        if isinstance(step, Early):
            self._read(request)
            request.close_connection = True

    def _read(self, request: BaseHTTPRequestHandler) -> tuple[bytes, int]:
        length = int(request.headers.get("content-length", 0))
        if length <= KEPT_BODY_BYTES:
            return request.rfile.read(length), length
        left = length
        while left and (chunk := request.rfile.read(min(left, 65536))):
            left -= len(chunk)
        return b"", length - left


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.released.set()
    server.stop()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    path = tmp_path / "audio.mp3"
    path.write_bytes(AUDIO)
    return path


class Pauses(list[float]):
    """Stands for asyncio.sleep: notes how long the client would have waited."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


def accepted(status: str = "queued", **headers: str) -> Answer:
    body = {"job_id": "job-1", "status": status, "message": "ok", "deduplicated": False}
    return Answer(body, status=202, headers=headers)


def job(status: str, retry_after: str = "", **fields: Any) -> Answer:
    body = {"job_id": "job-1", "status": status, "progress": 0.5, "error": None, **fields}
    return Answer(body, headers={"Retry-After": retry_after} if retry_after else {})


def problem(status: int, code: str, retry_after: str = "", **fields: Any) -> Answer:
    body = {"title": "T", "status": status, "detail": f"About {code}.", "code": code, **fields}
    headers = {"Content-Type": "application/problem+json"}
    if retry_after:
        headers["Retry-After"] = retry_after
    return Answer(body, status=status, headers=headers)


RESULT = Answer(
    {
        "job_id": "job-1",
        "status": "completed",
        "text": "The quick brown fox.",
        "language": "en",
        "duration": 2.5,
        "segments": [],
    }
)
RESULT_PATH = "GET /result/job-1?format=json"
STATUS_PATH = "GET /status/job-1"


def well_behaved(server: Server) -> None:
    """A service that transcribes every file after one look at its status."""
    server.on("POST /transcribe", accepted())
    server.on(STATUS_PATH, job("processing"), job("completed"))
    server.on(RESULT_PATH, RESULT)
    server.on("GET /health", Answer({"status": "ok"}))


# --- What the README promises ---------------------------------------------------------------------


def test_the_snippet_of_the_readme_runs_as_written(
    server: Server, audio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    well_behaved(server)
    monkeypatch.chdir(audio.parent)
    snippet = """
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
    exec(textwrap.dedent(snippet).replace("http://localhost", server.url), {})  # noqa: S102
    printed = capsys.readouterr().out
    assert printed == "Text: The quick brown fox.\nLanguage: en\nDuration: 2.5s\n"
    assert server.received[0].values() == {"vad_filter": "true", "language": "en"}


def test_a_script_that_never_closes_its_client_ends_quietly(server: Server, audio: Path) -> None:
    well_behaved(server)
    code = f"""
        from example_client import WhisperClient
        client = WhisperClient("{server.url}")
        print(client.transcribe_file("{audio}", poll_interval=0.01)["text"])
    """
    done = python(code, "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "The quick brown fox.\n", "")


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-c", textwrap.dedent(code)]
    return subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
    )


# --- What is sent ---------------------------------------------------------------------------------


async def test_the_upload_is_a_form_of_known_length(server: Server, audio: Path) -> None:
    server.on("POST /transcribe", accepted())
    async with AsyncWhisperClient(server.url) as client:
        answer = await client.submit(audio)
    assert answer["job_id"] == "job-1"
    (upload,) = server.received
    head, content = upload.parts()["file"]
    assert content == AUDIO
    assert 'filename="audio.mp3"' in head
    assert "Content-Type: audio/mpeg" in head
    assert "transfer-encoding" not in upload.headers
    assert int(upload.headers["content-length"]) == upload.body_bytes


async def test_options_become_form_fields(server: Server, audio: Path) -> None:
    server.on("POST /transcribe", accepted())
    async with AsyncWhisperClient(server.url) as client:
        await client.submit(
            audio,
            vad_filter=False,
            word_timestamps=True,
            beam_size=3,
            patience=1.5,
            language=None,
            temperature=(0.0, 0.4),
            vad_parameters={"threshold": 0.6},
            initial_prompt='Dvořák said "hi"\r\n--x',
        )
    assert server.received[0].values() == {
        "vad_filter": "false",
        "word_timestamps": "true",
        "beam_size": "3",
        "patience": "1.5",
        "temperature": "0.0,0.4",
        "vad_parameters": '{"threshold": 0.6}',
        "initial_prompt": 'Dvořák said "hi"\r\n--x',
    }


@pytest.mark.parametrize("value", [object(), ["a", "b"], b"en"])
async def test_an_option_that_no_form_can_hold_is_named(
    server: Server, audio: Path, value: object
) -> None:
    async with AsyncWhisperClient(server.url) as client:
        with pytest.raises(TypeError, match="language"):
            await client.submit(audio, language=value)
    assert server.received == []


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ('a "b".mp3', "a %22b%22.mp3"),
        ("new\r\nline.mp3", "new%0D%0Aline.mp3"),
        ("Dvořák.mp3", "Dvořák.mp3"),
        ("caf\udce9.mp3", "caf?.mp3"),  # a name that is no UTF-8
    ],
)
async def test_any_file_name_arrives_in_one_piece(
    server: Server, tmp_path: Path, name: str, sent: str
) -> None:
    server.on("POST /transcribe", accepted())
    (tmp_path / name).write_bytes(b"RIFF\x00")
    async with AsyncWhisperClient(server.url) as client:
        await client.submit(tmp_path / name)
    head, content = server.received[0].parts()["file"]
    assert content == b"RIFF\x00"
    assert f'; filename="{sent}"\r\n' in head


async def test_an_open_file_is_sent_from_its_beginning_and_left_open(
    server: Server, audio: Path
) -> None:
    server.on("POST /transcribe", accepted())
    async with AsyncWhisperClient(server.url) as client:
        with audio.open("rb") as file:
            file.read(100)
            await client.submit(file)
            assert not file.closed
        await client.submit(io.BytesIO(AUDIO))
    assert [r.parts()["file"][1] for r in server.received] == [AUDIO] * 2


async def test_every_attempt_sends_the_whole_file(
    server: Server, audio: Path, pauses: Pauses
) -> None:
    server.on("POST /transcribe", HangUp(), problem(503, "store_unavailable"), accepted())
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        with audio.open("rb") as file:
            await client.submit(file)
    assert [r.parts()["file"][1] for r in server.received] == [AUDIO] * 3


async def test_a_pipe_can_be_retried_too(server: Server, pauses: Pauses) -> None:
    server.on("POST /transcribe", problem(503, "store_unavailable"), accepted())
    reader, writer = os.pipe()
    os.write(writer, b"RIFF" * 100)
    os.close(writer)
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        with os.fdopen(reader, "rb") as pipe:
            await client.submit(pipe)
    assert [r.parts()["file"][1] for r in server.received] == [b"RIFF" * 100] * 2
    assert "transfer-encoding" not in server.received[0].headers


async def test_a_file_that_grows_is_sent_as_it_was(server: Server, audio: Path) -> None:
    class Growing(io.BytesIO):
        def seek(self, offset: int, whence: int = 0) -> int:
            position = super().seek(offset, whence)
            if whence == os.SEEK_END:
                self.write(b"more")
            return position

    server.on("POST /transcribe", accepted())
    async with AsyncWhisperClient(server.url) as client:
        await client.submit(Growing(AUDIO))
    assert server.received[0].parts()["file"][1] == AUDIO


async def test_a_file_that_shrinks_is_an_error_of_the_file(
    server: Server, audio: Path, pauses: Pauses
) -> None:
    class Shrinking(io.BytesIO):
        def seek(self, offset: int, whence: int = 0) -> int:
            position = super().seek(offset, whence)
            if whence == os.SEEK_END:
                self.truncate(10)
            return position

    server.on("POST /transcribe", accepted())
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        with pytest.raises(OSError, match="became shorter"):
            await client.submit(Shrinking(AUDIO))
    assert pauses == []


async def test_a_wrong_source_is_an_error_before_anything_is_sent(
    server: Server, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.mp3"
    empty.touch()
    sources: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "missing.mp3", FileNotFoundError, "missing.mp3"),
        (str(tmp_path), IsADirectoryError, "directory"),
        (empty, ValueError, r"empty.mp3 is empty \(0 bytes\)"),
        (io.BytesIO(), ValueError, "empty"),
        (io.StringIO("text"), TypeError, "'rb'"),
        (b"RIFF", TypeError, "io.BytesIO"),
    ]
    async with AsyncWhisperClient(server.url) as client:
        for source, kind, words in sources:
            with pytest.raises(kind, match=words):
                await client.transcribe_file(source)
    assert server.received == []


@pytest.mark.parametrize("base_url", ["localhost:8000", "", "ftp://host", "http://", "http://[::1"])
def test_an_address_of_no_use_is_refused_at_once(base_url: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        WhisperClient(base_url)


async def test_the_api_key_is_sent_as_a_bearer_token(server: Server) -> None:
    server.on("GET /health", Answer({"status": "ok"}))
    for key in (None, "s3cret"):
        async with AsyncWhisperClient(server.url, api_key=key) as client:
            await client.health()
    with pytest.raises(ValueError, match="API key"):
        AsyncWhisperClient(server.url, api_key="two\r\nlines")
    sent = [r.headers.get("authorization") for r in server.received]
    assert sent == [None, "Bearer s3cret"]


async def test_a_path_in_the_address_is_kept(server: Server) -> None:
    server.on("GET /whisper/status/a%2Fb", job("queued"))
    for slash in ("", "/"):
        async with AsyncWhisperClient(server.url + "/whisper" + slash) as client:
            assert (await client.status("a/b"))["status"] == "queued"


async def test_one_idempotency_key_serves_all_attempts_of_one_submit(
    server: Server, audio: Path, pauses: Pauses
) -> None:
    server.on("POST /transcribe", problem(503, "unavailable"), accepted())
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        await client.submit(audio)
        await client.submit(audio)
    first, repeated, other = [r.headers["idempotency-key"] for r in server.received]
    assert first == repeated != other


async def test_a_key_of_the_caller_s_is_sent_as_it_is(server: Server, audio: Path) -> None:
    server.on("POST /transcribe", accepted())
    async with AsyncWhisperClient(server.url) as client:
        await client.submit(audio, idempotency_key="order-17")
        for wrong in ("", "x" * 256, "ü", "a\nb"):
            with pytest.raises(ValueError, match="1 to 255 printable"):
                await client.submit(audio, idempotency_key=wrong)
    (sent,) = server.received
    assert sent.headers["idempotency-key"] == "order-17"


async def test_metadata_and_priority_are_fields_of_the_form(server: Server, audio: Path) -> None:
    server.on("POST /transcribe", accepted())
    async with AsyncWhisperClient(server.url) as client:
        await client.submit(audio, metadata={"order": 17, "tags": ["ü"]}, priority="high")
    sent = server.received[0].values()
    assert json.loads(sent["metadata"]) == {"order": 17, "tags": ["ü"]}
    assert sent["priority"] == "high"


# --- What is not sent, because the service has it -------------------------------------------------


async def test_a_large_file_is_asked_for_by_its_digest_and_not_sent_if_it_is_known(
    server: Server, tmp_path: Path
) -> None:
    """With the same options and the same key as the upload that it saves."""
    content = AUDIO * 600
    assert len(content) > example_client.ASK_FIRST_BYTES
    large = tmp_path / "large.mp3"
    large.write_bytes(content)
    server.on("POST /transcribe/by-digest", accepted("completed"), problem(404, "digest_unknown"))
    server.on("POST /transcribe", accepted())
    async with AsyncWhisperClient(server.url) as client:
        for _ in range(2):
            await client.submit(large, language="en", metadata={"a": 1}, idempotency_key="k")
    assert [r.path for r in server.received] == [
        "/transcribe/by-digest",
        "/transcribe/by-digest",
        "/transcribe",
    ]
    asked, _, sent = server.received
    fields = dict(urllib.parse.parse_qsl(asked.body.decode()))
    assert fields == {
        "sha256": hashlib.sha256(content).hexdigest(),
        "language": "en",
        "metadata": '{"a": 1}',
    }
    assert asked.headers["idempotency-key"] == sent.headers["idempotency-key"] == "k"
    assert sent.body_bytes > len(content)


@pytest.mark.parametrize(("ask_first", "asks"), [(None, 0), (True, 1), (False, 0)])
async def test_a_small_file_is_asked_for_if_the_caller_says_so(
    server: Server, audio: Path, ask_first: bool | None, asks: int
) -> None:
    """A service that is older than the question, and answers 404, gets the file."""
    server.on("POST /transcribe/by-digest", problem(404, "not_found"))
    well_behaved(server)
    async with AsyncWhisperClient(server.url) as client:
        result = await client.transcribe_file(audio, ask_first=ask_first, poll_interval=0)
    assert result["text"]
    assert server.count("POST /transcribe/by-digest") == asks
    assert server.count("POST /transcribe") == 1


async def test_a_refused_question_is_the_answer(server: Server, audio: Path) -> None:
    """What is wrong with the options is wrong with the upload, too."""
    server.on("POST /transcribe/by-digest", problem(422, "invalid_field"))
    async with AsyncWhisperClient(server.url) as client:
        with pytest.raises(RequestRejected, match="invalid_field"):
            await client.submit(audio, ask_first=True)
    assert server.count("POST /transcribe") == 0


# --- Batches and lists ----------------------------------------------------------------------------


async def test_a_batch_is_one_form_with_all_files(
    server: Server, audio: Path, pauses: Pauses
) -> None:
    """Of known length, whole in every attempt, with one key."""
    answer = Answer({"batch_id": "b", "jobs": []}, status=202)
    server.on("POST /batches", problem(503, "unavailable"), answer)
    files = [audio, io.BytesIO(b"\xff" * 1000), str(audio)]
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        assert (await client.submit_batch(files, language="en"))["batch_id"] == "b"
    first, second = server.received
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    boundary = second.headers["content-type"].partition("boundary=")[2].encode()
    parts = second.body.split(b"--" + boundary)[1:-1]
    contents = [part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for part in parts]
    assert contents == [b"en", AUDIO, b"\xff" * 1000, AUDIO]
    assert int(second.headers["content-length"]) == len(second.body)


async def test_a_batch_of_no_use_is_an_error_before_anything_is_sent(
    server: Server, audio: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.wav"
    empty.touch()
    wrong: list[tuple[Any, type[Exception]]] = [
        ([], ValueError),
        ([audio, empty], ValueError),
        ([audio, tmp_path / "missing"], FileNotFoundError),
        (str(audio), TypeError),
        (audio, TypeError),
    ]
    async with AsyncWhisperClient(server.url) as client:
        for files, error in wrong:
            with pytest.raises(error):
                await client.submit_batch(files)
    assert server.received == []


async def test_a_batch_can_be_watched_and_ended(server: Server) -> None:
    server.on("GET /batches/b", Answer({"batch_id": "b", "is_done": True, "jobs": []}))
    server.on("DELETE /batches/b", Answer({"batch_id": "b", "jobs": []}))
    async with AsyncWhisperClient(server.url) as client:
        assert (await client.batch("b"))["is_done"]
        assert (await client.cancel_batch("b"))["jobs"] == []


async def test_a_list_takes_as_many_pages_as_it_needs(server: Server) -> None:
    """An empty page is not the last one."""

    def page(cursor: str | None, *ids: str) -> Answer:
        return Answer({"jobs": [{"job_id": each} for each in ids], "next_cursor": cursor})

    path = "GET /jobs?status=failed&limit={}&cursor={}"
    server.on(path.format(3, ""), page("7", "a"))
    server.on(path.format(2, "7"), page("5"))
    server.on(path.format(2, "5"), page("4", "b"))
    server.on(path.format(1, "4"), page("2", "c"))
    server.on("GET /jobs?batch=b&limit=100&cursor=", page(None, "d"))
    async with AsyncWhisperClient(server.url) as client:
        jobs = await client.jobs(status="failed", most=3)
        assert [job["job_id"] for job in jobs] == ["a", "b", "c"]
        assert [job["job_id"] for job in await client.jobs(batch_id="b")] == ["d"]
    assert len(server.received) == 5


async def test_the_proxy_that_the_environment_names_is_used(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server.on("GET http://whisper.example/health", Answer({"status": "by proxy"}))
    server.on("GET /health", Answer({"status": "direct"}))
    async with AsyncWhisperClient("http://whisper.example") as client:
        assert (await client.health())["status"] == "by proxy"
    async with AsyncWhisperClient(server.url) as client:
        assert (await client.health())["status"] == "direct"


async def test_memory_stays_flat_whatever_the_size_of_the_file(
    server: Server, tmp_path: Path
) -> None:
    big = tmp_path / "big.wav"
    with big.open("wb") as file:
        file.truncate(300 * MEGABYTE)
    server.on("POST /transcribe/by-digest", problem(404, "digest_unknown"))
    server.on("POST /transcribe", accepted())
    async with AsyncWhisperClient(server.url) as client:
        tracemalloc.start()
        try:
            await client.submit(big)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert server.received[1].body_bytes > 300 * MEGABYTE
    assert peak_bytes < 5 * MEGABYTE


# --- When the server says no ----------------------------------------------------------------------


async def test_a_refusal_in_the_middle_of_an_upload_is_reported(
    server: Server, tmp_path: Path
) -> None:
    big = tmp_path / "big.wav"
    with big.open("wb") as file:
        file.truncate(50 * MEGABYTE)
    server.on("POST /transcribe", Early(problem(413, "file_too_large")))
    async with AsyncWhisperClient(server.url, max_retries=0) as client:
        for _ in range(5):
            with pytest.raises(RequestRejected) as caught:
                await client.submit(big, ask_first=False)
            assert (caught.value.status, caught.value.code) == (413, "file_too_large")


async def test_a_connection_serves_the_next_request_after_a_good_one(server: Server) -> None:
    server.on("GET /health", Answer({"status": "ok"}))
    async with AsyncWhisperClient(server.url) as client:
        for _ in range(5):
            await client.health()
    assert len(server._connections) == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, RequestRejected),
        (404, NotFound),
        (408, Unavailable),
        (410, Expired),
        (415, RequestRejected),
        (429, RateLimited),
        (500, Unavailable),
        (503, Unavailable),
        (507, Unavailable),
    ],
)
async def test_each_status_has_its_error(
    server: Server, status: int, kind: type[RequestRejected]
) -> None:
    errors = [{"field": "language", "message": "unknown"}]
    server.on(STATUS_PATH, problem(status, "some_code", "7", request_id="r-1", errors=errors))
    async with AsyncWhisperClient(server.url, max_retries=0) as client:
        with pytest.raises(RequestRejected) as caught:
            await client.status("job-1")
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.detail) == (status, "some_code", "About some_code.")
    assert (error.request_id, error.errors, error.retry_after) == ("r-1", errors, 7.0)
    assert str(error) == f"About some_code. (some_code, HTTP {status}, request r-1)"


async def test_an_error_page_of_a_proxy_is_an_error_too(server: Server) -> None:
    server.on(STATUS_PATH, Answer("<html>502</html>", status=502, headers={"X-Request-ID": "r-2"}))
    async with AsyncWhisperClient(server.url, max_retries=0) as client:
        with pytest.raises(Unavailable, match="answered 502 Bad Gateway") as caught:
            await client.status("job-1")
    assert (caught.value.code, caught.value.request_id) == ("http_502", "r-2")


async def test_a_redirect_names_the_address_to_use(server: Server, audio: Path) -> None:
    moved = Answer("", status=301, headers={"Location": "https://whisper.example/transcribe"})
    server.on("POST /transcribe", moved)
    async with AsyncWhisperClient(server.url) as client:
        with pytest.raises(RequestRejected, match=r"moved to https://whisper\.example/"):
            await client.submit(audio)
    assert len(server.received) == 1


@pytest.mark.parametrize("body", ["<html>hello</html>", "[1]", {"hello": "world"}])
async def test_another_service_at_the_address_is_said_to_be_one(
    server: Server, audio: Path, body: Any
) -> None:
    server.on("POST /transcribe", Answer(body))
    async with AsyncWhisperClient(server.url) as client:
        with pytest.raises(ConnectionFailed, match="not this service"):
            await client.transcribe_file(audio)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionFailed("gone"),
        RateLimited(429, "rate_limited", "Slow down.", "r-1", [], 3.0),
        JobFailed("job-1", "unreadable_media", "It is damaged."),
        JobCancelled("job-1"),
        JobTimeout("job-1"),
        JobTimeout(None),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_the_way_between_processes(error: WhisperError) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


# --- Retries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 507])
async def test_what_may_pass_is_tried_again(server: Server, pauses: Pauses, status: int) -> None:
    server.on(STATUS_PATH, problem(status, "busy"), job("queued"))
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        assert (await client.status("job-1"))["status"] == "queued"
    assert len(pauses) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 410, 413, 415, 422, 501])
async def test_what_stays_wrong_is_not_tried_again(
    server: Server, pauses: Pauses, status: int
) -> None:
    server.on(STATUS_PATH, problem(status, "wrong"))
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        with pytest.raises(RequestRejected):
            await client.status("job-1")
    assert len(server.received) == 1
    assert pauses == []


async def test_pauses_double_from_half_a_second_to_eight(server: Server, pauses: Pauses) -> None:
    server.on(STATUS_PATH, HangUp())
    async with AsyncWhisperClient(server.url, max_retries=6, sleep=pauses) as client:
        with pytest.raises(ConnectionFailed, match=server.url):
            await client.status("job-1")
    assert len(server.received) == 7
    for pause, longest in zip(pauses, [0.5, 1, 2, 4, 8, 8], strict=True):
        assert 0.75 * longest <= pause <= longest


async def test_no_more_than_max_retries_are_made(server: Server, pauses: Pauses) -> None:
    server.on(STATUS_PATH, problem(503, "unavailable", retry_after="1"))
    for max_retries in (0, 3):
        server.received.clear()
        async with AsyncWhisperClient(server.url, max_retries=max_retries, sleep=pauses) as client:
            with pytest.raises(Unavailable):
                await client.status("job-1")
        assert len(server.received) == 1 + max_retries


async def test_a_retry_waits_as_long_as_the_server_asks(server: Server, pauses: Pauses) -> None:
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    server.on(
        STATUS_PATH,
        problem(429, "rate_limited", retry_after="7"),
        problem(503, "unavailable", retry_after="120"),
        problem(503, "unavailable", retry_after=in_a_minute),
        job("queued"),
    )
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        await client.status("job-1")
    for pause, asked in zip(pauses, [7, 120, 60], strict=True):
        assert asked - 2 <= pause <= asked * 1.1
    assert pauses[0] >= 7


async def test_a_date_in_retry_after_is_read_by_the_clock_of_the_server(
    server: Server, pauses: Pauses
) -> None:
    headers = {
        "Date": "Tue, 15 Nov 1994 08:12:31 GMT",
        "Retry-After": "Tue, 15 Nov 1994 08:12:41 GMT",
    }
    slow = Answer({"code": "unavailable"}, status=503, headers=headers)
    server.on(STATUS_PATH, slow, job("queued"))
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        await client.status("job-1")
    assert 10 <= pauses[0] <= 11


@pytest.mark.parametrize("status", [429, 503])
async def test_a_pause_of_more_than_two_minutes_is_left_to_the_caller(
    server: Server, pauses: Pauses, status: int
) -> None:
    server.on(STATUS_PATH, problem(status, "later", retry_after="121"))
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        for ask in (client.status, client.wait):
            with pytest.raises(RateLimited if status == 429 else Unavailable) as caught:
                await ask("job-1")
            assert caught.value.retry_after == 121
    assert pauses == []
    assert len(server.received) == 2


@pytest.mark.parametrize("value", ["soon", "-5", "0", "inf", "nan", "1e3"])
async def test_a_retry_after_that_says_nothing_is_ignored(
    server: Server, pauses: Pauses, value: str
) -> None:
    server.on(STATUS_PATH, problem(503, "unavailable", retry_after=value), job("queued"))
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        await client.status("job-1")
    assert 0.375 <= pauses[0] <= 0.5


async def test_a_server_that_never_answers_is_a_failed_connection(server: Server) -> None:
    server.on(STATUS_PATH, Silence())
    async with AsyncWhisperClient(server.url, timeout=0.1, max_retries=0) as client:
        with pytest.raises(ConnectionFailed, match="No answer"):
            await client.status("job-1")


async def test_a_closed_port_is_a_failed_connection(server: Server, pauses: Pauses) -> None:
    server.stop()
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        with pytest.raises(ConnectionFailed):
            await client.status("job-1")
        with pytest.raises(ConnectionFailed):
            await client.health()
    server.start()
    assert len(pauses) == 3  # health tells how things are now


# --- Waiting --------------------------------------------------------------------------------------


async def test_polling_follows_the_advice_of_the_server(
    server: Server, audio: Path, pauses: Pauses
) -> None:
    server.on("POST /transcribe", accepted(**{"Retry-After": "2"}))
    server.on(STATUS_PATH, job("queued", "9"), job("processing", "1"), job("completed"))
    server.on(RESULT_PATH, RESULT)
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        result = await client.transcribe_file(audio)
    assert result["text"] == "The quick brown fox."
    assert pauses == [2, 9, 1]


async def test_polling_slows_down_to_five_seconds_without_advice(
    server: Server, pauses: Pauses
) -> None:
    server.on(STATUS_PATH, *[job("processing")] * 8, job("completed"))
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        assert (await client.wait("job-1"))["status"] == "completed"
    assert pauses == [0.5 * 1.5**n for n in range(6)] + [5, 5]


async def test_a_poll_interval_overrides_the_advice(
    server: Server, audio: Path, pauses: Pauses
) -> None:
    server.on("POST /transcribe", accepted(**{"Retry-After": "2"}))
    server.on(STATUS_PATH, job("queued", "9"), job("processing"), job("completed"))
    server.on(RESULT_PATH, RESULT)
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        await client.transcribe_file(audio, poll_interval=0.25)
    assert pauses == [0.25, 0.25, 0.25]


def tagged(status: str, tag: str, **fields: Any) -> Answer:
    """The answer of a service that can keep the next one back."""
    return Answer(job(status, **fields).body, headers={"ETag": tag, "Retry-After": "9"})


WAITING_PATH = f"{STATUS_PATH}?wait=20"
UNCHANGED = Answer("", status=304, headers={"ETag": 'W/"b"', "Retry-After": "9"})


async def test_a_service_that_can_wait_is_asked_to(
    server: Server, audio: Path, pauses: Pauses
) -> None:
    """Its answers carry a tag. Nothing is polled then: not after the upload either."""
    links = {"status": "/status/job-1", "events": "/jobs/job-1/events"}
    server.on("POST /transcribe", Answer({**accepted().body, "links": links}, status=202))
    server.on(STATUS_PATH, tagged("queued", 'W/"a"'))
    server.on(WAITING_PATH, tagged("completed", 'W/"b"'))
    server.on(RESULT_PATH, RESULT)
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        assert (await client.transcribe_file(audio))["duration"] == 2.5
    assert [r.path for r in server.received[1:3]] == ["/status/job-1", "/status/job-1?wait=20"]
    assert "if-none-match" not in server.received[2].headers, "nothing but the end is of interest"
    assert pauses == []


async def test_who_wants_progress_hears_of_what_is_new_only(server: Server, pauses: Pauses) -> None:
    server.on(STATUS_PATH, tagged("queued", 'W/"a"', progress=0))
    server.on(WAITING_PATH, tagged("processing", 'W/"b"'), UNCHANGED, tagged("completed", 'W/"c"'))
    seen: list[dict[str, Any]] = []
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        await client.wait("job-1", on_progress=seen.append)
    assert [status["status"] for status in seen] == ["queued", "processing", "completed"]
    asked = [r.headers.get("if-none-match") for r in server.received]
    assert asked == [None, 'W/"a"', 'W/"b"', 'W/"b"']


async def test_answers_that_were_not_kept_back_are_not_asked_for_in_a_rush(
    server: Server, pauses: Pauses
) -> None:
    """Whatever is between the client and the service."""
    server.on(STATUS_PATH, tagged("processing", 'W/"a"'))
    server.on(WAITING_PATH, *[tagged("processing", 'W/"a"')] * 3, tagged("completed", 'W/"b"'))
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        await client.wait("job-1")
    assert pauses == [0.5] * 3


async def test_where_too_many_wait_the_client_polls(server: Server, pauses: Pauses) -> None:
    server.on(STATUS_PATH, tagged("processing", 'W/"a"'))
    server.on(
        WAITING_PATH, *[problem(503, "too_many_waiters", "4")] * 2, tagged("completed", 'W/"b"')
    )
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        await client.wait("job-1")
    assert pauses == [4, 4]
    plain, waiting = STATUS_PATH[4:], WAITING_PATH[4:]
    assert [r.path for r in server.received] == [plain, waiting] * 3


async def test_a_wait_fits_into_the_patience_of_the_client(server: Server) -> None:
    """Or each would look like a service that is away."""
    server.on(STATUS_PATH, tagged("processing", 'W/"a"'))
    server.on(f"{STATUS_PATH}?wait=2", tagged("completed", 'W/"b"'))
    async with AsyncWhisperClient(server.url, timeout=3) as client:
        assert (await client.wait("job-1"))["status"] == "completed"


async def test_a_file_that_was_transcribed_before_needs_no_waiting(
    server: Server, audio: Path, pauses: Pauses
) -> None:
    server.on("POST /transcribe", accepted("completed"))
    server.on(RESULT_PATH, RESULT)
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        assert (await client.transcribe_file(audio))["duration"] == 2.5
    assert pauses == []
    assert len(server.received) == 2


async def test_progress_is_reported_with_every_answer(server: Server) -> None:
    server.on(
        STATUS_PATH,
        job("queued", progress=0.0, queue_position=2),
        job("processing", progress=0.25),
        job("completed", progress=1.0),
    )
    seen: list[dict[str, Any]] = []
    async with AsyncWhisperClient(server.url) as client:
        await client.wait("job-1", on_progress=seen.append, poll_interval=0)
    assert [(s["status"], s["progress"]) for s in seen] == [
        ("queued", 0.0),
        ("processing", 0.25),
        ("completed", 1.0),
    ]
    assert seen[0]["queue_position"] == 2


async def test_waiting_outlives_a_restart_of_the_service(server: Server, audio: Path) -> None:
    server.on("POST /transcribe", accepted())
    server.on(STATUS_PATH, job("processing", "1"))
    server.on(RESULT_PATH, *[HangUp()] * 4, RESULT)
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            server.stop()
        if len(pauses) == 8:
            server.on(STATUS_PATH, problem(502, "http_502"), HangUp(), job("completed"))
            server.start()

    async with AsyncWhisperClient(server.url, max_retries=0, sleep=sleep) as client:
        result = await client.transcribe_file(audio)
    assert result["text"] == "The quick brown fox."
    assert len(pauses) == 14


async def test_a_service_that_stays_away_is_given_up_after_ten_minutes(
    server: Server, pauses: Pauses
) -> None:
    server.on(STATUS_PATH, HangUp())
    async with AsyncWhisperClient(server.url, sleep=pauses) as client:
        with pytest.raises(ConnectionFailed):
            await client.wait("job-1")
    assert 590 < sum(pauses) <= 600


async def test_a_failed_job_raises_its_own_code(server: Server, audio: Path) -> None:
    error = {"code": "no_audio_stream", "message": "The file holds no audio stream."}
    server.on("POST /transcribe", accepted())
    server.on(STATUS_PATH, job("failed", error=error))
    server.on(RESULT_PATH, problem(422, "no_audio_stream"))
    async with AsyncWhisperClient(server.url, sleep=Pauses()) as client:
        for ask in (
            client.transcribe_file(audio),
            client.wait("job-1"),
            client.result("job-1"),
        ):
            with pytest.raises(JobFailed) as caught:
                await ask
            assert (caught.value.job_id, caught.value.code) == ("job-1", "no_audio_stream")


async def test_a_cancelled_job_raises_job_cancelled(server: Server, audio: Path) -> None:
    server.on("POST /transcribe", accepted())
    server.on(STATUS_PATH, job("cancelled"))
    server.on(RESULT_PATH, problem(409, "job_cancelled"))
    async with AsyncWhisperClient(server.url, sleep=Pauses()) as client:
        for ask in (client.transcribe_file(audio), client.result("job-1")):
            with pytest.raises(JobCancelled) as caught:
                await ask
            assert caught.value.job_id == "job-1"


async def test_a_job_past_its_deadline_can_be_waited_for_again(server: Server, audio: Path) -> None:
    server.on("POST /transcribe", accepted())
    server.on(STATUS_PATH, job("processing"))
    async with AsyncWhisperClient(server.url) as client:
        with pytest.raises(JobTimeout, match="job-1 is still running") as caught:
            await client.transcribe_file(audio, deadline=0.1, poll_interval=0.01)
        assert caught.value.job_id == "job-1"
        with pytest.raises(JobTimeout):
            await client.wait(caught.value.job_id, deadline=0.05)
        server.on(STATUS_PATH, job("completed"))
        assert (await client.wait(caught.value.job_id))["status"] == "completed"


async def test_a_deadline_ends_a_standing_request_and_an_outage(
    server: Server, audio: Path
) -> None:
    server.on("POST /transcribe", Silence())
    server.on(STATUS_PATH, Silence())
    async with AsyncWhisperClient(server.url) as client:
        with pytest.raises(JobTimeout, match="before the upload") as caught:
            await client.transcribe_file(audio, deadline=0.1)
        assert caught.value.job_id is None
        with pytest.raises(JobTimeout):
            await client.wait("job-1", deadline=0.1)
        server.on(STATUS_PATH, HangUp())
        with pytest.raises(JobTimeout):
            await client.wait("job-1", deadline=0.1)


async def test_a_timeout_of_the_disk_is_not_taken_for_the_deadline(server: Server) -> None:
    class Slow(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise TimeoutError("the disk")

    async with AsyncWhisperClient(server.url) as client:
        with pytest.raises(TimeoutError, match="the disk"):
            await client.transcribe_file(Slow(b"RIFF"), deadline=60)


# --- The other methods ----------------------------------------------------------------------------


async def test_a_result_is_a_dict_or_text_by_its_format(server: Server) -> None:
    server.on(RESULT_PATH, RESULT)
    server.on("GET /result/job-1?format=verbose_json", Answer({"text": "long", "words": []}))
    server.on("GET /result/job-1?format=srt", Answer("1\n00:00:00,000 --> …\n"))
    async with AsyncWhisperClient(server.url) as client:
        assert (await client.result("job-1"))["language"] == "en"
        assert (await client.result("job-1", "verbose_json"))["words"] == []
        assert await client.result("job-1", format="srt") == "1\n00:00:00,000 --> …\n"


async def test_rules_for_captions_are_sent_as_the_service_takes_them(server: Server) -> None:
    query = "format=vtt&max_line_chars=42&min_duration=1.5&words=true"
    server.on(f"GET /result/job-1?{query}", Answer("WEBVTT\n\n"))
    rules = {"max_line_chars": 42, "max_lines": None, "min_duration": 1.5, "words": True}
    async with AsyncWhisperClient(server.url) as client:
        assert await client.result("job-1", "vtt", **rules) == "WEBVTT\n\n"
    with WhisperClient(server.url) as client:
        assert client.result("job-1", "vtt", **rules) == "WEBVTT\n\n"


async def test_an_unfinished_result_says_when_to_come_back(server: Server) -> None:
    server.on(RESULT_PATH, problem(409, "result_not_ready", retry_after="3"))
    async with AsyncWhisperClient(server.url) as client:
        with pytest.raises(RequestRejected) as caught:
            await client.result("job-1")
    assert (caught.value.code, caught.value.retry_after) == ("result_not_ready", 3)


async def test_an_unknown_format_is_no_failed_job(server: Server) -> None:
    server.on("GET /result/job-1?format=doc", problem(422, "invalid_field"))
    async with AsyncWhisperClient(server.url) as client:
        with pytest.raises(RequestRejected, match="invalid_field"):
            await client.result("job-1", "doc")  # type: ignore[call-overload]


async def test_cancel_deletes_the_job(server: Server) -> None:
    server.on("DELETE /jobs/job-1", Answer({"job_id": "job-1", "status": "cancelled"}))
    async with AsyncWhisperClient(server.url) as client:
        assert (await client.cancel("job-1"))["status"] == "cancelled"
        with pytest.raises(ValueError, match="empty"):
            await client.cancel("")


async def test_a_failed_job_is_retried(server: Server) -> None:
    server.on(
        "POST /jobs/job-1/retry",
        job("queued"),
        problem(409, "job_not_failed"),
        problem(410, "upload_gone"),
    )
    async with AsyncWhisperClient(server.url) as client:
        assert (await client.retry("job-1"))["status"] == "queued"
        with pytest.raises(RequestRejected) as refused:
            await client.retry("job-1")
        assert refused.value.code == "job_not_failed"
        with pytest.raises(Expired):
            await client.retry("job-1")


async def test_health_reports_an_unwell_service_and_raises_for_anything_else(
    server: Server,
) -> None:
    server.on(
        "GET /health",
        Answer({"status": "unavailable", "redis": "unreachable"}, status=503),
        problem(429, "rate_limited"),
        Answer("<html>nginx</html>", status=502),
        Answer("<html>welcome</html>"),
    )
    async with AsyncWhisperClient(server.url) as client:
        assert (await client.health())["redis"] == "unreachable"
        for kind in (RateLimited, Unavailable, ConnectionFailed):
            with pytest.raises(kind):
                await client.health()


# --- The synchronous client -----------------------------------------------------------------------


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert methods(WhisperClient) == methods(AsyncWhisperClient)


async def test_the_synchronous_client_works_inside_a_running_event_loop(
    server: Server, audio: Path
) -> None:
    well_behaved(server)
    assert asyncio.get_running_loop().is_running()
    with WhisperClient(server.url) as client:
        assert client.transcribe_file(audio, poll_interval=0.01)["language"] == "en"


def test_one_client_serves_many_threads(server: Server, audio: Path) -> None:
    server.on("POST /transcribe", accepted("completed"))
    server.on(RESULT_PATH, RESULT)
    with WhisperClient(server.url) as client, ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: client.transcribe_file(audio), range(32)))
    assert [r["text"] for r in results] == ["The quick brown fox."] * 32


def test_progress_is_reported_in_the_thread_of_the_caller(server: Server, audio: Path) -> None:
    well_behaved(server)
    seen = []

    def on_progress(status: dict[str, Any]) -> None:
        client.health()  # the client may be used meanwhile
        seen.append((threading.current_thread(), status["status"]))

    with WhisperClient(server.url) as client:
        client.transcribe_file(audio, on_progress=on_progress, poll_interval=0.01)
    here = threading.current_thread()
    assert seen == [(here, "processing"), (here, "completed")]


def test_an_error_in_progress_ends_the_waiting_and_leaves_the_client_sound(server: Server) -> None:
    server.on(STATUS_PATH, job("processing"))
    server.on("GET /health", Answer({"status": "ok"}))

    def on_progress(status: dict[str, Any]) -> None:
        raise LookupError("mine")

    with WhisperClient(server.url) as client:
        with pytest.raises(LookupError, match="mine"):
            client.wait("job-1", on_progress=on_progress, poll_interval=0.001)
        for _ in range(3):
            assert client.health() == {"status": "ok"}
        polled = server.count(STATUS_PATH)
        for _ in range(20):
            client.health()
        assert server.count(STATUS_PATH) == polled  # nothing goes on in the background


def test_ctrl_c_leaves_the_client_sound(server: Server) -> None:
    server.on(STATUS_PATH, Silence())
    server.on("GET /health", Answer({"status": "ok"}))
    code = f"""
        from example_client import WhisperClient
        with WhisperClient("{server.url}") as client:
            try:
                client.wait("job-1")
            except KeyboardInterrupt:
                print(client.health())
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        server.wait_for(STATUS_PATH)
        process.send_signal(signal.SIGINT)
        printed, complaints = process.communicate(timeout=20)
    assert (process.returncode, printed, complaints) == (0, "{'status': 'ok'}\n", "")


def test_a_closed_client_says_so_and_its_thread_is_gone(server: Server) -> None:
    server.on("GET /health", Answer({"status": "ok"}))
    client = WhisperClient(server.url)
    client.health()
    client.close()
    client.close()
    assert client_threads() == []
    with pytest.raises(RuntimeError, match="closed"):
        client.health()


def test_closing_ends_a_call_that_is_under_way(server: Server) -> None:
    server.on(STATUS_PATH, Silence())
    client = WhisperClient(server.url)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(client.status, "job-1")
        server.wait_for(STATUS_PATH)
        client.close()
        with pytest.raises(RuntimeError, match="closed during the call"):
            call.result(timeout=10)


def test_a_forgotten_client_takes_its_thread_along(server: Server) -> None:
    server.on("GET /health", Answer({"status": "ok"}))
    client = WhisperClient(server.url)
    client.health()
    (thread,) = client_threads()
    del client
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def client_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "whisper-client"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_client_made_before_a_fork_works_after_it(server: Server) -> None:
    server.on("GET /health", Answer({"status": "ok"}))
    code = f"""
        import os
        from example_client import WhisperClient
        client = WhisperClient("{server.url}")
        client.health()
        child = os.fork()
        ok = client.health() == {{"status": "ok"}}
        if child == 0:
            os._exit(0 if ok else 1)
        print(ok, os.waitpid(child, 0)[1])
    """
    done = python(code)
    assert done.stdout == "True 0\n", done.stderr


# --- The command ----------------------------------------------------------------------------------


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "example_client.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_prints_the_transcript_and_nothing_else(server: Server, audio: Path) -> None:
    server.on("POST /transcribe", accepted())
    server.on(STATUS_PATH, job("completed"))
    server.on("GET /result/job-1?format=text", Answer("Grüße.\n"))
    done = command(
        "--url",
        server.url,
        "-o",
        "language=de",
        "-o",
        "initial_prompt=a=b",
        str(audio),
        WHISPER_API_KEY="key",
        PYTHONIOENCODING="ascii",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Grüße.\n", "")
    upload = server.received[0]
    assert upload.values() == {"language": "de", "initial_prompt": "a=b"}
    assert upload.headers["authorization"] == "Bearer key"


@pytest.mark.parametrize("format", ["json", "srt"])
def test_the_command_writes_the_format_that_it_is_asked_for(
    server: Server, audio: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    server.on("POST /transcribe", accepted())
    server.on(STATUS_PATH, job("completed"))
    server.on(RESULT_PATH, RESULT)
    server.on("GET /result/job-1?format=srt", Answer("1\n00:00:00,000 --> 00:00:01,000\nHi\n\n"))
    assert run_main(server, audio, "--format", format) == 0
    printed = capsys.readouterr().out
    if format == "json":
        assert json.loads(printed)["text"] == "The quick brown fox."
    else:
        assert printed == "1\n00:00:00,000 --> 00:00:01,000\nHi\n"


def test_the_command_passes_rules_for_captions_on(
    server: Server, audio: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.on("POST /transcribe", accepted())
    server.on(STATUS_PATH, job("completed"))
    server.on("GET /result/job-1?format=vtt&max_lines=1&words=true", Answer("WEBVTT\n"))
    rules = ["--caption", "max_lines=1", "--caption", "words=true"]
    assert run_main(server, audio, "--format", "vtt", *rules) == 0
    assert capsys.readouterr().out == "WEBVTT\n"


def run_main(server: Server, audio: Path, *arguments: str) -> int:
    return example_client.main(["--url", server.url, *arguments, str(audio)])


FAILURES: list[tuple[int, str, Callable[[Server], None]]] = [
    (1, "It is damaged.", lambda s: s.on(STATUS_PATH, job("failed", error=DAMAGED))),
    (1, "cancelled", lambda s: s.on(STATUS_PATH, job("cancelled"))),
    (2, "About invalid_field.", lambda s: s.on("POST /transcribe", problem(422, "invalid_field"))),
    (3, "No answer", lambda s: s.stop()),
    (3, "rate_limited", lambda s: s.on("POST /transcribe", problem(429, "rate_limited", "500"))),
    (3, "store_unavailable", lambda s: s.on("POST /transcribe", problem(503, "store_unavailable"))),
    (4, "still running", lambda s: s.on(STATUS_PATH, job("processing"))),
]
DAMAGED = {"code": "unreadable_media", "message": "It is damaged."}


@pytest.mark.parametrize(
    ("status", "words", "arrange"), FAILURES, ids=[f"{f[0]} {f[1]}" for f in FAILURES]
)
def test_the_exit_status_tells_what_went_wrong(
    server: Server,
    audio: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    words: str,
    arrange: Callable[[Server], None],
) -> None:
    monkeypatch.setattr(example_client, "BACKOFF_SECONDS", 0.01)
    well_behaved(server)
    arrange(server)
    assert run_main(server, audio, "--deadline", "0.2") == status
    streams = capsys.readouterr()
    assert words in streams.err
    assert streams.err.count("\n") == 1
    assert streams.out == ""
    if status == 3 and "answer" in words:
        server.start()


def test_wrong_usage_exits_with_2(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(server, tmp_path / "missing.mp3") == 2
    assert "missing.mp3" in capsys.readouterr().err
    for arguments in (["--format", "doc"], ["-o", "language"]):
        with pytest.raises(SystemExit) as caught:
            run_main(server, tmp_path / "audio.mp3", *arguments)
        assert caught.value.code == 2
    assert example_client.main(["--url", "localhost", str(tmp_path)]) == 2
    assert server.received == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX terminal")
def test_a_terminal_sees_progress_and_then_a_clean_line(server: Server, audio: Path) -> None:
    import pty

    server.on("POST /transcribe", accepted())
    server.on(STATUS_PATH, job("queued", "1", queue_position=3), job("completed"))
    server.on("GET /result/job-1?format=text", Answer("Hello.\n"))
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "example_client.py", "--url", server.url, str(audio)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=60,
        check=False,
    )
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert done.stdout == b"Hello.\n"
    assert "queued, number 3" in shown
    assert shown.endswith("\r" + " " * 40 + "\r")


def test_ctrl_c_cancels_the_job_of_the_command(server: Server, audio: Path) -> None:
    server.on("POST /transcribe", accepted())
    server.on(STATUS_PATH, job("processing"))
    server.on("DELETE /jobs/job-1", Answer({"status": "cancelled"}))
    with subprocess.Popen(
        [sys.executable, "example_client.py", "--url", server.url, str(audio)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        server.wait_for(STATUS_PATH)
        process.send_signal(signal.SIGINT)
        printed, complaints = process.communicate(timeout=20)
    assert (process.returncode, printed, complaints) == (130, "", "interrupted\n")
    assert server.count("DELETE /jobs/job-1") == 1
