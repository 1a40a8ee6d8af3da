"""`make demo`: the whole service in a folder that is thrown away, one transcript, and out.

It never touches .data, .env or a service that already runs here.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from example_client import WhisperClient
from local.processes import CannotRun
from local.run import SAMPLE, say
from local.service import Service
from local.supervisor import StopRequested, StopSignals

DEADLINE_SECONDS = 180
NEXT = """Next:
  make run                    the same service, to stay: API, /docs, metrics
  MODEL_SIZE=base make run    real speech; fetches Whisper's base model once.
                              The demo model understands only espeak-ng's synthetic voices."""


def demo() -> int:
    """Returns 0 only when a transcript came. Nothing that it started or wrote is left."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    stop_signals = StopSignals()
    stop_signals.install()
    folder = Path(tempfile.mkdtemp(prefix="whisper-demo-"))
    try:
        return show(folder, deadline, stop_signals)
    except StopRequested:
        say("Stopped before a transcript came.")
    except CannotRun as exc:
        print(f"The demo failed: {exc.message}", file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1


def show(folder: Path, deadline: float, stop_signals: StopSignals) -> int:
    began = time.monotonic()
    say("Starting Redis, the API and a worker with the bundled demo model ...")
    with Service.in_folder(folder, stop_signals=stop_signals) as service:
        try:
            service.wait_ready(deadline - time.monotonic())
            started_seconds = time.monotonic() - began
            say(f"Ready after {started_seconds:.1f} s. Transcribing {SAMPLE.name} ...")
            began = time.monotonic()
            result = transcribe(service, deadline, stop_signals)
            took_seconds = time.monotonic() - began
        except CannotRun:
            print(f"The end of the log:\n{service.last_words()}\n", file=sys.stderr)
            raise
    say(
        f"Language: {result['language']}, {float(result['duration']):.1f} s of audio, transcript "
        f"after {took_seconds:.1f} s. Everything is stopped and removed.\n\n{NEXT}\n\n"
        f"Transcript: {str(result['text']).strip()}"
    )
    return 0


def transcribe(service: Service, deadline: float, stop_signals: StopSignals) -> dict[str, Any]:
    """Raises CannotRun when no transcript comes by the deadline, StopRequested on Ctrl-C."""
    answers: SimpleQueue[dict[str, Any] | Exception] = SimpleQueue()
    progress = Progress(sys.stdout.isatty())
    # The client blocks, and this thread has to see to signals and to what dies.
    threading.Thread(
        target=ask, args=(service.base_url, progress.show, answers.put), daemon=True
    ).start()
    while time.monotonic() < deadline:
        try:
            answer = answers.get(timeout=0.1)
        except Empty:
            if stop_signals.is_requested:
                raise StopRequested from None
            service.supervisor.check(restart=False)
            continue
        progress.end()
        if isinstance(answer, Exception):
            raise CannotRun(f"{type(answer).__name__}: {answer}") from answer
        return answer
    raise CannotRun(f"No transcript within {DEADLINE_SECONDS} s.")


def ask(
    base_url: str,
    on_progress: Callable[[dict[str, Any]], None],
    answer: Callable[[dict[str, Any] | Exception], None],
) -> None:
    os.environ["NO_PROXY"] = "*"  # the service is on this machine
    try:
        with WhisperClient(base_url) as client:
            answer(client.transcribe_file(SAMPLE, on_progress=on_progress, poll_interval=0.1))
    except Exception as exc:  # whatever it is, the other thread reports it
        answer(exc)


class Progress:
    """A bar on a terminal; elsewhere a line per change."""

    def __init__(self, is_terminal: bool):
        self._is_terminal = is_terminal
        self._last = ""

    def show(self, status: dict[str, Any]) -> None:
        share = float(status.get("progress") or 0)
        words = f"{status['status']} {share:4.0%}"
        if status["status"] == "queued" and status.get("queue_position"):
            words = f"queued, position {status['queue_position']}"
        if words == self._last:
            return
        self._last = words
        if self._is_terminal:
            print(f"\r  [{'#' * round(share * 30):<30}] {words:<24}", end="", flush=True)
        else:
            print(f"  {words}", flush=True)

    def end(self) -> None:
        if self._is_terminal and self._last:
            print(flush=True)
