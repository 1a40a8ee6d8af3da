"""Runs the whole suite as `make test` does: in lanes side by side, because most of its time is
spent waiting for services to start, to stop and to recover."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import ExitStack

LANES = (  # which take as long as each other, and as the rest
    (
        "tests/browser",
        "tests/deploy/test_drain.py",
        "tests/deploy/test_http_nginx.py",
        "tests/deploy/test_openai_nginx.py",
        "tests/deploy/test_prometheus.py",
        "tests/e2e/test_failures.py",
        "tests/e2e/test_local_mode.py",
        "tests/e2e/test_parts.py",
        "tests/e2e/test_resending.py",
        "tests/hostile/test_fuzz.py",
    ),
    ("tests/deploy/test_nginx.py", "tests/e2e"),
)


def main() -> int:
    """0 if all lanes passed. What the lanes print is shown when the rest of the suite is done."""
    with ExitStack() as stack:
        taken: list[str] = []
        lanes = []
        for paths in LANES:
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = running(*paths, but=taken)
            lane = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(end, lane)
            lanes.append((lane, output))
            taken += paths
        failed = subprocess.run(running("tests", but=taken), check=False).returncode
        for lane, output in lanes:
            if lane.poll() is None:
                print("Others are still running ...", flush=True)
            failed = lane.wait() or failed
            output.seek(0)
            sys.stdout.write(output.read())
    return failed


def running(*paths: str, but: list[str]) -> list[str]:
    ignored = [f"--ignore={path}" for path in but]
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *paths, *ignored]


def end(lane: subprocess.Popen[bytes]) -> None:
    lane.terminate()
    lane.wait()


if __name__ == "__main__":
    sys.exit(main())
