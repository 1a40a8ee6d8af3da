"""TCP ports of this machine: which is free, and whether a given one is."""

from __future__ import annotations

import random
import socket


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now. Somebody may take it before you do; try again then. It is
    none of those that systems give to outgoing connections (from 32768 on Linux, from 49152
    elsewhere): of these one is soon taken where much is going on. Raises OSError."""
    for _ in range(100):
        port = random.SystemRandom().randrange(20_000, 32_768)
        if why_not(host, port) is None:
            return port
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def why_not(host: str, port: int) -> str | None:
    """None when a server could listen there; otherwise what the system says."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as exc:
        return (exc.strerror or str(exc)).partition(" (while")[0]
    return None


def reachable(host: str) -> str:
    """The host part of a URL for a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
