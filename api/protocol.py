"""HTTP/1.1 as uvicorn speaks it, with what it lacks: an end to the headers of a request, and errors
in the shape of all others for what is no request at all. And it tells a request that waits when its
client is gone: a task that listens for that, as ASGI has it, would cost each of them 2 KB."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from uuid import uuid4

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shared.schemas import Problem

CONNECTION = "whisper.connection"  # in a request's scope
HEAD_SECONDS = 10.0  # nginx's own figures (client_header_timeout, large_client_header_buffers)
HEAD_BYTES = 64 * 1024


class Connection:
    """What a request may know of its connection. It holds no Protocol, which holds the request."""

    __slots__ = ("_flow", "_transport", "is_lost", "on_lost")

    def __init__(self, transport: asyncio.Transport, flow: FlowControl):
        self._transport = transport
        self._flow = flow
        self.is_lost = False
        self.on_lost: Callable[[], None] | None = None

    @property
    def is_full(self) -> bool:
        """The client takes less than it is sent."""
        return bool(self._flow.write_paused)

    def abort(self) -> None:
        self._transport.abort()


class Protocol(HttpToolsProtocol):
    """One connection. Where uvicorn waits for the rest of a header for ever and keeps all that
    comes, this closes it."""

    # Beyond 30 attributes Python gives each object a dictionary of its own, of 1.5 KB.
    __slots__ = ("_connection", "_head_bytes", "_head_end")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._head_bytes = 0
        self._head_end: asyncio.TimerHandle | None = None  # while headers are awaited
        super().connection_made(transport)
        self._connection = Connection(transport, self.flow)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        super().connection_lost(exc)
        self._connection.is_lost = True
        if self._connection.on_lost is not None:
            self._connection.on_lost()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[CONNECTION] = self._connection  # type: ignore[literal-required]
        if self._head_end is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._head_is_here()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """uvicorn reads no further while much of a body waits to be taken. Where that is its end,
        nobody asks for more, and it would not see that the client has left."""
        super().on_message_complete()
        if not self.pipeline:
            self.flow.resume_reading()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_end is None or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > HEAD_BYTES:
            self.send_400_response(f"The request's header is larger than {HEAD_BYTES} bytes.")

    def send_400_response(self, msg: str) -> None:
        """Answers what never becomes a request, and closes."""
        body = Problem(
            type="/docs/errors#http_error",
            title="Bad Request",
            status=400,
            detail=msg,
            code="http_error",
            request_id=str(uuid4()),
        ).model_dump_json(exclude_defaults=True)
        lines = [
            "HTTP/1.1 400 Bad Request",
            "content-type: application/problem+json",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "", body]).encode())
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Who asks for another protocol gets an answer in this one; the log needs no line of it."""

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_end = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _head_is_here(self) -> None:
        if self._head_end is not None:
            self._head_end.cancel()
            self._head_end = None

    def _give_up(self) -> None:
        """Nobody waits for an answer to half a request."""
        self._head_end = None
        self.transport.close()
