"""OpenAI's own SDK at a service of ours, and what its tests need besides."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import openai
from openai import OpenAI

from local.service import Service
from tests.e2e.conftest import Client, metric

WHISPER = "whisper-1"


def sdk_of(service: Service, **options: Any) -> OpenAI:
    given = {"api_key": "any", "max_retries": 0, "timeout": 60, **options}
    http = openai.DefaultHttpxClient(trust_env=False)
    return OpenAI(base_url=f"{service.base_url}/v1", http_client=http, **given)


@contextmanager
def frozen(service: Service) -> Iterator[None]:
    """While the worker sleeps nothing is claimed."""
    service.kill("worker", signal.SIGSTOP)
    try:
        yield
    finally:
        service.kill("worker", signal.SIGCONT)


def details(error: openai.APIError) -> dict[str, Any]:
    """What the SDK found in an error's envelope."""
    assert isinstance(error.body, dict), error
    assert set(error.body) == {"message", "type", "param", "code"}
    assert error.body["message"]
    return error.body


def early_answer(
    service: Service,
    begun: bytes,
    within_seconds: float = 30,
    announced: int = 50_000_000,
    **headers: str,
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """What comes back for an upload of which this is all that is sent."""
    connection = HTTPConnection(
        service.settings.host, service.settings.port, timeout=within_seconds
    )
    try:
        connection.putrequest("POST", "/v1/audio/transcriptions")
        connection.putheader("Content-Type", "multipart/form-data; boundary=x")
        connection.putheader("Content-Length", str(announced))
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(begun)
        answer = connection.getresponse()
        head = {name.lower(): value for name, value in answer.headers.items()}
        return answer.status, head, json.loads(answer.read())["error"]
    finally:
        connection.close()


def jobs_of(client: Client, event: str = "submitted") -> int:
    return int(client.stats()["jobs"][event])


def waiters(client: Client) -> float:
    return metric(client.http.get("/metrics").text, "whisper_waiters", kind="openai")
