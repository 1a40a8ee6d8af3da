"""Where there is speech in a recording, and the windows that the model is given.

Silero VAD as faster-whisper runs it decides; what is done with its answer is linear in the length
of the recording (faster-whisper 1.2.1 joins n stretches by copying n times).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_whisper.vad import VadOptions, get_speech_timestamps
from numpy.typing import NDArray

from shared.options import TranscriptionOptions
from worker.engine.decode import SAMPLE_RATE

WINDOW_SECONDS = 30
BATCHED_SILENCE_MS = 160  # shorter than in sequential mode: windows are cut at silences

Audio = NDArray[np.float32]  # 16 kHz, mono
Stretch = dict[str, int]  # {"start": ..., "end": ...} in samples, as faster-whisper has it


@dataclass(frozen=True)
class Window:
    """Up to 30 s of speech, joined from stretches."""

    audio: Audio
    offset: float  # seconds of speech before it
    duration: float  # seconds
    stretches: list[Stretch]  # of the recording


def find(audio: Audio, options: TranscriptionOptions) -> list[Stretch]:
    """The stretches with speech, as `options.mode` needs them. Ours to change."""
    given: dict[str, Any] = options.vad_parameters.model_dump() if options.vad_parameters else {}
    if options.mode == "batched":
        if not given:
            given["min_silence_duration_ms"] = BATCHED_SILENCE_MS
        given["max_speech_duration_s"] = WINDOW_SECONDS
    found: list[Stretch] = get_speech_timestamps(audio, VadOptions(**given))
    return found


def seconds(stretches: list[Stretch]) -> float:
    return sum(stretch["end"] - stretch["start"] for stretch in stretches) / SAMPLE_RATE


def join(audio: Audio, stretches: list[Stretch]) -> Audio:
    """Nothing but the speech."""
    pieces = [audio[stretch["start"] : stretch["end"]] for stretch in stretches]
    return np.concatenate(pieces) if pieces else audio[:0]


def windows(audio: Audio, stretches: list[Stretch]) -> list[Window]:
    """As many stretches in a window as fit, in their order; equal to what
    faster_whisper.vad.collect_chunks makes of them."""
    groups: list[list[Stretch]] = []
    length = 0
    for stretch in stretches:
        samples = stretch["end"] - stretch["start"]
        if not groups or length + samples > WINDOW_SECONDS * SAMPLE_RATE:
            groups.append([])
            length = 0
        groups[-1].append(stretch)
        length += samples
    return windows_of(join(audio, stretches), groups)


def windows_of(sound: Audio, groups: list[list[Stretch]], before: int = 0) -> list[Window]:
    """One window for each group of stretches; `sound` is what they hold, joined, and `before` how
    many samples of speech precede it."""
    made: list[Window] = []
    place = 0
    for group in groups:
        size = sum(stretch["end"] - stretch["start"] for stretch in group)
        window = sound[place : place + size]
        offset = (before + place) / SAMPLE_RATE
        made.append(Window(window, offset, size / SAMPLE_RATE, group))
        place += size
    return made
