"""The same as tests/e2e/test_http.py with nginx in front: what two servers could read in two ways
is read in one, or by neither."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx2
import pytest

from local.service import Service
from tests.conftest import wait_until
from tests.deploy.nginx import Nginx, Replica
from tests.e2e.conftest import leftovers, running
from tests.e2e.test_http import AMBIGUOUS, FORMS, LAX, POST, UPLOAD, end_of, said

PLENTY = {"NGINX_LIMITS": "off"}


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with Replica() as replica:
        yield replica


@pytest.fixture(scope="module")
def front(replica: Replica, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with Nginx(tmp_path_factory.mktemp("nginx"), NGINX_API=replica.api, **PLENTY) as nginx:
        yield nginx


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with running(folder, {"upload_patience_seconds": "2"}) as service:
        yield service


@pytest.fixture(scope="module")
def stack(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    api = f"127.0.0.1:{service.settings.port}"
    with Nginx(tmp_path_factory.mktemp("nginx"), NGINX_API=api, **PLENTY) as nginx:
        yield nginx


@pytest.mark.parametrize("what", AMBIGUOUS)
def test_what_could_hide_a_second_request_goes_no_further(front, replica, what):
    """nginx refuses it; the replica sees nothing of it."""
    before = len(replica.requests)
    answer = said(front.port, AMBIGUOUS[what])
    assert [code[:1] for code in re.findall(rb"HTTP/1\.\d (\d+)", answer)] in ([b"4"], [b"5"])
    assert b"application/problem+json" in answer
    assert replica.requests[before:] == []


@pytest.mark.parametrize("what", LAX)
def test_what_nginx_reads_in_its_own_way_hides_nothing_from_the_api(stack, service, what):
    """It becomes one clean request, whose end is where nginx saw it."""
    before = service.settings.data_dir.parent.joinpath("service.log").read_text()
    answer = said(stack.port, LAX[what])
    assert re.findall(rb"HTTP/1\.\d (\d+)", answer) == [b"400"]
    page = httpx2.get(f"{service.base_url}/metrics", trust_env=False).text
    assert 'route="unmatched"' not in page, "the hidden one"
    after = service.settings.data_dir.parent.joinpath("service.log").read_text()
    assert "unexpected_error" not in after[len(before) :]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"a" * 10**6, b"414"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 10**6 + b"\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 10_000 + b"\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
    ],
)
def test_headers_have_an_end_and_one_host(front, replica, head, status):
    before = len(replica.requests)
    answer = said(front.port, head)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"application/problem+json" in answer
    assert len(replica.requests) == before


@pytest.mark.parametrize("what", sorted(FORMS)[::3])
def test_an_absurd_form_is_the_api_s_clear_error(stack, what):
    with httpx2.Client(base_url=stack.url, timeout=30) as client:
        answer = client.post(
            "/transcribe",
            content=FORMS[what],
            headers={"content-type": "multipart/form-data; boundary=x"},
        )
    assert answer.status_code in {400, 413, 415, 422}
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"]


def test_uploads_that_drip_are_cut_off_behind_nginx_too(stack, service):
    """nginx alone would wait as long as a byte comes now and then."""
    with ExitStack() as opened:
        drips = []
        for _ in range(20):
            drip = opened.enter_context(socket.create_connection(("127.0.0.1", stack.port), 10))
            drip.sendall(POST + UPLOAD)
            drips.append(drip)
        answers = []

        def each_is_answered() -> bool:
            for drip in list(drips):
                if (answer := end_of(drip)) is not None:
                    answers.append(answer)
                    drips.remove(drip)
                    continue
                with suppress(OSError):
                    drip.sendall(b"\0")
            return not drips

        wait_until(each_is_answered, 30, "drips are cut off")
    assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers), answers
    wait_until(lambda: leftovers(service) == [], 30, "what they had sent is gone")
