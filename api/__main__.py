"""`python -m api`: one API replica, with WORKERS processes."""

from __future__ import annotations

import os
import shutil
import sys

import uvicorn

from shared.errors import InvalidSettings
from shared.settings import load_settings

EXIT_CONFIG = 78  # sysexits.h: it would fail the same way again
GRACEFUL_SECONDS = 30


def main() -> int:
    try:
        settings = load_settings()
    except InvalidSettings as exc:
        print(exc.message, file=sys.stderr)
        return EXIT_CONFIG
    if settings.workers > 1:
        # Each process counts in files here; set before prometheus_client is imported by any.
        folder = settings.data_dir.absolute() / f"metrics-{settings.port}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    uvicorn.run(
        "api.app:create_app",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=GRACEFUL_SECONDS,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
