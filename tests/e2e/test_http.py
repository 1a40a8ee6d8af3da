"""HTTP as no sane client speaks it, straight to the API: smuggled requests, endless headers, slow
senders, absurd forms. tests/deploy/test_http_nginx.py says the same with nginx before it."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode, checks

from local.service import Service
from tests.conftest import FOX, PLAIN, wait_until
from tests.e2e.conftest import QUICK, Client, leftovers, metric, running
from tests.e2e.test_api import peak_bytes, problem

POST = b"POST /transcribe HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
LENGTH = len(HIDDEN)
# What two servers may read in two ways; behind each stands a request that must not be answered.
AMBIGUOUS = {
    "both lengths, the end by chunks": POST
    + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + HIDDEN,
    "both lengths, the end by count": POST
    + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n"
    + b"%x\r\n%s\r\n0\r\n\r\n" % (LENGTH, HIDDEN),
    "chunked and more": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + HIDDEN,
    "an unknown coding": POST
    + b"Transfer-Encoding: xchunked\r\nContent-Length: 3\r\n\r\nabc"
    + HIDDEN,
    "a coding behind a tab": POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "two codings": POST
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n"
    + HIDDEN,
    "a space before the colon": POST
    + b"Transfer-Encoding : chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n"
    + HIDDEN,
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % LENGTH + HIDDEN,
    "the same length twice": POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc" + HIDDEN,
    "a list of lengths": POST + b"Content-Length: 3, 3\r\n\r\nabc" + HIDDEN,
    "a length below zero": POST + b"Content-Length: -1\r\n\r\n" + HIDDEN,
    "a length with a sign": POST + b"Content-Length: +3\r\n\r\nabc" + HIDDEN,
    "a length in hex": POST + b"Content-Length: 0x3\r\n\r\nabc" + HIDDEN,
    "a length above all": POST + b"Content-Length: %d\r\n\r\nabc" % 10**22 + HIDDEN,
    "a folded length": POST + b"Content-Length:\r\n 3\r\n\r\nabc" + HIDDEN,
    "a folded coding": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "lines that end in CR": POST + b"X: a\rContent-Length: 3\r\n\r\nabc" + HIDDEN,
    "a NUL": POST + b"X: a\0b\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "a chunk below zero": CHUNKED + b"-1\r\n\r\n0\r\n\r\n" + HIDDEN,
    "a chunk with 0x": CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n" + HIDDEN,
    "a chunk above all": CHUNKED + b"ffffffffffffffff1\r\nabc\r\n0\r\n\r\n" + HIDDEN,
    "a chunk longer than it says": CHUNKED + b"3\r\nabcdef\r\n0\r\n\r\n" + HIDDEN,
    "chunks that end in LF": CHUNKED + b"3\nabc\n0\n\n" + HIDDEN,
    "a chunk's note that ends in LF": CHUNKED + b"3;a\nb\r\nabc\r\n0\r\n\r\n" + HIDDEN,
    "chunks in HTTP/1.0": b"POST /transcribe HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
    b"Connection: keep-alive\r\n\r\n0\r\n\r\n" + HIDDEN,
    "a body of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HIDDEN,
}
# Left to the server alone: nginx reads these in one way, and passes on what it has read.
LAX = {
    "lines that end in LF": b"POST /transcribe HTTP/1.1\nHost: a\nContent-Length: 3\n\nabc"
    + HIDDEN,
    "no colon": POST + b"Xabc\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "a space behind a chunk's size": CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n" + HIDDEN,
    "a length in the trailer": CHUNKED + b"0\r\nContent-Length: 99\r\n\r\n" + HIDDEN,
}


def said(port: int, data: bytes, within_seconds: float = 10) -> bytes:
    """All that comes back until the connection is closed."""
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", port), within_seconds) as connection,
        suppress(ConnectionResetError, BrokenPipeError),
    ):
        connection.sendall(data)
        while more := connection.recv(65_536):
            answer += more
    return answer


@pytest.mark.parametrize("what", [*AMBIGUOUS, *LAX])
def test_what_could_hide_a_second_request_is_refused_whole(service, what):
    """One answer, 400, and the end of the connection."""
    answer = said(service.settings.port, {**AMBIGUOUS, **LAX}[what])
    assert re.findall(rb"HTTP/1\.\d (\d+)", answer) == [b"400"]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert f"x-request-id: {json.loads(body)['request_id']}".encode() in head.lower()
    assert json.loads(body)["code"] in {"http_error", "malformed_upload"}
    page = httpx2.get(f"{service.base_url}/metrics", **PLAIN).text
    assert metric(page, "http_requests_total", route="unmatched") == 0, "the hidden one"


def test_a_body_where_none_belongs_is_not_a_request(client, service):
    """GET with a body: the body is dropped, and what follows is the next request."""
    head = b"GET /health/live HTTP/1.1\r\nHost: a\r\n"
    inner = head + b"Content-Length: %d\r\n\r\n" % LENGTH + HIDDEN
    answer = said(service.settings.port, inner + head + b"Connection: close\r\n\r\n")
    assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"200"]


@pytest.mark.parametrize(
    "head", [b"GET /" + b"a" * 10**6, b"GET / HTTP/1.1\r\nX: " + b"a" * 10**6 + b"\r\n",
             b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200_000]
)  # fmt: skip
def test_headers_have_an_end(service, head):
    """A megabyte of them is refused, and costs no memory."""
    before = peak_bytes(service)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: said(service.settings.port, head), range(20)))
    assert all(a.startswith(b"HTTP/1.1 400") or a == b"" for a in answers), "empty: it was reset"
    assert peak_bytes(service) - before < 32 * 1024**2


GET = b"GET /health HTTP/1.1\r\nHost: a\r\n"
ENDLESS = {  # how it begins, and how it goes on
    "trailers": (CHUNKED + b"0\r\n", b"a: b\r\n"),
    "trailers of a GET": (GET + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n"),
    "one trailer": (CHUNKED + b"0\r\na: ", b"a"),
    "what a chunk says of itself": (CHUNKED + b"3;", b"a"),
    "the body of a GET": (GET + b"Content-Length: 99999999999\r\n\r\n", b"a"),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_has_no_end_is_not_read_for_ever(service, what):
    """Nor kept: the connection is closed before 64 MiB are taken."""
    begins, goes_on = ENDLESS[what]
    before = peak_bytes(service)
    with (
        socket.create_connection(("127.0.0.1", service.settings.port), 10) as connection,
        pytest.raises((ConnectionResetError, BrokenPipeError)),
    ):
        connection.sendall(begins + goes_on * (64 * 1024**2 // len(goes_on)))
    assert peak_bytes(service) - before < 16 * 1024**2


def test_no_range_of_a_page_is_sent(client):
    """Whatever is asked for: the whole of it."""
    for path in ("/docs", "/static/docs.js"):
        whole = client.http.get(path)
        for asked in ("bytes=0-9", "bytes=abc", "bytes=99999999-"):
            answer = client.http.get(path, headers={"Range": asked})
            assert (answer.status_code, answer.content) == (200, whole.content), (path, asked)


def test_an_upgrade_is_not_one(service):
    """Websockets and HTTP/2 are not spoken; the request is answered as it is."""
    for protocol in (b"websocket", b"h2c"):
        head = b"GET /health/live HTTP/1.1\r\nHost: a\r\nUpgrade: %s\r\n" % protocol
        more = (
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", service.settings.port), 10) as connection:
            connection.sendall(head + more + b"\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")


# --- Slow ones


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Client]]:
    """A service that gives slow uploads two seconds."""
    settings = {**QUICK, "upload_patience_seconds": "2"}
    with running(tmp_path_factory.mktemp("patient"), settings) as service:
        client = Client(service)
        client.wait(client.submit()["job_id"])
        yield service, client
        client.http.close()


UPLOAD = (
    b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\n\r\n"
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\0\0'
)


def test_slow_senders_are_cut_off_and_hurt_nobody(patient):
    """100 halves of a header, 50 connections that say nothing, 50 uploads that drip and 20 bodies
    that drip on behind their answer, while honest clients ask and upload; in the end each of them
    is gone."""
    service, client = patient
    address = ("127.0.0.1", service.settings.port)

    def asked(times: int = 40) -> float:
        """Seconds that a client waits; the median, as other processes make some wait."""
        waits = []
        for _ in range(times):
            began = time.perf_counter()
            assert client.http.get("/health/live").status_code == 200
            waits.append(time.perf_counter() - began)
        return statistics.median(waits)

    alone = asked()
    with ExitStack() as stack:

        def opened(data: bytes) -> socket.socket:
            connection = stack.enter_context(socket.create_connection(address, 10))
            connection.sendall(data)
            return connection

        halves = [opened(POST + b"X-Half: ") for _ in range(100)] + [opened(b"") for _ in range(50)]
        drips = [opened(POST + UPLOAD) for _ in range(50)]
        behind = [opened(GET + b"Content-Length: 1000\r\n\r\n") for _ in range(20)]
        assert all(each.recv(65_536).startswith(b"HTTP/1.1 200") for each in behind)
        wait_until(lambda: len(leftovers(service)) >= 50, 30, "the uploads have begun")
        beside = asked()
        job = client.submit(language="en")

        def is_over(connection: socket.socket) -> bool:
            """Or else it gets one more byte."""
            with suppress(OSError):
                connection.sendall(b"a")
            return end_of(connection) == b""

        def drip() -> bool:
            """One more byte of each; is nobody left?"""
            for connection in list(drips):
                if (answer := end_of(connection)) is not None:
                    assert answer.startswith(b"HTTP/1.1 408"), answer
                    drips.remove(connection)
                    continue
                with suppress(OSError):
                    connection.sendall(b"\0")
            for connection in behind:
                is_over(connection)
            return not drips

        wait_until(drip, 30, "drips are cut off")
        wait_until(
            lambda: all(map(is_over, behind)) and all(end_of(half) is not None for half in halves),
            30,
            "the others are cut off",
        )
    client.wait(job["job_id"])
    assert beside < 2 * alone + 0.05, (alone, beside)
    wait_until(lambda: leftovers(service) == [], 30, "what they had sent is gone")


def end_of(connection: socket.socket) -> bytes | None:
    """What was said on a connection that is closed; None while it is open."""
    connection.setblocking(False)
    try:
        answer = connection.recv(65_536)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return b""
    finally:
        connection.settimeout(10)
    return answer


def test_who_is_too_slow_is_told_so(patient):
    service, _ = patient
    answer = said(service.settings.port, POST + UPLOAD, 20)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["code"] == "upload_too_slow"


# --- Absurd forms


def part(name: bytes, content: bytes, more: bytes = b"") -> bytes:
    disposition = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n' % (name, more)
    return disposition + content + b"\r\n"


AUDIO = part(b"file", FOX.read_bytes(), b'; filename="a.wav"')
END = b"--x--\r\n"
DEEP = b"[" * 10_000
FORMS = {
    "nothing": b"",
    "only an end": END,
    "no end": AUDIO,
    "another boundary": AUDIO.replace(b"--x", b"--y") + b"--y--\r\n",
    "the end first": END + AUDIO,
    "line ends first": b"\r\n" * 50_000,
    "ten thousand fields": b"".join(part(b"f%d" % n, b"1") for n in range(10_000)) + END,
    "ten thousand times one field": part(b"task", b"transcribe") * 10_000 + AUDIO + END,
    "a field of 20 MB": part(b"task", b"a" * 20_000_000) + AUDIO + END,
    "a name of 1 MB": part(b"a" * 1_000_000, b"1") + AUDIO + END,
    "a name of control characters": part(b"\0\x1b[2J", b"1") + AUDIO + END,
    "a name that is no UTF-8": part(b"\xff\xfe", b"1") + AUDIO + END,
    "a field that is no UTF-8": part(b"hotwords", b"\xff\xfe") + AUDIO + END,
    "a NUL in a prompt": part(b"initial_prompt", b"a\0b") + AUDIO + END,
    "a form in a form": part(b"file", part(b"file", b"a") + END, b'; filename="a"') + END,
    "two files": AUDIO + AUDIO + END,
    "a file that is a field": part(b"file", b"/etc/passwd") + END,
    "100,000 headers": b"--x\r\n" + b"A: b\r\n" * 100_000 + b"\r\n",
    "a header of 1 MB": b"--x\r\nContent-Disposition: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "no disposition": b"--x\r\nA: b\r\n\r\nc\r\n" + END,
    "an encoding": AUDIO.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n", 1)
    + part(b"language", b"gzip")
    + END,
    "numbers beyond all": part(b"patience", b"1e999") + AUDIO + END,
    "a number that is none": part(b"patience", b"nan") + AUDIO + END,
    "a number of a million digits": part(b"beam_size", b"9" * 16_000) + AUDIO + END,
    "a list without end": part(b"temperature", b"0," * 8_000) + AUDIO + END,
    "JSON of depth": part(b"vad_parameters", DEEP) + AUDIO + END,
    "JSON that is no object": part(b"vad_parameters", b"[1]") + AUDIO + END,
    "JSON with a number beyond all": part(b"vad_parameters", b'{"threshold":1e999}') + AUDIO + END,
    "JSON with digits": part(b"vad_parameters", b'{"speech_pad_ms":%s}' % (b"9" * 9_000))
    + AUDIO
    + END,
    "fields of the class": part(b"__class__", b"1") + part(b"model_config", b"{}") + AUDIO + END,
}


def spent_seconds(service: Service) -> float:
    """The processor time of the API: other processes do not make it longer, as they do a wait."""
    fields = Path(f"/proc/{service.popen('API').pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("what", FORMS)
def test_an_absurd_form_is_a_clear_error_at_once(client, service, what):
    """4xx after two seconds of work at most; nothing of it stays, neither on disk nor in memory."""
    before, spent = peak_bytes(service), spent_seconds(service)
    answer = client.http.post(
        "/transcribe",
        content=FORMS[what],
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert problem(answer)[0] in {400, 413, 415, 422}
    assert len(answer.content) < 10_000
    assert spent_seconds(service) - spent < 2
    assert peak_bytes(service) - before < 64 * 1024**2
    wait_until(lambda: leftovers(service) == [], 30, "nothing is left behind")


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data; boundary=" + "x" * 10_000,
        'multipart/form-data; boundary="\\"',
        "multipart/form-data; boundary=\xff",
        "multipart/form-data; boundary*=utf-8''x",
        "multipart/form-data;" + "a=b;" * 5_000,
        "multipart/mixed; boundary=x",
        "application/x-www-form-urlencoded",
    ],
)
def test_an_absurd_content_type_is_a_clear_error(client, kind):
    headers = {"content-type": kind.encode("latin-1")}
    answer = client.http.post("/transcribe", content=AUDIO + END, headers=headers)
    assert problem(answer)[0] == 400


# --- The OpenAPI document


FEW = 12
EXAMPLES = FEW * int(os.environ.get("FUZZ", "1"))  # of each endpoint; `make hostile` asks for more
NEEDS_SENSE = [  # what would hold only if any file were a recording, and any id a job
    checks.positive_data_acceptance,
    checks.negative_data_rejection,
]


@pytest.fixture(scope="module")
def operations(service) -> dict[str, schemathesis.APIOperation]:
    document = schemathesis.openapi.from_url(f"{service.base_url}/openapi.json")
    return {found.ok().label: found.ok() for found in document.get_all_operations()}


def check(cases: st.SearchStrategy[schemathesis.Case]) -> int:
    """Asks; how often. 0: the strategy has nothing to offer."""
    asked = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=EXAMPLES == FEW,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def each(case: schemathesis.Case) -> None:
        nonlocal asked
        case.call_and_validate(excluded_checks=NEEDS_SENSE)
        asked += 1

    with suppress(Unsatisfiable):
        each()
    return asked


@pytest.mark.parametrize("mode", GenerationMode)
def test_every_answer_is_one_that_the_document_names(operations, mode):
    """Whether a request is as documented or not: no server error; status, type and body of every
    answer are in the document."""
    asked = {
        label: check(operation.as_strategy(generation_mode=mode))
        for label, operation in operations.items()
    }
    assert asked["POST /transcribe"] >= EXAMPLES
    assert asked["GET /result/{job_id}"] >= EXAMPLES


def test_the_answers_of_a_finished_job_are_those_of_the_document(operations, client):
    """Each format of its transcript, its status, and its end."""
    job = client.submit()["job_id"]
    client.wait(job)
    of_jobs = {label: found for label, found in operations.items() if "{job_id}" in label}
    assert len(of_jobs) >= 4
    for _, operation in sorted(of_jobs.items(), key=lambda item: item[0].startswith("DELETE")):
        assert check(operation.as_strategy(path_parameters={"job_id": job}))


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (200, {}),
        (200, {"response_format": "text"}),
        (200, {"response_format": "srt"}),
        (200, {"response_format": "vtt"}),
        (200, {"response_format": "verbose_json"}),
        (200, {"response_format": "verbose_json", "timestamp_granularities[]": "word"}),
        (200, {"stream": "true"}),
        (404, {"model": "other"}),
        (400, {"model": "gpt-4o-transcribe-diarize"}),
        (415, {"file": b"text"}),
        (400, {"file": bytes(range(256)) * 40}),
    ],
)
def test_what_openai_s_endpoints_answer_is_in_the_document(operations, status, fields):
    """Whatever is asked of them."""
    for name in ("transcriptions", "translations"):
        case = operations[f"POST /v1/audio/{name}"].Case(
            body={"file": FOX.read_bytes(), "model": "whisper-1", **fields},
            media_type="multipart/form-data",
        )
        answer = case.call_and_validate(excluded_checks=NEEDS_SENSE)
        assert answer.status_code == status


def test_without_a_descriptor_for_it_an_upload_is_refused_for_now(service, client):
    """Then the service goes on. Its folder can't be listed without one either, so it stays until a
    reaper finds it abandoned."""
    wait_until(lambda: leftovers(service) == [], 30, "earlier jobs are done")
    client.http.get("/health").raise_for_status()  # the connection is there
    pid = service.popen("API").pid
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    lowest_free = next(number for number in count() if number not in used)
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with FOX.open("rb") as file:
            answer = client.http.post("/transcribe", files={"file": file})
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert problem(answer) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0
    for left in leftovers(service):
        (service.settings.data_dir / "uploads" / left).rmdir()
    client.wait(client.submit()["job_id"])
