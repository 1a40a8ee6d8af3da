"""Becomes another program that dies with the one that started it. Linux only.

    python -IS local/tether.py <signal number> <pid of the launcher> <program> <argument>...

A program of its own, and not code between fork and exec, because that is unsafe as soon as the
launcher has a second thread.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(sign: int, parent: int) -> None:
    """Asks the kernel to send this process `sign` when its parent dies, now or later."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, sign, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), sign)


def main(argv: list[str]) -> None:
    die_with_parent(int(argv[0]), int(argv[1]))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec would keep that
    try:
        os.execvp(argv[2], argv[2:])  # noqa: S606 - an argument list needs no shell
    except OSError as exc:
        sys.exit(f"{argv[2]} can't be started: {exc.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
