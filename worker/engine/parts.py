"""Long recordings: planned once, transcribed in parts by any worker, joined after the last one.

A part is a run of windows, which know nothing of each other in batched mode; so the segments of
all parts, one after the other, are those of the whole. Only the time of a window's first word looks
back, to the last word of the window before; so that one is heard again where words are asked for. A
part travels as a file of its own: its speech, and where in the recording that came from.
"""

from __future__ import annotations

import io
import zipfile
from bisect import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from typing import Self

import numpy as np
from pydantic import BaseModel

from shared.options import TranscriptionOptions
from shared.schemas import Segment, Transcript
from worker.engine import speech
from worker.engine.decode import SAMPLE_RATE
from worker.engine.speech import Stretch, Window
from worker.engine.transcript import Heard, transcript_of

SMALLER = 4  # pieces of each of the last two parts
FULL_SCALE = 32768  # decoded samples are 16 bits, so this way and back changes nothing


class Plan(BaseModel):
    """What all parts share, and the transcript needs in the end. Times in seconds."""

    duration: float
    duration_after_vad: float
    language: str
    language_probability: float
    is_partial: bool
    spent: float  # until the parts were there

    @classmethod
    def of(cls, heard: Heard, *, is_partial: bool, spent: float) -> Self:
        return cls(**asdict(heard), is_partial=is_partial, spent=spent)

    def options(self, asked: TranscriptionOptions) -> TranscriptionOptions:
        """No part detects the language for itself; `fast` is for short recordings."""
        return asked.model_copy(update={"language": self.language, "fast": False})


class Result(BaseModel):
    """What became of a part."""

    spent: float  # seconds
    segments: list[Segment]


@dataclass(frozen=True)
class Part:
    windows: list[Window]  # with their offsets in the whole
    stretches: list[Stretch]  # of the whole: times are restored as for the whole
    looks_back: bool = False  # the first window belongs to the part before

    @property
    def seconds(self) -> float:
        return sum(window.duration for window in self.windows[self.looks_back :])

    def share_until(self, seconds: float) -> float:
        """How much of the part comes before that time of the recording, 0 to 1."""
        start = self.windows[0].stretches[0]["start"] / SAMPLE_RATE
        end = self.windows[-1].stretches[-1]["end"] / SAMPLE_RATE
        return min(1.0, max(0.0, (seconds - start) / (end - start)))

    def pack(self) -> bytes:
        """As bytes for a file."""
        sound = np.concatenate([window.audio for window in self.windows])
        before = round(self.windows[0].offset * SAMPLE_RATE)
        file = io.BytesIO()
        np.savez(
            file,
            sound=np.rint(sound * FULL_SCALE).astype(np.int16),
            before=before,
            windows=np.array([len(window.stretches) for window in self.windows]),
            stretches=np.array([(s["start"], s["end"]) for s in self.stretches]),
            first=self.stretches.index(self.windows[0].stretches[0]),
            looks_back=self.looks_back,
        )
        return file.getvalue()

    @classmethod
    def unpack(cls, content: bytes) -> Self:
        """Raises ValueError where these are not the bytes that `pack` gave."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as packed:
                sound = packed["sound"] * np.float32(1 / FULL_SCALE)
                before, place = int(packed["before"]), int(packed["first"])
                sizes = packed["windows"].tolist()
                stretches = [{"start": int(a), "end": int(b)} for a, b in packed["stretches"]]
                looks_back = bool(packed["looks_back"])
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as exc:
            raise ValueError("these bytes are no part") from exc
        groups = []
        for size in sizes:
            groups.append(stretches[place : place + size])
            place += size
        return cls(speech.windows_of(sound, groups, before), stretches, looks_back)


def cut(
    windows: Sequence[Window],
    stretches: list[Stretch],
    seconds: float,
    *,
    looks_back: bool = False,
) -> list[Part]:
    """About so long each, as even as windows allow; the last two in SMALLER pieces, so that workers
    which share a recording end together. One part when it would not be two."""
    total = sum(window.duration for window in windows)
    number = max(1, int(total / seconds))
    even = total / number
    ends = [even * n for n in range(1, number - 2)]
    ends += [even * (number - 2 + n / SMALLER) for n in range(2 * SMALLER) if number > 1]

    def place(window: Window) -> int:
        return bisect(ends, window.offset + window.duration / 2)

    groups = [list(group) for _, group in groupby(windows, place)] or [[]]
    parts = [Part(groups[0], stretches)]
    for before, group in pairwise(groups):
        look = before[-1:] if looks_back else []
        parts.append(Part(look + group, stretches, looks_back))
    return parts


def join(
    plan: Plan, results: Sequence[Result], options: TranscriptionOptions, model: str
) -> Transcript:
    """`results` in the order of the parts."""
    segments = [segment for result in results for segment in result.segments]
    heard = Heard(plan.duration, plan.duration_after_vad, plan.language, plan.language_probability)
    return transcript_of(
        [segment.model_copy(update={"id": n}) for n, segment in enumerate(segments)],
        heard,
        options,
        model,
        plan.spent + sum(result.spent for result in results),
        is_partial=plan.is_partial,
    )
