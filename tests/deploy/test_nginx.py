"""The way in: a real nginx with our configuration, before replicas that do as a test wants, and
before the real API."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import httpx2
import pytest
import yaml

from local.service import Service
from tests.conftest import FOX, FOX_WORDS, ROOT, wait_until
from tests.deploy.nginx import (
    Echo,
    Nginx,
    Replica,
    Resolver,
    program,
    render,
    shipped,
    templates,
    variables_of_templates,
)
from tests.e2e.conftest import running

TLS_FILE = ROOT / "docker-compose.tls.yml"
TRUST_ALL = "set_real_ip_from 127.0.0.0/8; set_real_ip_from ::1;"
SECURITY = ("x-content-type-options", "referrer-policy", "content-security-policy")
PLENTY = {"NGINX_LIMITS": "off"}


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """Starts nginx before a replica, or before what NGINX_API names."""
    with ExitStack() as running:

        def begin(replica: Replica | None = None, **changes: str) -> Nginx:
            if replica is not None:
                changes["NGINX_API"] = replica.api
            return running.enter_context(Nginx(tmp_path / f"nginx-{len(changes)}", **changes))

        yield begin


@pytest.fixture
def echo() -> Iterator[Replica]:
    with Replica() as replica:
        yield replica


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """nginx as it is shipped before an echo, for tests that leave it as they found it."""
    folder = tmp_path_factory.mktemp("nginx")
    with Replica() as replica, Nginx(folder, NGINX_API=replica.api) as nginx:
        yield nginx


@contextmanager
def client_of(nginx: Nginx, address: str = "127.0.0.1") -> Iterator[httpx2.Client]:
    """A client that comes from `address`."""
    transport = httpx2.HTTPTransport(local_address=address, verify=False)
    with httpx2.Client(base_url=nginx.url, transport=transport, timeout=30) as client:
        yield client


def get(nginx: Nginx, path: str = "/", **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with client_of(nginx) as client:
        return client.get(path, headers=named)


def seen_by_api(answer: httpx2.Response) -> dict[str, list[str]]:
    """The request's headers as the replica got them."""
    seen: dict[str, list[str]] = {}
    for name, value in answer.json()["headers"]:
        seen.setdefault(name, []).append(value)
    return seen


def raw(nginx: Nginx, data: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", nginx.port), 20)
    sock.sendall(data)
    return sock


def answer_on(sock: socket.socket, method: str = "POST") -> HTTPResponse:
    answer = HTTPResponse(sock, method=method)
    answer.begin()
    return answer


def upload(length: int, *more: str) -> bytes:
    lines = ["POST /transcribe HTTP/1.1", "Host: x", f"Content-Length: {length}", *more, "", ""]
    return "\r\n".join(lines).encode()


def assert_problem(status: int, headers, body: bytes, code: str, retry_after: str | None) -> None:
    """An error of nginx's own has the API's shape, and every header once."""
    problem = json.loads(body)
    assert headers["content-type"] == "application/problem+json"
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["type"] == f"/docs/errors#{code}"
    assert problem["title"]
    assert problem["detail"]
    assert set(problem) == {"type", "title", "status", "detail", "code", "request_id"}
    assert headers.get("retry-after") == retry_after
    assert headers["x-request-id"] == problem["request_id"]
    for name in SECURITY:
        assert headers[name].count(",") == 0, "once"


def assert_own_error(answer: httpx2.Response, status: int, code: str, retry_after: str | None):
    assert answer.status_code == status
    assert_problem(status, answer.headers, answer.content, code, retry_after)


# --- The files


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_nginx_accepts_the_files_without_a_warning(kind, tmp_path, certificate):
    environment = Nginx(tmp_path, NGINX_SERVER=kind).environment
    main = render(tmp_path, environment)
    run = subprocess.run([program(), "-t", "-c", main], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "[warn]" not in run.stderr


def test_docker_compose_sets_every_variable_of_the_templates_and_no_other():
    assert set(shipped()) == variables_of_templates()


def test_what_listens_on_the_shipped_address_is_port_80(tmp_path):
    """The tests listen elsewhere; the container must listen where it is published."""
    render(tmp_path, shipped())
    text = (tmp_path / "conf.d" / "server-plain.inc").read_text()
    assert "listen 80 " in text
    assert "${" not in "".join(path.read_text() for path in (tmp_path / "conf.d").iterdir())


def test_the_tls_file_only_adds_to_nginx():
    services = yaml.safe_load(TLS_FILE.read_text())["services"]
    assert list(services) == ["nginx"]
    assert services["nginx"]["environment"]["NGINX_SERVER"] == "tls"
    assert any(port.endswith(":443") for port in services["nginx"]["ports"])
    assert any(":/etc/nginx/tls:ro" in volume for volume in services["nginx"]["volumes"])


def test_every_template_is_used():
    text = "".join(path.read_text() for path in [*templates(), ROOT / "deploy/nginx/nginx.conf"])
    for path in templates():
        used = "server-${NGINX_SERVER}.inc" if path.stem.startswith("server-") else path.stem
        assert f"include conf.d/{used};" in text, path.name


# --- Uploads


class Streaming(Echo):
    """Says when the first bytes of a body are here."""

    first_bytes: threading.Event

    def on_submit(self) -> None:
        begun = self.rfile.read(4)
        self.first_bytes.set()
        rest = self.rfile.read(int(self.headers["content-length"]) - 4)
        self.answer(received=len(begun) + len(rest))


def test_an_upload_reaches_the_api_while_it_is_still_being_sent(start):
    Streaming.first_bytes = threading.Event()
    with Replica(Streaming) as replica:
        nginx = start(replica)
        with raw(nginx, upload(100_000) + b"RIFF") as sock:
            assert Streaming.first_bytes.wait(10), "the API has bytes of an unfinished upload"
            sock.sendall(b"x" * 99_996)
            assert json.load(answer_on(sock))["received"] == 100_000


def test_an_upload_leaves_nothing_on_nginx_s_disk(front):
    with client_of(front) as client:
        answer = client.post("/transcribe", content=b"x" * 5_000_000)
    assert answer.json()["received"] == 5_000_000
    spooled = [path for path in front.folder.glob("nginx-*/**/*") if path.is_file()]
    assert spooled == []


def test_an_upload_may_take_longer_than_an_answer(start):
    """The wait for an answer begins when all is sent."""
    Streaming.first_bytes = threading.Event()
    with Replica(Streaming) as replica:
        nginx = start(replica, NGINX_ANSWER_TIMEOUT_SECONDS="1")
        with raw(nginx, upload(40)) as sock:
            for _ in range(8):
                sock.sendall(b"drops")
                time.sleep(0.25)  # a slow sender is what this is about
            assert answer_on(sock).status == 200


def test_a_body_far_over_the_limit_is_413_before_it_is_sent(start, echo):
    nginx = start(echo, MAX_FILE_SIZE_MB="1")
    with raw(nginx, upload(11_000_000)) as sock:
        answer = answer_on(sock)
        assert answer.status == 413
        assert_problem(413, answer.headers, answer.read(), "file_too_large", None)
    assert echo.requests == []


def test_a_client_that_sends_all_before_it_reads_gets_the_413(start, echo):
    """Most do; a connection that is closed at once would take the answer with it."""
    nginx = start(echo, MAX_FILE_SIZE_MB="1")
    with raw(nginx, upload(30_000_000) + b"x" * 30_000_000) as sock:
        answer = answer_on(sock)
        assert_problem(413, answer.headers, answer.read(), "file_too_large", None)


class Draining(Echo):
    """Reads whatever comes, as long as it comes."""

    def on_submit(self) -> None:
        while self.rfile.read1(65_536):
            pass
        self.server.requests.append("end of POST")
        self.close_connection = True


def test_a_body_without_a_length_is_cut_at_the_limit(start):
    """Chunked: nobody knows how much is still to come."""
    with Replica(Draining) as replica:
        nginx = start(replica, MAX_FILE_SIZE_MB="1")
        with client_of(nginx) as client:
            answer = client.post("/transcribe", content=(b"x" * 65_536 for _ in range(400)))
        assert_own_error(answer, 413, "file_too_large", None)
        wait_until(lambda: "end of POST" in replica.requests, 30, "the API is told")


def test_the_file_limit_itself_is_left_to_the_api(start, echo):
    """A form is larger than its file: what nginx takes must exceed MAX_FILE_SIZE_MB."""
    nginx = start(echo, MAX_FILE_SIZE_MB="1")
    with client_of(nginx) as client:
        answer = client.post("/transcribe", content=b"x" * (1_048_576 + 4 * 1_048_576))
    assert answer.status_code == 200


def test_a_sender_that_stalls_is_cut_off(start):
    """The API sees the end of the connection, and the log says 408."""
    with Replica(Draining) as replica:
        nginx = start(replica, NGINX_BODY_TIMEOUT_SECONDS="1")
        with raw(nginx, upload(1000) + b"only this") as sock:
            wait_until(lambda: "end of POST" in replica.requests)
            assert nginx.logged(path="/transcribe")["status"] == 408
            assert is_closed(sock)


def is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_sender_of_half_a_header_is_cut_off(start, echo):
    nginx = start(echo, NGINX_HEADER_TIMEOUT_SECONDS="1")
    with raw(nginx, b"POST /transcribe HTTP/1.1\r\nHo") as sock:
        assert is_closed(sock)
    assert echo.requests == []


# --- Limits for each client


def test_an_office_behind_one_address_passes_the_limits_as_shipped(start, echo):
    """A hundred people, each with an upload and twenty looks at its status, all at once."""
    nginx = start(echo)

    def person(number: int) -> set[int]:
        with client_of(nginx) as client:
            codes = {client.post("/transcribe", content=b"audio").status_code}
            return codes | {client.get(f"/status/{number}").status_code for _ in range(20)}

    with ThreadPoolExecutor(20) as people:
        codes = set().union(*people.map(person, range(100)))
    assert codes == {200}


def test_a_flood_of_uploads_is_429_and_hurts_nobody_else(start, echo):
    nginx = start(echo, NGINX_SUBMIT_PER_SECOND="1", NGINX_SUBMIT_BURST="5")
    with client_of(nginx) as flood, client_of(nginx, "127.0.0.9") as other:
        answers = [flood.post("/transcribe", content=b"audio") for _ in range(30)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert [answer.status_code for answer in answers[:6]] == [200] * 6
        assert len(refused) > 15
        assert_own_error(refused[0], 429, "rate_limited", "1")
        assert flood.get("/status/1").status_code == 200, "reads are counted apart"
        assert other.post("/transcribe", content=b"audio").status_code == 200
        after = wait_until(lambda: flood.post("/v1/audio/transcriptions").status_code == 200)
        assert after, "it may go on after a second"


def test_reads_have_a_limit_of_their_own(start, echo):
    nginx = start(echo, NGINX_READ_PER_SECOND="1", NGINX_READ_BURST="5")
    with client_of(nginx) as client:
        codes = Counter(client.get("/status/1").status_code for _ in range(30))
        assert codes[200] >= 6
        assert codes[429] > 15
        assert client.post("/transcribe", content=b"audio").status_code == 200
        assert {client.get("/nginx-health").status_code for _ in range(20)} == {200}


def test_limits_can_be_switched_off(start, echo):
    nginx = start(echo, NGINX_LIMITS="off", NGINX_SUBMIT_PER_SECOND="1", NGINX_SUBMIT_BURST="1")
    with client_of(nginx) as client:
        assert {client.post("/transcribe").status_code for _ in range(30)} == {200}


def test_a_refused_upload_is_not_asked_to_begin(start, echo):
    """With Expect: 100-continue a client waits for leave to send; 429 comes instead of it."""
    nginx = start(echo, NGINX_SUBMIT_PER_SECOND="1", NGINX_SUBMIT_BURST="1")

    def is_refused() -> bool:
        exhaust(nginx)
        with raw(nginx, upload(10_000_000, "Expect: 100-continue")) as sock:
            return sock.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 429"

    wait_until(is_refused, 30, "it is refused, not asked")


def exhaust(nginx: Nginx) -> None:
    """The next upload is refused, too, if it comes within a second, which no test can promise."""
    with client_of(nginx) as client:
        while client.post("/transcribe").status_code != 429:
            pass


def test_a_client_that_sends_all_before_it_reads_gets_the_429(start, echo):
    nginx = start(echo, NGINX_SUBMIT_PER_SECOND="1", NGINX_SUBMIT_BURST="1")

    def is_refused() -> bool:
        exhaust(nginx)
        with raw(nginx, upload(30_000_000) + b"x" * 30_000_000) as sock:
            answer = answer_on(sock)
            if answer.status == 200:
                return False
            assert_problem(429, answer.headers, answer.read(), "rate_limited", "1")
            return True

    wait_until(is_refused, 30, "it is refused")


def test_uploads_at_the_same_time_are_counted_for_each_client(start, echo):
    """Slow senders hold a connection to the API each; one client gets only so many."""
    nginx = start(echo, NGINX_SUBMIT_CONNECTIONS="2")
    with raw(nginx, upload(10) + b"a") as first, raw(nginx, upload(10) + b"b"):
        wait_until(lambda: len(echo.requests) == 2, 30, "both are under way")
        with client_of(nginx) as third, client_of(nginx, "127.0.0.9") as other:
            assert_own_error(third.post("/transcribe"), 429, "rate_limited", "1")
            assert third.get("/status/1").status_code == 200
            assert other.post("/transcribe").status_code == 200
            first.sendall(b"x" * 9)
            assert answer_on(first).status == 200
            # nginx lingers for 5 s, as it does with every client that may be sending still.
            wait_until(lambda: third.post("/transcribe").status_code == 200)


def test_everything_under_way_is_counted_for_each_client(start):
    """Event streams and long polls, too."""
    release = threading.Event()

    class Waiting(Echo):
        def on_read(self) -> None:
            if self.path == "/jobs/1/events":
                release.wait(20)
            self.answer()

    with Replica(Waiting) as replica:
        nginx = start(replica, NGINX_CLIENT_CONNECTIONS="2")
        request = b"GET /jobs/1/events HTTP/1.1\r\nHost: x\r\n\r\n"
        with raw(nginx, request) as first, raw(nginx, request):
            wait_until(lambda: len(replica.requests) == 2, 30, "both wait")
            with client_of(nginx, "127.0.0.9") as other:
                assert_own_error(get(nginx, "/status/1"), 429, "rate_limited", "1")
                assert other.get("/status/1").status_code == 200
            release.set()
            assert answer_on(first, "GET").status == 200
            wait_until(lambda: get(nginx, "/status/1").status_code == 200)


# --- Who the client is


def test_a_forged_address_buys_nothing(start, echo):
    """X-Forwarded-For from a client counts for nothing, and the API does not see it."""
    nginx = start(echo, NGINX_SUBMIT_PER_SECOND="1", NGINX_SUBMIT_BURST="3")
    with client_of(nginx) as client:
        answers = [
            client.post("/transcribe", headers={"X-Forwarded-For": f"198.51.100.{number}"})
            for number in range(30)
        ]
    assert Counter(answer.status_code for answer in answers)[429] > 15
    assert seen_by_api(answers[0])["x-forwarded-for"] == ["127.0.0.1"]


def test_what_clients_say_about_themselves_is_replaced(front):
    forged = {
        "x_forwarded_for": "6.6.6.6",
        "x_real_ip": "6.6.6.6",
        "x_forwarded_proto": "https",
        "x_forwarded_host": "evil.example",
        "x_forwarded_port": "666",
        "forwarded": "for=6.6.6.6",
    }
    seen = seen_by_api(get(front, "/status/1", **forged))
    assert seen["x-forwarded-for"] == seen["x-real-ip"] == ["127.0.0.1"]
    assert seen["x-forwarded-proto"] == ["http"]
    assert seen["host"] == seen["x-forwarded-host"] == [f"127.0.0.1:{front.port}"]
    assert "x-forwarded-port" not in seen
    assert "forwarded" not in seen


BURST = {"NGINX_SUBMIT_PER_SECOND": "1", "NGINX_SUBMIT_BURST": "30"}


def is_let_in(nginx: Nginx, forwarded_for: str) -> bool:
    """Uses up what a client may send at once; had it not used it up before?"""
    with client_of(nginx) as client:
        headers = {"X-Forwarded-For": forwarded_for}
        codes = Counter(client.post("/transcribe", headers=headers).status_code for _ in range(60))
    assert codes[200] + codes[429] == 60
    assert codes[429]
    return codes[200] > 30


def test_behind_a_trusted_proxy_each_client_is_counted_by_itself(start, echo):
    nginx = start(
        echo,
        NGINX_TRUSTED_PROXIES=TRUST_ALL,
        **BURST,
    )
    assert is_let_in(nginx, "198.51.100.1")
    assert is_let_in(nginx, "198.51.100.2"), "another client has its own count"
    assert not is_let_in(nginx, "6.6.6.6, 198.51.100.1"), "what a client adds is ignored"
    with client_of(nginx) as proxy:
        headers = {"X-Forwarded-For": "6.6.6.6, 198.51.100.7", "X-Forwarded-Proto": "https"}
        seen = seen_by_api(proxy.get("/status/1", headers=headers))
        headers["X-Forwarded-For"] = "198.51.100.7, 127.0.0.3"
        seen_through_two = seen_by_api(proxy.get("/status/1", headers=headers))
    assert seen["x-forwarded-for"] == seen_through_two["x-forwarded-for"] == ["198.51.100.7"]
    assert seen["x-forwarded-proto"] == ["https"]


def test_only_listed_proxies_are_trusted(start, echo):
    nginx = start(echo, NGINX_TRUSTED_PROXIES="set_real_ip_from 127.0.0.9/32;")
    headers = {"X-Forwarded-For": "198.51.100.7", "X-Forwarded-Proto": "https"}
    with client_of(nginx, "127.0.0.9") as proxy, client_of(nginx, "127.0.0.8") as stranger:
        believed = seen_by_api(proxy.get("/status/1", headers=headers))
        ignored = seen_by_api(stranger.get("/status/1", headers=headers))
    assert (believed["x-forwarded-for"], believed["x-forwarded-proto"]) == (
        ["198.51.100.7"],
        ["https"],
    )
    assert (ignored["x-forwarded-for"], ignored["x-forwarded-proto"]) == (["127.0.0.8"], ["http"])


@pytest.mark.parametrize(
    ("one", "another", "is_same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1:2:3", True),
        ("2001:db8:0:7::1", "2001:db8:0:7:a:b:c:d", True),
        ("2001:db8:0:7::1", "2001:db8:0:8::1", False),
        ("198.51.100.1", "::ffff:198.51.100.1", True),
        ("::ffff:198.51.100.1", "::ffff:198.51.100.2", False),
        ("0.0.0.10", "10.10.10.10", False),
    ],
)
def test_an_ipv6_network_counts_as_one_client(one, another, is_same, start, echo):
    """A /64 is one customer's, who could use another address for each request."""
    nginx = start(
        echo,
        NGINX_TRUSTED_PROXIES=TRUST_ALL,
        **BURST,
    )
    assert is_let_in(nginx, one)
    assert is_let_in(nginx, another) != is_same


# --- Request ids, headers, the log


@pytest.mark.parametrize("path", ["/status/1", "/metrics"])
def test_a_sane_request_id_is_kept_and_answered_once(front, path):
    answer = get(front, path, x_request_id="my-id_1.2")
    assert answer.headers.get_list("x-request-id") == ["my-id_1.2"]
    if path == "/metrics":
        assert answer.json()["request_id"] == "my-id_1.2"
    else:
        assert seen_by_api(answer)["x-request-id"] == ["my-id_1.2"]


@pytest.mark.parametrize("bad", ["a b", "x" * 65, '"}', "ä", ""])
def test_another_request_id_is_replaced(front, bad):
    with client_of(front) as client:
        answer = client.get("/status/1", headers={"x-request-id": bad.encode()})
    (given,) = answer.headers.get_list("x-request-id")
    assert len(given) == 32
    assert seen_by_api(answer)["x-request-id"] == [given]
    assert front.logged(request_id=given)["path"] == "/status/1"


def test_an_error_has_the_same_id_in_header_body_and_log(front):
    answer = get(front, "/metrics")
    assert_own_error(answer, 404, "not_found", None)
    assert front.logged(request_id=answer.json()["request_id"])["status"] == 404


def test_headers_that_the_api_sends_are_left_alone(start):
    class Careful(Echo):
        def on_read(self) -> None:
            self.answer(503, {"Content-Security-Policy": "own", "Retry-After": "77"})

    with Replica(Careful) as replica:
        answer = get(start(replica))
    assert (answer.status_code, answer.json()["path"]) == (503, "/"), "its own body, too"
    assert answer.headers.get_list("content-security-policy") == ["own"]
    assert answer.headers.get_list("retry-after") == ["77"]
    assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
    assert answer.headers["server"] == "nginx", "and no version"
    assert "strict-transport-security" not in answer.headers


def test_the_log_has_no_query_strings_and_the_client_s_own_method(start):
    nginx = start(NGINX_API="127.0.0.1:1")
    with client_of(nginx) as client:
        answer = client.post("/transcribe?key=secret", headers={"referer": "http://x/?secret"})
    line = nginx.logged(request_id=answer.headers["x-request-id"])
    assert (line["method"], line["path"], line["status"]) == ("POST", "/transcribe", 502)
    assert isinstance(line["seconds"], float)
    assert "secret" not in json.dumps(line)


def test_the_log_stays_json_whatever_is_sent(front):
    with raw(front, b'GET /"\\\xff HTTP/1.1\r\nHost: x\r\nUser-Agent: "\\\x01\xff\r\n\r\n') as sock:
        answer_on(sock, "GET")
    with raw(front, b"\x16\x03\x01 nonsense\r\n\r\n") as sock:
        answer = answer_on(sock, "GET")
        assert_problem(400, answer.headers, answer.read(), "http_error", None)
    wait_until(lambda: front.logged(path=""))
    assert all(isinstance(line, dict) for line in front.access_log())


def test_successful_probes_are_not_logged(start, echo):
    nginx = start(echo)
    with client_of(nginx) as client:
        for path in ("/nginx-health", "/health", "/health/live", "/health/ready", "/status/1"):
            assert client.get(path).status_code == 200
    nginx.logged(path="/status/1")
    assert [line["path"] for line in nginx.access_log()] == ["/status/1"]


# --- What is not for clients


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/metrics?a=b", "/%6detrics", "//metrics", "/docs/../metrics", "/metrics%0A"],
)
def test_metrics_are_not_public(start, echo, path):
    nginx = start(echo)
    connection = HTTPConnection("127.0.0.1", nginx.port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == 404
    assert_problem(404, answer.headers, answer.read(), "not_found", None)
    connection.close()
    assert echo.requests == []


def test_the_error_page_can_t_be_asked_for(front):
    assert_own_error(get(front, "/problem"), 404, "not_found", None)


def test_the_health_check_answers_this_machine_only(start, echo):
    nginx = start(echo, NGINX_TRUSTED_PROXIES=TRUST_ALL)
    assert get(nginx, "/nginx-health").status_code == 200
    from_outside = get(nginx, "/nginx-health", x_forwarded_for="198.51.100.1")
    assert_own_error(from_outside, 403, "http_error", None)
    assert echo.requests == []


def test_the_health_check_needs_no_api(start):
    nginx = start(NGINX_API="127.0.0.1:1")
    assert get(nginx, "/nginx-health").status_code == 200


# --- Replicas that fail


def test_no_api_is_a_problem_with_a_time_to_come_back(start):
    nginx = start(NGINX_API="127.0.0.1:1")
    with client_of(nginx) as client:
        assert_own_error(client.get("/status/1"), 502, "unavailable", "5")
        assert_own_error(client.post("/transcribe", content=b"x"), 502, "unavailable", "5")


def test_an_unknown_name_is_a_problem_until_it_is_known(start, echo):
    """nginx starts before the API has an address."""
    with Resolver() as names:
        nginx = start(NGINX_API=f"api:{echo.port}", NGINX_RESOLVER=names.resolver)
        assert_own_error(get(nginx), 502, "unavailable", "5")
        names.addresses = [echo.address]
        wait_until(lambda: get(nginx).status_code == 200, 30, "the API is found")


class Losing(Echo):
    """Takes the whole request and hangs up."""

    def on_read(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.close_connection = True

    on_submit = on_read


class LosingUploads(Echo):
    """Answers reads and loses the rest."""

    on_submit = Losing.on_read


@pytest.fixture
def pair(start) -> Iterator:
    """nginx before two replicas with handlers of the test's; (nginx, first, second)."""
    with ExitStack() as running:

        def begin(one: type[Echo], other: type[Echo], **changes: str):
            first = running.enter_context(Replica(one, "127.0.0.2"))
            second = running.enter_context(Replica(other, "127.0.0.3", first.port))
            names = running.enter_context(Resolver("127.0.0.2", "127.0.0.3"))
            nginx = start(NGINX_API=f"api:{first.port}", NGINX_RESOLVER=names.resolver, **changes)
            wait_until(lambda: get(nginx, "/nothing").status_code == 200, 30, "names are known")
            return nginx, first, second

        yield begin


@pytest.mark.parametrize("size", [0, 10, 1_000_000])
def test_a_post_is_never_sent_twice(pair, size):
    nginx, first, second = pair(Losing, LosingUploads)
    with client_of(nginx) as client:
        answers = [client.post(f"/transcribe?n={n}", content=b"x" * size) for n in range(6)]
    posts = [line for line in first.requests + second.requests if line.startswith("POST")]
    assert sorted(posts) == [f"POST /transcribe?n={n}" for n in range(6)]
    for answer in answers:
        assert_own_error(answer, 502, "unavailable", "5")


def test_a_read_is_sent_to_another_replica_when_one_loses_it(pair):
    nginx, first, _ = pair(Losing, Echo)
    with client_of(nginx) as client:

        def was_lost() -> bool:
            assert client.get("/status/1").json()["replica"] == "127.0.0.3"
            return "GET /status/1" in first.requests

        wait_until(was_lost, 30, "the replica that loses it is asked, too")


def test_a_rolling_restart_costs_nobody_a_request(pair):
    """Each replica goes as soon as the other is back. Its address stays in DNS: nothing was sent
    to it, so uploads may go elsewhere, too."""
    nginx, first, second = pair(Echo, Echo)
    there = [first, second]
    with client_of(nginx) as client, ExitStack() as running:
        for turn in range(6):
            gone = there[turn % 2]
            gone.shutdown()
            gone.server_close()
            for _ in range(5):
                assert client.get("/status/1").status_code == 200
                assert client.post("/transcribe", content=b"x" * 100_000).status_code == 200
            back = Replica(Echo, gone.address, gone.port)
            there[turn % 2] = running.enter_context(back)


def test_a_replica_that_does_not_even_refuse_costs_time_only(start, echo):
    """Its machine is gone, and DNS does not know yet."""
    with ExitStack() as running:
        names = running.enter_context(Resolver("127.0.0.1", "127.0.0.5"))
        silent = running.enter_context(socket.create_server(("127.0.0.5", echo.port), backlog=0))
        for _ in range(3):  # a full queue: the kernel drops whoever comes next
            waiting = running.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(silent.getsockname())
        nginx = start(
            NGINX_API=f"api:{echo.port}",
            NGINX_RESOLVER=names.resolver,
            NGINX_CONNECT_TIMEOUT_SECONDS="1",
        )
        wait_until(lambda: get(nginx).status_code == 200, 30, "names are known")
        with client_of(nginx) as client:
            codes = [client.get("/status/1").status_code for _ in range(4)]
            codes += [client.post("/transcribe", content=b"x").status_code for _ in range(4)]
        assert set(codes) == {200}
        assert any("," in line["upstream"] for line in nginx.access_log()), "it was tried"


def test_an_api_that_does_not_answer_is_504(start):
    release = threading.Event()

    class Stuck(Echo):
        def on_submit(self) -> None:
            release.wait(20)
            self.close_connection = True

    with Replica(Stuck) as replica:
        nginx = start(replica, NGINX_ANSWER_TIMEOUT_SECONDS="1")
        with client_of(nginx) as client:
            assert_own_error(client.post("/transcribe"), 504, "unavailable", "5")
        release.set()
        assert replica.requests == ["POST /transcribe"]


def test_reads_share_connections_to_the_api_and_uploads_do_not(start, echo):
    """A kept connection may be closing; only a read can be sent again."""
    nginx = start(echo, NGINX_WORKER_PROCESSES="1")
    with client_of(nginx) as client:
        reads = {client.get("/status/1").json()["connection"] for _ in range(10)}
        uploads = {client.post("/transcribe").json()["connection"] for _ in range(10)}
    assert len(reads) == 1
    assert len(uploads) == 10
    assert not reads & uploads


# --- Scaling


def test_replicas_that_come_and_go_are_followed_without_a_reload(start):
    """2, then 3, then 1: the load is shared by all there are, and no read fails on the way."""
    with ExitStack() as running:
        replicas = [running.enter_context(Replica(Echo, "127.0.0.2"))]
        port = replicas[0].port
        replicas += [running.enter_context(Replica(Echo, f"127.0.0.{n}", port)) for n in (3, 4)]
        names = running.enter_context(Resolver("127.0.0.2", "127.0.0.3"))
        nginx = start(
            NGINX_API=f"api:{port}",
            NGINX_RESOLVER=names.resolver,
            NGINX_RESOLVER_VALID_SECONDS="1",
            **PLENTY,
        )
        wait_until(lambda: get(nginx).status_code == 200, 30, "names are known")
        codes: Counter[int] = Counter()
        enough = threading.Event()

        def read_on() -> None:
            with client_of(nginx) as client:
                while not enough.wait(0.002):
                    codes[client.get("/status/1").status_code] += 1

        reader = threading.Thread(target=read_on)
        reader.start()

        def shares() -> list[float]:
            """How the replicas share the load of these reads and of the others meanwhile."""
            before = [len(replica.requests) for replica in replicas]
            with client_of(nginx) as client:
                for _ in range(60):
                    assert client.get("/status/2").status_code == 200
            got = [len(replica.requests) - n for replica, n in zip(replicas, before, strict=True)]
            return [part / sum(got) for part in got]

        try:
            two = shares()
            names.addresses = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
            wait_until(lambda: replicas[2].requests, 30, "the third is asked")
            wait_until(lambda: min(shares()) > 0.2, 30, "all three share the load")
            names.addresses = ["127.0.0.4"]
            for replica in replicas[:2]:
                replica.shutdown()
                replica.server_close()
            wait_until(lambda: shares() == [0, 0, 1], 30, "only the third is asked")
        finally:
            enough.set()
            reader.join(10)
        assert two[2] == 0
        assert min(two[:2]) > 0.3, two
        assert set(codes) == {200}, codes
        assert codes[200] > 100


def test_a_replica_that_vanishes_costs_nobody_a_request(start):
    """Its address swallows what is sent there until the resolver has forgotten it, and what waits
    to connect at that moment must not be given up."""
    with ExitStack() as running:
        replica = running.enter_context(Replica(Echo, "127.0.0.5"))
        gone = running.enter_context(socket.create_server(("127.0.0.6", replica.port), backlog=0))
        for _ in range(3):  # a full queue: the kernel drops whoever comes next
            waiting = running.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(gone.getsockname())
        names = running.enter_context(Resolver("127.0.0.5", "127.0.0.6"))
        nginx = start(
            NGINX_API=f"api:{replica.port}",
            NGINX_RESOLVER=names.resolver,
            NGINX_RESOLVER_VALID_SECONDS="1",
            NGINX_CONNECT_TIMEOUT_SECONDS="2",
            **PLENTY,
        )
        wait_until(lambda: get(nginx).status_code == 200, 30, "names are known")

        def use(number: int) -> set[int]:
            method, path = ("GET", "/status/1") if number % 2 else ("POST", "/transcribe")
            with client_of(nginx) as client:
                return {client.request(method, path).status_code for _ in range(3)}

        with ThreadPoolExecutor(24) as users:
            answers = [users.submit(use, number) for number in range(24)]
            wait_until(lambda: len(replica.requests) >= 12, 30, "the load is on")
            names.addresses = ["127.0.0.5"]
            assert {code for answer in answers for code in answer.result()} == {200}
        tried = [line["upstream"] for line in nginx.access_log()]
        assert any(gone.getsockname()[0] in upstream for upstream in tried), "nobody met it"


# --- Answers that arrive piece by piece


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/jobs/1/events", {}),
        ("POST", "/v1/audio/transcriptions", {}),
        ("GET", "/elsewhere", {"X-Accel-Buffering": "no"}),
    ],
)
def test_events_arrive_one_by_one(start, method, path, headers):
    read = threading.Semaphore(0)

    class Events(Echo):
        def on_read(self) -> None:
            self.send_response(200)
            for name, value in {"Content-Type": "text/event-stream", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.close_connection = True
            for number in range(3):
                self.wfile.write(f"data: {number}\n\n".encode())
                assert read.acquire(timeout=10), "the client has read it"

        on_submit = on_read

    got = b""
    with (
        Replica(Events) as replica,
        client_of(start(replica)) as client,
        client.stream(method, path) as answer,
    ):
        for piece in answer.iter_raw():
            got += piece
            read.release()
    assert got == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"


def test_an_event_stream_may_be_silent_longer_than_an_answer_may_take(start):
    """So may a transcription whose caller waits for it."""

    class Silent(Echo):
        def on_read(self) -> None:
            time.sleep(2)  # a slow API is what this is about
            self.answer()

        on_submit = on_read

    with Replica(Silent) as replica:
        nginx = start(replica, NGINX_ANSWER_TIMEOUT_SECONDS="1")
        with client_of(nginx) as client:
            assert client.get("/jobs/1/events").status_code == 200
            assert client.post("/v1/audio/transcriptions").status_code == 200


# --- TLS


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A folder with what NGINX_TLS_DIR is to hold, where `start` puts nginx's files."""
    folder = tmp_path / "tls"
    folder.mkdir()
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    files = ["-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem"]
    try:
        subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl on this machine to make a certificate with")
    return folder


@pytest.fixture
def secure(tmp_path, certificate, echo) -> Iterator[tuple[Nginx, ssl.SSLContext]]:
    """nginx with NGINX_SERVER=tls, and what a client of it trusts."""
    context = ssl.create_default_context(cafile=certificate / "fullchain.pem")
    with Nginx(tmp_path, NGINX_SERVER="tls", NGINX_API=echo.api) as nginx:
        yield nginx, context


def test_tls_serves_the_api(secure):
    nginx, context = secure
    url = f"https://127.0.0.1:{nginx.tls_port}"
    with httpx2.Client(base_url=url, verify=context, trust_env=False) as client:
        answer = client.post("/transcribe", content=b"x" * 1_000_000)
        assert answer.json()["received"] == 1_000_000
        assert seen_by_api(answer)["x-forwarded-proto"] == ["https"]
        refused = client.get("/metrics")
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    assert_own_error(refused, 404, "not_found", None)
    assert refused.headers.get_list("strict-transport-security") == ["max-age=31536000"]


def test_http_leads_to_https_and_keeps_the_method(secure, echo):
    nginx, _ = secure
    with client_of(nginx) as client:
        answer = client.post("/transcribe?a=b", content=b"x")
        assert answer.status_code == 308
        assert answer.headers["location"] == (f"https://127.0.0.1:{nginx.tls_port}/transcribe?a=b")
        assert client.get("/nginx-health").status_code == 200
        assert client.get("/metrics").status_code == 308
    assert echo.requests == []


def test_http_shows_certbot_s_answers_and_nothing_else_of_the_folder(secure):
    nginx, _ = secure
    challenge = nginx.folder / "tls" / ".well-known" / "acme-challenge" / "token"
    challenge.parent.mkdir(parents=True)
    challenge.write_text("proof")
    assert get(nginx, "/.well-known/acme-challenge/token").text == "proof"
    connection = HTTPConnection("127.0.0.1", nginx.port, timeout=10)
    connection.request("GET", "/.well-known/acme-challenge/../../privkey.pem")
    assert connection.getresponse().status == 308
    connection.close()


def test_tls_speaks_http_2_and_no_old_protocol(secure):
    nginx, context = secure
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("127.0.0.1", nginx.tls_port), 10) as sock,
        context.wrap_socket(sock, server_hostname="localhost") as tls,
    ):
        assert tls.selected_alpn_protocol() == "h2"
        assert tls.version() == "TLSv1.3"
    address = f"127.0.0.1:{nginx.tls_port}"
    for version, is_spoken in (("-tls1_2", True), ("-tls1_1", False)):
        command = ["openssl", "s_client", version, "-cipher", "ALL:@SECLEVEL=0"]
        run = subprocess.run(
            [*command, "-connect", address], input=b"", capture_output=True, check=False
        )
        assert (b"Cipher is ECDHE" in run.stdout) == is_spoken, run.stdout


# --- Before the real API


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with running(folder, {"max_file_size_mb": "1"}) as service:
        yield service


@pytest.fixture
def api(service, start) -> Nginx:
    return start(NGINX_API=f"127.0.0.1:{service.settings.port}", MAX_FILE_SIZE_MB="1")


def test_a_recording_becomes_a_transcript_through_nginx(api):
    with client_of(api) as client, FOX.open("rb") as file:
        accepted = client.post("/transcribe", files={"file": file}, data={"language": "en"})
        assert accepted.status_code == 202, accepted.text
        links = accepted.json()["links"]
        assert accepted.headers["location"] == links["status"]
        wait_until(lambda: client.get(links["status"]).json()["status"] == "completed", 60)
        result = client.get(links["result"])
    assert result.json()["text"].lower().strip(" .") == FOX_WORDS
    for name in ("x-request-id", *SECURITY):
        assert len(result.headers.get_list(name)) == 1, name


def test_the_api_s_own_413_reaches_a_client_that_sends_on(api):
    """Above its file limit and below nginx's; refused before it is read."""
    with client_of(api) as client:
        answer = client.post("/transcribe", files={"file": b"\0" * 5_000_000})
        in_pieces = client.post(
            "/transcribe",
            content=(b"\0" * 65_536 for _ in range(100)),
            headers={"content-type": "multipart/form-data; boundary=x"},
        )
    assert (answer.status_code, answer.json()["code"]) == (413, "file_too_large")
    assert "1 MB" in answer.json()["detail"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert (in_pieces.status_code, in_pieces.json()["code"]) == (400, "malformed_upload")
    assert answer.headers["connection"] == "close", "what follows on it would be lost"


def test_the_docs_page_keeps_its_own_policy(api):
    answer = get(api, "/docs")
    assert answer.status_code == 200
    (policy,) = answer.headers.get_list("content-security-policy")
    assert "script-src 'self'" in policy
