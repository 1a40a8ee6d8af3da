"""What the API's HTTP does with clients that take nothing; tests/e2e/test_http.py has those that
send what they like."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from api import protocol
from tests.conftest import wait_until

MIB = 1024 * 1024
LONG = 64 * MIB  # more than all buffers on the way hold


async def long_answer(_: Any, __: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(LONG // MIB):
        await send({"type": "http.response.body", "body": bytes(MIB), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
async def opened(monkeypatch: pytest.MonkeyPatch):
    """A connection on which the long answer was asked for, and the server's side of it. A client
    may take nothing for a second."""
    monkeypatch.setattr(protocol, "SEND_SECONDS", 1)
    config, state = Config(long_answer, lifespan="off", log_config=None), ServerState()
    config.load()

    def connection() -> asyncio.Protocol:
        return protocol.Protocol(config=config, server_state=state, app_state={})

    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    yield reader, state
    writer.close()
    server.close()


async def test_who_takes_nothing_of_an_answer_is_let_go(opened):
    reader, state = opened
    await reader.readline()
    await asyncio.to_thread(wait_until, lambda: not state.connections, 30, "it is closed")
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(LONG)


async def test_who_takes_it_slowly_gets_all_of_it(opened):
    """In twice as long as that, and more."""
    reader, _ = opened
    began, taken = time.monotonic(), 0
    while chunk := await reader.read(MIB):
        taken += len(chunk)
        await asyncio.sleep(2.5 * len(chunk) / LONG)
    assert taken > LONG
    assert time.monotonic() - began > 2
