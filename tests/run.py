"""Runs the whole suite as `make test` does: two halves side by side, because most of its time is
spent waiting for services to start, to stop and to recover."""

from __future__ import annotations

import subprocess
import sys
import tempfile

SLOWEST = "tests/e2e"  # takes as long as all others


def main() -> int:
    """0 if both halves passed. The second one's output is printed when it is done."""
    command = [sys.executable, "-m", "pytest"]
    with tempfile.TemporaryFile("w+") as output:
        services = subprocess.Popen(
            [*command, "-p", "no:cacheprovider", SLOWEST],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            rest = [*command, "tests", f"--ignore={SLOWEST}"]
            others = subprocess.run(rest, check=False).returncode
            print("The other half is still running ..." if services.poll() is None else "")
            services.wait()
        finally:
            services.terminate()
            services.wait()
        output.seek(0)
        sys.stdout.write(output.read())
    return others or services.returncode


if __name__ == "__main__":
    sys.exit(main())
