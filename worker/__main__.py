"""`python -m worker`: one worker process. Exits with 78 for wrong settings, model or FFmpeg."""

from __future__ import annotations

import sys

from shared import logs
from shared.errors import DecoderUnavailable, InvalidSettings, ModelUnavailable
from shared.settings import load_settings

EXIT_CONFIG = 78  # sysexits.h: it would fail the same way again


def main() -> int:
    try:
        settings = load_settings()
        logs.configure(settings.log_level)

        from worker import app  # after the settings: it takes the model library with it

        return app.run(settings)
    except (InvalidSettings, ModelUnavailable, DecoderUnavailable) as exc:
        print(exc.message, file=sys.stderr)
        return EXIT_CONFIG


if __name__ == "__main__":
    sys.exit(main())
