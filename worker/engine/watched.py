"""How long calls into the model take that have not returned yet.

A call can hang for ever, as when a GPU's driver does, and then nothing else in the process notices:
the threads that answer for it live on. The heartbeat asks here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class WatchedModel:
    """Stands in for a `ctranslate2.models.Whisper`; passes on what is no call of the model."""

    def __init__(self, model: Any):
        self._model = model
        self._running: dict[object, float] = {}  # since when
        self._lock = threading.Lock()

    @property
    def longest_call_seconds(self) -> float:
        """0 while none runs."""
        with self._lock:
            return time.monotonic() - min(self._running.values(), default=time.monotonic())

    def encode(self, *args: Any, **options: Any) -> Any:
        with self._call():
            return self._model.encode(*args, **options)

    def detect_language(self, *args: Any, **options: Any) -> Any:
        with self._call():
            return self._model.detect_language(*args, **options)

    def generate(self, *args: Any, **options: Any) -> Any:
        with self._call():
            return self._model.generate(*args, **options)

    def align(self, *args: Any, **options: Any) -> Any:
        with self._call():
            return self._model.align(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @contextmanager
    def _call(self) -> Iterator[None]:
        call = object()
        with self._lock:
            self._running[call] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                del self._running[call]
