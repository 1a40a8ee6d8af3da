"""Proof of life, from one thread of the worker process: renews the lease of every running
transcription, carries its progress, learns that it was cancelled or lost, and reports the worker.

A connection error is not a verdict: the run goes on, and the store decides when it is back.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from shared.errors import StoreUnavailable, TimeLimit
from shared.jobs import Claim
from worker.store import WorkerStore

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """A running transcription must stop: `reason` is cancelled, lost or drain."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Run:
    """A transcription that is running in this process, for `max_seconds` at most."""

    def __init__(self, claim: Claim, max_seconds: float):
        self.claim = claim
        self._max_seconds = max_seconds
        self._deadline = time.monotonic() + max_seconds
        self.progress = 0.0
        self.stop_reason: str | None = None

    def checkpoint(self, progress: float) -> None:
        """Called by the engine between windows, and while it waits. Raises Interrupted when it
        should stop, TimeLimit when its time is up."""
        self.progress = max(self.progress, progress)
        if self.stop_reason:
            raise Interrupted(self.stop_reason)
        if time.monotonic() > self._deadline:
            raise TimeLimit(
                f"The transcription took longer than {self._max_seconds:.0f} seconds, the most "
                "that this server gives one. Split the recording, or have MAX_RUN_SECONDS raised."
            )


class Heartbeat(threading.Thread):
    """Beats every `interval_seconds`. `about` describes the worker; `is_hung` tells that it can do
    nothing any more; `on_beat` gets the time of each report that reached the store."""

    def __init__(
        self,
        store: WorkerStore,
        interval_seconds: float,
        max_run_seconds: float,
        about: Callable[[int], dict[str, Any]],
        is_hung: Callable[[], bool],
        on_beat: Callable[[float], None],
    ):
        super().__init__(name="heartbeat", daemon=True)
        self._store = store
        self._interval = interval_seconds
        self._max_run_seconds = max_run_seconds
        self._about = about
        self._is_hung = is_hung
        self._on_beat = on_beat
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self.last_tick = time.monotonic()

    @contextmanager
    def running(self, claim: Claim) -> Iterator[Run]:
        """Keeps the claim alive while the block runs."""
        run = Run(claim, self._max_run_seconds)
        with self._lock:
            self._runs[claim.claim_id] = run
        try:
            yield run
        finally:
            with self._lock:
                del self._runs[claim.claim_id]

    @property
    def busy(self) -> int:
        return len(self._runs)

    def interrupt_all(self, reason: str) -> None:
        with self._lock:
            for run in self._runs.values():
                run.stop_reason = run.stop_reason or reason

    def run(self) -> None:
        while True:
            if self._is_hung():
                log.critical("the model does not return: exiting", extra={"action": "model_hung"})
                os._exit(1)  # a thread that hangs can't be waited for; the leases end by themselves
            self.beat()
            if self._stopping.wait(self._interval):
                return

    def beat(self) -> None:
        with self._lock:
            runs = list(self._runs.values())
        self.last_tick = time.monotonic()
        try:
            for run in runs:
                verdict = self._store.renew(run.claim, run.progress)
                if verdict != "ok" and not run.stop_reason:
                    run.stop_reason = verdict
                    log.info(
                        "claim ended",
                        extra={"action": f"claim_{verdict}", "fingerprint": run.claim.fingerprint},
                    )
            now = time.time()
            self._store.report(
                {**self._about(len(runs)), "heartbeat_at": now}, max(10, int(self._interval * 5))
            )
            self._on_beat(now)
        except StoreUnavailable as exc:
            log.warning("no heartbeat: %s", exc, extra={"action": "heartbeat_failed"})

    def stop(self) -> None:
        self._stopping.set()
        self.join(timeout=10)
