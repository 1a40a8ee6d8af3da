"""A real nginx on the files of deploy/nginx, and what it stands in front of."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import socketserver
import subprocess
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
import yaml

from local.ports import free_port
from tests.conftest import ROOT, wait_until

COMPOSE = ROOT / "docker-compose.yml"
FILES = ROOT / "deploy" / "nginx"
OLDEST = (1, 27, 4)  # the first with keepalive_min_timeout; `resolve` upstream is one older


def program() -> str:
    """The nginx to test with; skips where there is none, or only one that is too old."""
    found = shutil.which("nginx")
    if found is None:
        pytest.skip("no nginx on this machine; tests/deploy/install_nginx.sh installs one")
    text = subprocess.run([found, "-v"], capture_output=True, text=True, check=True).stderr
    version = tuple(int(part) for part in text.rpartition("nginx/")[2].split()[0].split("."))
    if version < OLDEST:
        pytest.skip(f"nginx is {text.strip()}; the configuration needs 1.27.4")
    return found


def shipped() -> dict[str, str]:
    """The variables of the nginx service in docker-compose.yml, where no .env changes them."""
    given = yaml.safe_load(COMPOSE.read_text())["services"]["nginx"]["environment"]
    return {
        name: re.sub(r"\$\{\w+(?::?-([^}]*))?\}", lambda match: match[1] or "", str(value))
        for name, value in given.items()
    }


def templates() -> list[Path]:
    return sorted((FILES / "templates").glob("*.template"))


def variables_of_templates() -> set[str]:
    return {name for path in templates() for name in re.findall(r"\$\{(\w+)\}", path.read_text())}


def render(folder: Path, environment: Mapping[str, str]) -> Path:
    """Does what the image does at its start, below `folder` instead of /; returns nginx.conf."""

    def moved(text: str) -> str:
        return text.replace("/etc/nginx/", f"{folder}/").replace("/tmp/nginx", f"{folder}/nginx")  # noqa: S108

    def value(match: re.Match[str]) -> str:  # envsubst leaves what is not set as it is
        return environment.get(match[1], match[0])

    (folder / "conf.d").mkdir(parents=True, exist_ok=True)
    for path in templates():
        text = re.sub(r"\$\{(\w+)\}", value, path.read_text())
        (folder / "conf.d" / path.stem).write_text(moved(text))
    main = folder / "nginx.conf"
    main.write_text(moved((FILES / "nginx.conf").read_text()))
    return main


class Nginx:
    """A context manager. `changes`: variables that differ from those of docker-compose.yml."""

    def __init__(self, folder: Path, **changes: str):
        self.port, self.tls_port = free_port(), free_port()
        self.folder = folder
        self.environment = {
            **shipped(),
            "NGINX_LISTEN": f"127.0.0.1:{self.port}",
            "NGINX_LISTEN_TLS": f"127.0.0.1:{self.tls_port}",
            "NGINX_TLS_PORT": str(self.tls_port),
            "NGINX_OPEN_FILES": str(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
            **changes,
        }
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        main = render(self.folder, self.environment)
        # Started by root it would give up its rights and then miss those to the test's folder.
        user = "user root; " if os.geteuid() == 0 else ""
        command = [program(), "-c", str(main), "-g", f"{user}daemon off;"]
        with (
            (self.folder / "access.log").open("wb") as out,
            (self.folder / "error.log").open("wb") as err,
        ):
            self.process = subprocess.Popen(command, stdout=out, stderr=err)
        wait_until(self._listens, 30, "nginx listens")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(10)

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.errors()
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def errors(self) -> str:
        return (self.folder / "error.log").read_text()

    def access_log(self) -> list[dict[str, Any]]:
        lines = (self.folder / "access.log").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def logged(self, **wanted: str) -> dict[str, Any]:
        """The line of the access log that has these values; waits for it."""

        def ask() -> dict[str, Any] | None:
            lines = self.access_log()
            return next((line for line in lines if wanted.items() <= line.items()), None)

        return wait_until(ask, 30, f"a log line with {wanted}")


class Echo(BaseHTTPRequestHandler):
    """Answers with what it was asked, as JSON. Tests subclass it to misbehave."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    server: Replica

    def do_GET(self) -> None:
        self.on_read()

    def do_POST(self) -> None:
        self.on_submit()

    do_HEAD = do_DELETE = do_GET  # noqa: N815

    def on_read(self) -> None:
        self.answer()

    def on_submit(self) -> None:
        length = int(self.headers.get("content-length", 0))
        self.answer(received=len(self.rfile.read(length)))

    def answer(self, status: int = 200, headers: Mapping[str, str] | None = None, **more: Any):
        asked = {
            "method": self.command,
            "path": self.path,
            "headers": [(name.lower(), value) for name, value in self.headers.items()],
            "connection": self.client_address[1],
            "replica": self.server.address,
        }
        body = json.dumps({**asked, **more}).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def parse_request(self) -> bool:
        is_sound = super().parse_request()
        if is_sound:
            self.server.requests.append(f"{self.command} {self.path}")
        return is_sound

    def log_message(self, format: str, *args: object) -> None:
        pass


class Replica(ThreadingHTTPServer):
    """A context manager: one API replica with a handler of the test's. Port 0: any free one."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(
        self, handler: type[Echo] = Echo, address: str = "127.0.0.1", port: int = 0
    ) -> None:
        super().__init__((address, port), handler)
        self.address, self.port = self.server_address[:2]
        self.requests: list[str] = []  # "METHOD /path", in order of arrival

    @property
    def api(self) -> str:
        """What NGINX_API is to be."""
        return f"{self.address}:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A peer that leaves early is what several tests are about."""


class Resolver(socketserver.ThreadingUDPServer):
    """A context manager: a name server that answers every A question with `self.addresses`."""

    daemon_threads = True

    def __init__(self, *addresses: str) -> None:
        super().__init__(("127.0.0.1", 0), _Question)
        self.addresses = list(addresses)

    @property
    def resolver(self) -> str:
        """What NGINX_RESOLVER is to be."""
        return f"127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Question(socketserver.BaseRequestHandler):
    """RFC 1035, as little of it as nginx asks for."""

    def handle(self) -> None:
        asked, reply_to = self.request
        question = asked[12 : asked.index(b"\0", 12) + 5]
        addresses = list(self.server.addresses)
        flags = 0x8180 if addresses else 0x8183  # an answer, or "no such name"
        counts = (1, len(addresses), 0, 0)
        head = asked[:2] + b"".join(n.to_bytes(2, "big") for n in (flags, *counts))
        pointer, kind, ttl = b"\xc0\x0c", b"\0\1\0\1", (600).to_bytes(4, "big")  # as Docker's
        answers = (pointer + kind + ttl + b"\0\4" + socket.inet_aton(a) for a in addresses)
        reply_to.sendto(head + question + b"".join(answers), self.client_address)
