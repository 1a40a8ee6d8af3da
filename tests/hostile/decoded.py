"""Runs a file through the decoder as the worker does, and measures."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from shared.errors import ServiceError
from tests.hostile.corpus import DECODED, Hostile
from worker.engine import decode

MAX_SECONDS = 3600.0


@dataclass(frozen=True)
class Answer:
    code: str
    message: str
    seconds: float
    peak_mib: float  # of the process that decoded it
    audio_seconds: float = 0.0


class Peaks(logging.Handler):
    """A context manager: the most memory of each child, from the decoder's own log."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.mib: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.mib.append(getattr(record, "peak_mib", 0.0))

    def __enter__(self) -> Self:
        self._level = decode.log.level
        decode.log.setLevel(logging.DEBUG)
        decode.log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        decode.log.removeHandler(self)
        decode.log.setLevel(self._level)


def answer_of(decoder: decode.Decoder, content: bytes, path: Path) -> Answer:
    """What the decoder says of it. `path`: where to put it. Raises whatever is no answer about the
    file."""
    path.write_bytes(content)
    began = time.perf_counter()
    code, message, samples = DECODED, "", np.empty(0)
    with Peaks() as peaks:
        try:
            samples, _ = decoder.decode(path, max_seconds=MAX_SECONDS)
        except ServiceError as exc:
            code, message = exc.code, exc.message
    seconds = time.perf_counter() - began
    assert np.isfinite(samples).all()
    assert not len(samples) or np.abs(samples).max() <= 1
    return Answer(code, message, seconds, max(peaks.mib, default=0.0), len(samples) / 16_000)


def check(hostile: Hostile, answer: Answer) -> str:
    """What is wrong with the answer; empty if nothing is."""
    if answer.code not in hostile.answers:
        return f"answer {answer.code}, not {' or '.join(hostile.answers)}"
    if answer.code != DECODED and not answer.message:
        return "no message"
    return ""
