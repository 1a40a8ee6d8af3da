"""`python -m local run` and `python -m local demo`, which `make run` and `make demo` call."""

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
    if parser.parse_args(argv).command == "run":
        from local import run

        return run.run()

    from local import demo  # needs the client's HTTP library, which `run` does not

    return demo.demo()


if __name__ == "__main__":
    sys.exit(main())
