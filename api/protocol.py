"""HTTP/1.1 as uvicorn speaks it, with what it lacks: an end to the headers of a request, and errors
in the shape of all others for what is no request at all. And it tells a request that waits when its
client is gone: a task that listens for that, as ASGI has it, would cost each of them 2 KB."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from uuid import uuid4

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from shared.schemas import Problem

CONNECTION = "whisper.connection"  # in a request's scope
HEAD_SECONDS = 10.0  # nginx's own figures (client_header_timeout, large_client_header_buffers)
HEAD_BYTES = 64 * 1024
SEND_SECONDS = 60.0  # send_timeout


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
    """One connection. Where uvicorn waits for ever, for the rest of a header or for a client that
    takes nothing of its answer, and keeps all that comes, this closes it."""

    # Beyond 30 attributes Python gives each object a dictionary of its own, of 1.5 KB.
    __slots__ = ("_connection", "_head_bytes", "_head_end", "_send_end")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._head_bytes = 0
        self._head_end: asyncio.TimerHandle | None = None  # while headers are awaited
        self._send_end: asyncio.TimerHandle | None = None  # while the client takes too little
        super().connection_made(transport)
        self._connection = Connection(transport, self.flow)
        self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_end = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._end_stall()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        self._end_stall()  # or the timer would hold all this for a minute more
        super().connection_lost(exc)
        self._connection.is_lost = True
        if self._connection.on_lost is not None:
            self._connection.on_lost()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[CONNECTION] = self._connection  # type: ignore[literal-required]
        if self._head_end is None:
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Those behind the last chunk of a body (trailers) are dropped: nobody reads them."""
        if self._head_end is not None:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_is_here()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.cycle.response_complete:  # else it is for nobody
            self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """uvicorn reads no further while much of a body waits to be taken. Where that is its end,
        nobody asks for more, and it would not see that the client has left."""
        self._head_bytes = 0
        super().on_message_complete()
        self.cycle.more_body = False
        if not self.pipeline:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Where the answer came before the end of the body, that comes soon or the connection ends:
        uvicorn would drop what comes for ever."""
        super().on_response_complete()
        if self.cycle.more_body and self.cycle.response_complete:  # it is not of the next request
            self.loop.call_later(HEAD_SECONDS, self._end_body, self.cycle)

    def data_received(self, data: bytes) -> None:
        """What nobody takes is counted: headers, and all between a body's chunks or behind it."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes <= HEAD_BYTES or self.transport.is_closing():
            return
        if self._head_end is None:
            self.transport.close()  # it may be answered already
        else:
            self.send_400_response(f"The request's header is larger than {HEAD_BYTES} bytes.")

    def send_400_response(self, msg: str) -> None:
        """Answers what never becomes a request, and closes."""
        request_id = str(uuid4())
        body = Problem(
            type="/docs/errors#http_error",
            title="Bad Request",
            status=400,
            detail=msg,
            code="http_error",
            request_id=request_id,
        ).model_dump_json(exclude_defaults=True)
        lines = [
            "HTTP/1.1 400 Bad Request",
            "content-type: application/problem+json",
            f"x-request-id: {request_id}",
            "x-content-type-options: nosniff",
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
            self._head_bytes = 0

    def _end_stall(self) -> None:
        if self._send_end is not None:
            self._send_end.cancel()
            self._send_end = None

    def _end_body(self, cycle: RequestResponseCycle) -> None:
        if cycle.more_body:
            self.transport.close()

    def _give_up(self) -> None:
        """Nobody waits for an answer to half a request."""
        self._head_end = None
        self.transport.close()
