"""The OpenAI-compatible endpoints with nginx before them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from openai import OpenAI

from local.service import Service
from shared.settings import Settings
from tests.conftest import FOX, FOX_WORDS, wait_until
from tests.deploy.nginx import Echo, Nginx, Replica, shipped
from tests.e2e.conftest import QUICK, Client, running, variant
from tests.e2e.sdk import waiters

ADDRESS = "/v1/audio/transcriptions"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("service"), QUICK) as service:
        yield service


@pytest.fixture(scope="module")
def nginx(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    api = f"{service.settings.host}:{service.settings.port}"
    with Nginx(tmp_path_factory.mktemp("nginx"), NGINX_API=api) as nginx:
        yield nginx


@pytest.fixture
def sdk(nginx: Nginx) -> Iterator[OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with OpenAI(
        base_url=f"{nginx.url}/v1", api_key="any", max_retries=0, timeout=60, http_client=http
    ) as sdk:
        yield sdk


def assert_envelope(answer: httpx2.Response, status: int, kind: str, code: str, param: str | None):
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == (kind, code, param)
    assert error["message"]
    assert answer.headers.get_list("x-request-id")


def test_nginx_s_own_errors_have_openai_s_envelope_below_v1(tmp_path):
    """And nowhere else; a time to come back is named as elsewhere."""
    with (
        Nginx(tmp_path / "down", NGINX_API="127.0.0.1:1") as down,
        Replica(Echo) as replica,
        Nginx(
            tmp_path / "full",
            NGINX_API=replica.api,
            MAX_FILE_SIZE_MB="1",
            NGINX_SUBMIT_PER_SECOND="1",
            NGINX_SUBMIT_BURST="1",
        ) as full,
        httpx2.Client(trust_env=False, timeout=30) as http,
    ):
        for method, path in [("POST", ADDRESS), ("GET", "/v1/models"), ("GET", "/v1?a=b")]:
            answer = http.request(method, down.url + path)
            assert_envelope(answer, 502, "server_error", "unavailable", None)
            assert answer.headers["retry-after"] == "5"
        assert http.get(f"{down.url}/v10").json()["code"] == "unavailable"
        answer = http.post(full.url + ADDRESS, content=b"x" * 11_000_000)
        assert_envelope(answer, 413, "invalid_request_error", "file_too_large", "file")
        answers = [http.post(full.url + ADDRESS) for _ in range(10)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert_envelope(refused[0], 429, "rate_limit_exceeded", "rate_limit_exceeded", None)
        assert refused[0].headers["retry-after"] == "1"


def test_nginx_waits_longer_than_the_api_lets_anybody_wait():
    longest = Settings.model_fields["max_wait_seconds"].default
    assert int(shipped()["NGINX_STREAM_TIMEOUT_SECONDS"]) > longest


def test_the_sdk_is_served_through_nginx(sdk):
    assert sdk.audio.transcriptions.create(file=FOX, model="whisper-1").text == FOX_WORDS
    assert "whisper-1" in [model.id for model in sdk.models.list()]
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("an/other")


def test_a_stream_begins_while_its_job_waits_and_ends_with_its_reader(
    service: Service, sdk: OpenAI, tmp_path: Path
):
    """nginx holds nothing back, and tells the API that a client is gone."""
    client = Client(service)
    service.kill("worker", signal.SIGSTOP)
    try:
        stream = sdk.audio.transcriptions.with_raw_response.create(
            file=variant(tmp_path / "a.wav", 1), model="whisper-1", stream=True
        )
        job = stream.headers["x-job-id"]
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert client.status(job)["status"] == "queued"
        assert waiters(client) == 1
        stream.parse().close()
        wait_until(lambda: waiters(client) == 0, 30, "the API knows that its reader is gone")
    finally:
        service.kill("worker", signal.SIGCONT)
        client.http.close()
