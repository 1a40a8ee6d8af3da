"""`python -m local run` and `python -m local demo`, which `make run` and `make demo` call; and
`python -m local keys`, for API keys."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m local", description=sys.modules["local"].__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="start the service; Ctrl-C stops it")
    commands.add_parser("demo", help="start everything aside, transcribe a sample, stop")
    commands.add_parser("keys", help="make, list and revoke API keys", add_help=False)
    arguments, words = parser.parse_known_args(argv)
    if arguments.command == "keys":
        from local import keys

        return keys.keys(words)
    if words:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    if arguments.command == "run":
        from local import run

        return run.run()

    from local import demo  # needs the client's HTTP library, which `run` does not

    return demo.demo()


if __name__ == "__main__":
    sys.exit(main())
