"""`python -m api.webhook_secret`: prints the secret that receivers of webhooks verify with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from api.__main__ import EXIT_CONFIG
from api.keys import name
from api.signing import new_secret, signer
from shared.errors import InvalidSettings
from shared.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status. The secret alone goes to stdout."""
    parser = argparse.ArgumentParser(
        prog="python -m api.webhook_secret",
        description="The secret with which receivers verify webhooks.",
    )
    parser.add_argument(
        "name", nargs="?", type=name, help="with AUTH=keys: the name of the API key"
    )
    parser.add_argument("--new", action="store_true", help="a random one, to put in WEBHOOK_SECRET")
    arguments = parser.parse_args(argv)
    if arguments.new:
        print(new_secret())
        return 0
    try:
        print(signer(load_settings()).secret_of(arguments.name or ""))
    except InvalidSettings as exc:
        print(exc.message, file=sys.stderr)
        return EXIT_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
