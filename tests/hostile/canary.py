"""What no upload may touch: files that a hostile one names, and an address that it names. They tell
who came."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.model.media import encode, tone

IN_ACCESS, IN_OPEN = 0x1, 0x20
LIBC = ctypes.CDLL(None, use_errno=True)


class Canary:
    """A context manager: recordings in `folder` under the names that the corpus uses, and a port of
    this machine that listens on TCP and UDP."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = folder / "canary.wav"

    def __enter__(self) -> Self:
        encode(self.file, tone(2))
        for name in ("canary.ts", "canary.key", "canary.sub", "canary001.wav", "canary", "null"):
            (self.folder / name).write_bytes(self.file.read_bytes())
        self._watch = LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._watch >= 0, os.strerror(ctypes.get_errno())
        self._names = {}
        for path in self.folder.iterdir():
            number = LIBC.inotify_add_watch(self._watch, bytes(path), IN_ACCESS | IN_OPEN)
            self._names[number] = path.name
        self._tcp = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._tcp.getsockname()[1]
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind(("127.0.0.1", self.port))
        for listener in (self._tcp, self._udp):
            listener.setblocking(False)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._watch)
        self._tcp.close()
        self._udp.close()

    def touched(self) -> list[str]:
        """Who came since the last time that this was asked."""
        found = []
        with suppress(BlockingIOError):
            while events := os.read(self._watch, 4096):
                place = 0
                while place < len(events):
                    number, _, _, size = struct.unpack_from("iIII", events, place)
                    found.append(f"read {self._names[number]}")
                    place += 16 + size
        with suppress(BlockingIOError):
            while True:
                caller, _ = self._tcp.accept()
                caller.close()
                found.append("connected")
        with suppress(BlockingIOError):
            while self._udp.recv(4096):
                found.append("sent a datagram")
        return found
