"""Repairs, from one thread of every worker process: leases that ended, bells that are missing, jobs
that the store has lost, uploads that nobody needs, transcripts beyond the budget, Redis's file.

Every step is idempotent, so any number of reapers may run, and none is needed in particular.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from shared.errors import StoreUnavailable
from shared.settings import Settings
from shared.storage import Storage
from worker.full_disk import FileRenewal
from worker.store import WorkerStore

log = logging.getLogger(__name__)

MAX_BELLS = 50  # at a time
UNSUBMITTED_SECONDS = 10  # an API that has written a manifest submits it within this
DURABLE_SECONDS = 3  # Redis writes its append-only file each second, at worst a second late
RECONCILE_SECONDS = 3
ABANDONED_SECONDS = 3600  # an upload of which nothing arrived for so long
SETTLED_SECONDS = 60  # a folder that whoever ended its job should have removed by now
BATCH = 500


class Reaper(threading.Thread):
    """`on_clean(kind, count)` is told what was taken away (kinds: shared.metrics.CLEANED)."""

    def __init__(
        self,
        store: WorkerStore,
        storage: Storage,
        settings: Settings,
        on_clean: Callable[[str, int], None],
    ):
        super().__init__(name="reaper", daemon=True)
        self._store = store
        self._storage = storage
        self._settings = settings
        self._on_clean = on_clean
        self._file = FileRenewal(store)
        self._stopping = threading.Event()
        self._ended: deque[tuple[float, tuple[str, ...]]] = deque()
        self._next_reconcile = 0.0

    def run(self) -> None:
        while not self._stopping.wait(self._settings.reap_interval_seconds):
            try:
                self.sweep()
            except StoreUnavailable as exc:
                log.warning("no sweep: %s", exc, extra={"action": "reap_failed"})
            except Exception:
                log.exception("the sweep failed", extra={"action": "reap_failed"})

    def stop(self) -> None:
        self._stopping.set()
        self.join(timeout=10)

    def remove_later(self, job_ids: Sequence[str]) -> None:
        """The uploads of jobs that have just ended. They stay until the store has the end on its
        disk: if its machine dies before, or it is emptied, the jobs come back, and need them."""
        self._ended.append((time.monotonic() + DURABLE_SECONDS, tuple(job_ids)))

    def sweep(self) -> None:
        self.take_back_leases()
        self._file.look()
        self.remove_ended()
        if time.monotonic() >= self._next_reconcile:
            began = time.monotonic()
            self.reconcile_uploads()
            self.remove_parts()
            ended = time.monotonic()
            self._next_reconcile = ended + max(RECONCILE_SECONDS, (ended - began) * 20)
        evicted = self._store.evict(self._settings.result_cache_max_mb * 1024 * 1024)
        self._on_clean("transcript", evicted)

    def remove_ended(self) -> None:
        """Of those that the store still knows as ended; the others, and those that may be retried,
        are left to `reconcile_uploads`."""
        while self._ended and self._ended[0][0] <= time.monotonic():
            job_ids = self._ended[0][1]
            states = self._store.job_states(job_ids)
            self._ended.popleft()
            for job_id, state in zip(job_ids, states, strict=True):
                if state == "finished":
                    self._remove(job_id, "upload")

    def take_back_leases(self) -> None:
        requeued, queued, ended = self._store.reap()
        if requeued:
            log.warning("leases ended", extra={"action": "leases_expired", "count": requeued})
        for job_id in ended:
            log.error("quarantined", extra={"action": "quarantined", "job_id": job_id})
        self.remove_later(ended)
        missing = min(MAX_BELLS, queued - self._store.bells()) if queued else 0
        if missing > 0:
            self._store.ring(missing)

    def reconcile_uploads(self) -> None:
        """Compares the folders on disk with the store: what is unfinished must be known there. What
        may be retried stays until its retention ends.

        Takes at most a twentieth of this thread's time, however many folders there are.
        """
        ids = self._storage.job_ids()
        while batch := list(islice(ids, BATCH)):
            for job_id, state in zip(batch, self._store.job_states(batch), strict=True):
                if self._stopping.is_set():
                    return
                if state == "finished" and self._storage.age_seconds(job_id) > SETTLED_SECONDS:
                    self._remove(job_id, "upload")
                elif state == "unknown":
                    self._adopt(job_id)

    def remove_parts(self) -> None:
        """Of recordings that were cancelled, or failed, or are whole again."""
        for fingerprint in self._storage.settled_parts(SETTLED_SECONDS):
            if not self._store.runs_in_parts(fingerprint):
                self._storage.remove_parts(fingerprint)
                self._on_clean("part", 1)

    def _adopt(self, job_id: str) -> None:
        age_seconds = self._storage.age_seconds(job_id)
        manifest = self._storage.manifest(job_id)
        if manifest is None:
            if age_seconds > ABANDONED_SECONDS:
                self._remove(job_id, "abandoned_upload")
        elif age_seconds > UNSUBMITTED_SECONDS:
            outcome = self._store.resubmit(manifest)
            log.warning(
                "the store had lost a job",
                extra={"action": "job_resubmitted", "job_id": job_id, "outcome": outcome},
            )
            if outcome in {"hit", "replayed", "conflict"}:  # it needs no upload
                self._remove(job_id, "upload")

    def _remove(self, job_id: str, kind: str) -> None:
        self._storage.remove(job_id)
        self._on_clean(kind, 1)
