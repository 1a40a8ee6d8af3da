"""What happens to every request: an id, a metric, a log line, safe headers."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Awaitable
from contextlib import suppress
from http import HTTPStatus
from uuid import uuid4

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import unexpected
from shared.logs import context
from shared.metrics import ApiMetrics

log = logging.getLogger(__name__)

LINGER_SECONDS = 30  # nginx's own figures
LINGER_IDLE_SECONDS = 5
STRANGER_BYTES = 64 * 1024
STRANGER_SECONDS = 2
WAITS = "waits"  # in the state of a request that waits: how long is its client's choice
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
API_POLICY = "default-src 'none'; frame-ancestors 'none'"
DOCS_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; font-src 'self' data:; frame-ancestors 'none'"
)


class Observe:
    """Gives each request an id and counts it by its route's template, never by its path."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        context.set({"request_id": request_id})
        observed = _Observed(scope, send, request_id)
        self.metrics.http_in_progress.inc()
        try:
            await self.app(scope, receive, observed.send)
        except Exception as exc:  # answered here, so that this answer has the headers, too
            if observed.has_begun:
                raise
            answer = await unexpected(Request(scope), exc)
            await answer(scope, receive, observed.send)
        finally:
            self.metrics.http_in_progress.dec()
            observed.count(self.metrics)


class _Observed:
    """A request and its answer."""

    __slots__ = ("_request_id", "_scope", "_send", "_started", "has_begun", "status")

    def __init__(self, scope: Scope, send: Send, request_id: str):
        self._scope = scope
        self._send = send
        self._request_id = request_id
        self._started = time.perf_counter()
        self.status = 500
        self.has_begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._request_id
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
            is_docs = self._scope["path"] == "/docs"
            headers["Content-Security-Policy"] = DOCS_POLICY if is_docs else API_POLICY
        await self._send(message)

    def count(self, metrics: ApiMetrics) -> None:
        seconds = time.perf_counter() - self._started
        method = _method(self._scope)
        route = getattr(self._scope.get("route"), "path", "unmatched")
        metrics.http_requests.labels(method, route, str(self.status)).inc()
        if not self._scope["state"].get(WAITS):
            metrics.http_duration.labels(method, route).observe(seconds)
        log.debug(
            "request",
            extra={
                "action": "request",
                "method": self._scope["method"],
                "route": route,
                "status": self.status,
                "seconds": round(seconds, 4),
            },
        )


class Linger:
    """Reads on for a while when the answer comes before the end of an upload, and drops what it
    reads: most clients look for an answer only when they have sent all, and a connection that is
    closed at once takes the answer with it. nginx does the same (lingering_close). Not after an
    upload that was too slow: who drips would be kept, and that is what the answer ends. A
    stranger's large upload is not read either, for it could have no end: there is a moment to
    notice the answer, no more."""

    def __init__(self, app: ASGIApp):
        self.app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] != "http" or scope["method"] in {"GET", "HEAD", "DELETE", "OPTIONS"}:
            return self.app(scope, receive, send)
        return self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_read = is_strange = False

        async def watch() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = not message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            nonlocal is_read, is_strange
            if message["type"] == "http.response.start" and not is_read:
                MutableHeaders(scope=message)["Connection"] = "close"
                is_read = message["status"] == HTTPStatus.REQUEST_TIMEOUT
                is_strange = message["status"] == HTTPStatus.UNAUTHORIZED
            if is_read or message["type"] != "http.response.body" or message.get("more_body"):
                await send(message)
                return
            await send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    if is_strange and _announced_bytes(scope) > STRANGER_BYTES:
                        await asyncio.sleep(STRANGER_SECONDS)
                        is_read = True
                    while not is_read:
                        async with asyncio.timeout(LINGER_IDLE_SECONDS):
                            await watch()
            await send({"type": "http.response.body", "body": b""})

        await self.app(scope, watch, answer)


def _announced_bytes(scope: Scope) -> float:
    """Of the body; infinite where its length is not announced."""
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(lengths[0]) if lengths and lengths[0].isdigit() else math.inf


def _request_id(scope: Scope) -> str:
    """The proxy's id when it is a sane one, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode())
    return str(uuid4())


def _method(scope: Scope) -> str:
    """Clients can send any word as a method; labels are a closed set."""
    method = str(scope["method"])
    return method if method in {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"} else "OTHER"
