"""After Redis's disk was full its append-only file is written anew.

A Redis that goes on after that leaves a hole in its file, and does not start on it.
deploy/redis/mend.sh says why, and mends it at the next start. A rewrite begins a file without.
"""

from __future__ import annotations

import logging

from worker.store import WorkerStore

log = logging.getLogger(__name__)

PAUSE_SECONDS = 30  # until a rewrite that failed, or whose worker died, is asked for again


class FileRenewal:
    """One for every worker; one of them asks. Call `look` from time to time."""

    def __init__(self, store: WorkerStore):
        self._store = store
        self._asked = ""

    def look(self) -> None:
        """Raises StoreUnavailable."""
        file = self._store.append_only_file()
        if file is None or not file.refusals or not file.is_written or file.is_rewriting:
            return
        if self._asked == file.refusals and file.is_rewritten:
            self._asked = ""
            self._store.note_renewal(file.refusals)
        elif self._store.begin_renewal(file.refusals, PAUSE_SECONDS):
            self._asked = file.refusals
            self._store.rewrite_file()
            log.warning(
                "redis's disk was full: its file is written anew",
                extra={"action": "redis_file_renewed"},
            )
