"""`python -m local keys ...`: the command of the API keys, on the Redis of the `make run` that runs
in this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from local.processes import CannotRun
from local.redis_server import running_url
from local.supervisor import EXIT_CONFIG
from shared.errors import InvalidSettings
from shared.settings import load_settings


def keys(words: Sequence[str]) -> int:
    """`words`: for `python -m api.keys`, whose exit status this returns."""
    try:
        settings = load_settings()
        url = settings.redis_url.get_secret_value()
        if "redis_url" not in settings.model_fields_set and not {"-h", "--help"} & set(words):
            url = running_url(settings.data_dir)
    except InvalidSettings as exc:
        print(exc.message, file=sys.stderr)
        return EXIT_CONFIG
    except CannotRun as exc:
        print(exc.message, file=sys.stderr)
        return exc.exit_status
    command = [sys.executable, "-m", "api.keys", *words]
    return subprocess.run(command, env={**os.environ, "REDIS_URL": url}, check=False).returncode
