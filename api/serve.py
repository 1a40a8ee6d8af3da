"""How the processes of an API replica serve, and how they end without failing a request.

uvicorn closes its listening socket and its idle connections as soon as it is told to stop. Whoever
was connected but not yet accepted, or accepted but not yet heard, loses a request that the replica
could have served, and that nginx may not send anywhere else (an upload is never sent twice). So a
stop has steps here:

1. The kernel ignores new connections. Who began to connect before is accepted and served; who
   comes later tries again a second after, and finds the port closed: then nginx asks the next
   replica.
2. The listening socket closes.
3. Whoever waits for a job is answered (api/hub.py), to wait on at another replica.
4. Connections that have not asked anything yet get a moment to do so; answers say
   `Connection: close`.
5. uvicorn's own shutdown: open requests get GRACEFUL_SECONDS.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import struct
import sys
import time
from collections.abc import Iterable
from contextlib import suppress

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import multiprocess

GRACEFUL_SECONDS = 30
DRAIN = "whisper.drain"  # in the lifespan's state: what to call when this process is to stop
SETTLE_SECONDS = 0.2  # a connection that was begun is open: some round trips to nginx
FIRST_REQUEST_SECONDS = 2.0

# A classic BPF program on the bytes of a TCP segment (Linux: filter.txt): drops what asks for a new
# connection, and nothing else. (code, if true, if false, value)
_WITHOUT_SYN = (
    (0x30, 0, 0, 13),  # load the byte of the flags
    (0x45, 0, 1, 0x02),  # SYN?
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # keep
)
_SO_ATTACH_FILTER = 26


def ignore_new(listening: Iterable[socket.socket]) -> None:
    """Nobody gets a new connection from here on, without an answer to that either. Linux only;
    elsewhere the few who connect in the moment of the end are lost."""
    program = ctypes.create_string_buffer(
        b"".join(struct.pack("HBBI", *step) for step in _WITHOUT_SYN)
    )
    pointer = struct.pack("HL", len(_WITHOUT_SYN), ctypes.addressof(program))
    if sys.platform != "linux":
        return
    for each in listening:
        with suppress(OSError), socket.fromfd(each.fileno(), each.family, each.type) as same:
            same.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, pointer)


class Server(uvicorn.Server):
    """One process."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Sockets that were given belong to the parent, and other processes may go on to use them.
        if sockets is None:
            ignore_new(each for server in self.servers for each in server.sockets)
        farewell = (b"connection", b"close")
        self.server_state.default_headers = [*self.server_state.default_headers, farewell]
        await asyncio.sleep(SETTLE_SECONDS)
        for server in self.servers:
            server.close()
        if drain := self.lifespan.state.get(DRAIN):
            drain()
        deadline = time.monotonic() + FIRST_REQUEST_SECONDS
        while self._has_silent() and time.monotonic() < deadline:  # noqa: ASYNC110 (no event has it)
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    def _has_silent(self) -> bool:
        """Is there a connection that has not asked anything yet?"""
        return any(getattr(each, "cycle", None) is None for each in self.server_state.connections)


class Process(multiprocess.Process):
    """A process of several."""

    @property
    def server(self) -> Server:
        if not isinstance(self._server, Server):
            self._server = Server(self.config)
        return self._server


class Processes(multiprocess.Multiprocess):
    """Several processes that share a listening socket."""

    def terminate_all(self) -> None:
        ignore_new(self.sockets)
        time.sleep(SETTLE_SECONDS)
        for each in self.sockets:
            each.close()  # it closes with the last process's own
        super().terminate_all()


multiprocess.Process = Process  # type: ignore[misc]  # its supervisor takes no other by itself


def serve(config: uvicorn.Config) -> int:
    """Serves until told to stop. Returns the exit status."""
    if config.workers > 1:
        Processes(config, sockets=[config.bind_socket()]).run()
        return 0
    config.load_app()
    server = Server(config)
    with suppress(KeyboardInterrupt):
        server.run()
    return 0 if server.started else STARTUP_FAILURE
