"""A network between a process and Redis that can be cut: bytes stop, and nobody is told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

BLOCK_BYTES = 1 << 16


class Relay:
    """A context manager; connections to `port` go on to 127.0.0.1:`target`."""

    def __init__(self, target: int):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self._whole = threading.Event()
        self._whole.set()
        self._generation = 0  # connections of an older one are dead, and nobody is told
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._begin(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.heal()
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)

    def _begin(self, work: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=work, args=args, name="relay", daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def cut(self) -> None:
        """Nothing passes, in either direction, until it is healed."""
        self._whole.clear()

    def heal(self, *, forgets: bool = False) -> None:
        """What was under way arrives; or, when it `forgets`, no connection from before ever says a
        word again, as after a router has lost its table."""
        self._generation += forgets
        self._whole.set()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self._begin(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        self._whole.wait()
        generation = self._generation
        try:
            server = socket.create_connection(("127.0.0.1", self._target), 5)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        self._open |= {client, server}
        back = self._begin(self._pump, server, client, generation)
        self._pump(client, server, generation)
        back.join()
        for end in (client, server):
            self._open.discard(end)
            end.close()

    def _pump(self, source: socket.socket, sink: socket.socket, generation: int) -> None:
        with suppress(OSError):
            while block := source.recv(BLOCK_BYTES):
                self._whole.wait()
                if generation == self._generation:
                    sink.sendall(block)
            self._whole.wait()
            if generation == self._generation:
                sink.shutdown(socket.SHUT_WR)
