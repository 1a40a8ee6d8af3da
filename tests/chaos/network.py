"""A machine of its own for a worker, as far as the network goes: it reaches Redis over a link that
can be cut. Linux and root.

Two network namespaces, with a pair of virtual interfaces between them, so that the kernel's own TCP
meets the silence: in one is the worker, in the other a listener that passes on to Redis, which
listens on 127.0.0.1 alone. The machine's own network is not touched, and nothing stays behind: a
namespace ends with the thread that made it and the processes that have entered it.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Self, TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
NEAR, FAR = "10.0.0.2", "10.0.0.1"  # of the worker, of Redis as it knows it
BLOCK_BYTES = 1 << 16
# At both ends, before anything else sees a packet: who sent it is not told. ARP passes.
FILTER = """
table inet filter {
    set forgotten { type inet_service; }
    chain arriving {
        type filter hook prerouting priority raw;
        iif lo accept
        tcp sport @forgotten drop
        tcp dport @forgotten drop
    }
}
"""


class Namespace:
    """A context manager: a network with nothing in it, and a thread that lives there."""

    def __enter__(self) -> Self:
        """Raises OSError where that can't be had."""
        self._thread = ThreadPoolExecutor(1, "namespace")
        try:
            self.thread_id = self.call(_leave_the_network)
        except OSError:
            self._thread.shutdown()
            raise
        path = f"/proc/{os.getpid()}/task/{self.thread_id}/ns/net"
        self.enter = ("nsenter", f"--net={path}", "--")  # before a command: has it run there
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def call(self, work: Callable[..., T], *args: object) -> T:
        """Has it done there; a socket that it makes stays there."""
        return self._thread.submit(work, *args).result()

    def run(self, command: str, text: str = "") -> None:
        """Raises OSError, also when it fails."""
        done = subprocess.run(
            [*self.enter, *command.split()], input=text, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise OSError(f"{command}: {done.stderr.strip()}")

    def filter(self, text: str) -> None:
        self.run("nft -f -", text)


class Network:
    """A context manager; `near` is where the worker belongs. Connections to FAR and `port` go on to
    127.0.0.1 and that port. Entering raises OSError where it can't be had."""

    def __init__(self, port: int):
        self._port = port
        self.near, self._far = Namespace(), Namespace()
        self._open: dict[socket.socket, int] = {}  # both ends of each, and the worker's port
        self._threads: list[threading.Thread] = []
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            ends = [stack.enter_context(end) for end in (self.near, self._far)]
            peer = f"peer name wire netns {self._far.thread_id}"
            self.near.run(f"ip link add wire type veth {peer}")
            for end, address in zip(ends, (NEAR, FAR), strict=True):
                end.run(f"ip address add {address}/24 dev wire")
                end.run("ip link set lo up")
                end.run("ip link set wire up")
                end.filter(FILTER)
            self._listener = self._far.call(socket.create_server, (FAR, self._port))
            stack.callback(self._close)
            self._begin(self._accept)
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def cut(self) -> None:
        """Nothing arrives, in either direction, until it is healed."""
        self._filter("add chain inet filter arriving { policy drop; }")

    def heal(self, *, forgets: bool = False) -> None:
        """What was under way arrives when TCP sends it again; or, when it `forgets`, no packet of
        a connection from before ever does, as after a router has lost its table."""
        if forgets and (ports := set(self._open.values())):
            listed = ", ".join(map(str, ports))
            self._filter(f"add element inet filter forgotten {{ {listed} }}")
        self._filter("add chain inet filter arriving { policy accept; }")

    def unplug(self) -> None:
        """The worker's kernel sees that its link is down."""
        self._far.run("ip link set wire down")

    def plug(self) -> None:
        self._far.run("ip link set wire up")

    def _filter(self, text: str) -> None:
        self.near.filter(text)
        self._far.filter(text)

    # --- from there to Redis

    def _close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)

    def _begin(self, work: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=work, args=args, name="link", daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                worker, (_, port) = self._listener.accept()
                self._begin(self._serve, worker, port)

    def _serve(self, worker: socket.socket, port: int) -> None:
        address = "127.0.0.1", self._port
        with worker, suppress(OSError), socket.create_connection(address) as redis:
            ends = dict.fromkeys((worker, redis), port)
            self._open.update(ends)
            back = self._begin(_pump, redis, worker)
            _pump(worker, redis)
            back.join()
            for end in ends:
                del self._open[end]


def _leave_the_network() -> int:
    """Takes this thread to a network of its own; returns how the kernel calls it."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return threading.get_native_id()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while block := source.recv(BLOCK_BYTES):
            sink.sendall(block)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
