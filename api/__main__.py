"""`python -m api`: one API replica, with WORKERS processes."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory

import uvicorn

from api.protocol import Protocol
from api.serve import GRACEFUL_SECONDS, serve
from api.signing import signer
from shared.errors import InvalidSettings
from shared.settings import load_settings

EXIT_CONFIG = 78  # sysexits.h: it would fail the same way again


def main() -> int:
    try:
        settings = load_settings()
        signer(settings)  # it may have to be made
    except InvalidSettings as exc:
        print(exc.message, file=sys.stderr)
        return EXIT_CONFIG
    raise_file_limit()
    with counters(settings.workers):
        return serve(
            uvicorn.Config(
                "api.app:create_app",
                factory=True,
                host=settings.host,
                port=settings.port,
                workers=settings.workers,
                log_config=None,
                server_header=False,
                http=Protocol,
                ws="none",
                timeout_graceful_shutdown=GRACEFUL_SECONDS,
            )
        )


def raise_file_limit() -> None:
    """Each waiting client is an open file; many systems allow 1,024 unless asked for more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS has a limit of its own below "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def counters(processes: int) -> Iterator[None]:
    """Several processes count in files of a folder of their own, not in DATA_DIR, which replicas
    share. Set before any of them imports prometheus_client."""
    if processes == 1:
        yield
        return
    with TemporaryDirectory(prefix="whisper-metrics-", ignore_cleanup_errors=True) as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        yield


if __name__ == "__main__":
    sys.exit(main())
