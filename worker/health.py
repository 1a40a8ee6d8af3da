"""The worker's own endpoint: /healthz and /metrics, answered by a thread while the model runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from shared.errors import InvalidSettings


def serve(
    host: str, port: int, health: Callable[[], tuple[bool, dict[str, Any]]]
) -> ThreadingHTTPServer:
    """Starts the endpoint. `health` returns (is it well, what to say). Port 0 takes a free one.

    Raises InvalidSettings when the address can't be had.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest())
            elif self.path in {"/healthz", "/health"}:
                is_well, words = health()
                body = json.dumps(words).encode()
                self._answer(200 if is_well else 503, "application/json", body)
            else:
                self._answer(404, "text/plain", b"/healthz or /metrics\n")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A probe each second is no news."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as exc:
        raise InvalidSettings(
            f"The worker can't listen on {host}:{port} ({exc.strerror}); set WORKER_HTTP_HOST and "
            "WORKER_HTTP_PORT to a free address, or the port to 0."
        ) from exc
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server
