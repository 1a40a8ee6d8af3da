"""Where there is speech in a recording, and the windows that the model is given.

Both are what faster-whisper makes of the same recording, in time that is linear in its length
(faster-whisper 1.2.1 joins n stretches by copying n times).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from faster_whisper.vad import VadOptions
from numpy.typing import NDArray

from shared.options import TranscriptionOptions
from worker.engine.decode import SAMPLE_RATE
from worker.engine.vad import WINDOW, Audio, VoiceDetector

WINDOW_SECONDS = 30
BATCHED_SILENCE_MS = 160  # shorter than in sequential mode: windows are cut at silences
PAUSE_MS = 98  # of silence: where speech that goes on for too long may be cut

Stretch = dict[str, int]  # {"start": ..., "end": ...} in samples, as faster-whisper has it


@dataclass(frozen=True)
class Window:
    """Up to 30 s of speech, joined from stretches."""

    audio: Audio
    offset: float  # seconds of speech before it
    duration: float  # seconds
    stretches: list[Stretch]  # of the recording


def find(
    detector: VoiceDetector,
    audio: Audio,
    options: TranscriptionOptions,
    checkpoint: Callable[[], None] = lambda: None,
) -> list[Stretch]:
    """The stretches with speech, as `options.mode` needs them. Raises what `checkpoint` raises."""
    given: dict[str, Any] = options.vad_parameters.model_dump() if options.vad_parameters else {}
    if options.mode == "batched":
        if not given:
            given["min_silence_duration_ms"] = BATCHED_SILENCE_MS
        given["max_speech_duration_s"] = WINDOW_SECONDS
    chosen = VadOptions(**given)
    probabilities = detector.probabilities(audio, checkpoint)
    return padded(spoken(probabilities, chosen, len(audio)), chosen.speech_pad_ms, len(audio))


def spoken(
    probabilities: NDArray[np.float32], options: VadOptions, length: int
) -> list[tuple[int, int]]:
    """Where speech begins and ends in a recording of `length` samples, given how likely it is in
    each window.

    Speech begins with a window above `threshold` and ends before `min_silence_duration_ms` below
    `neg_threshold`. After `max_speech_duration_s` it is cut at its latest pause, or right there.
    """
    least = options.neg_threshold
    if least is None:
        least = max(options.threshold - 0.15, 0.01)
    silence = options.min_silence_duration_ms * SAMPLE_RATE / 1000
    pause = PAUSE_MS * SAMPLE_RATE / 1000
    shortest = options.min_speech_duration_ms * SAMPLE_RATE / 1000
    longest = (
        options.max_speech_duration_s * SAMPLE_RATE
        - WINDOW
        - 2 * options.speech_pad_ms * SAMPLE_RATE / 1000
    )
    found: list[tuple[int, int]] = []
    start: int | None = None  # of the speech that we are in
    quiet_since = 0  # 0: it is not quiet
    pause_at = after_pause = 0  # the latest pause in this speech, and where speech went on
    speaks, is_quiet = (probabilities >= options.threshold), (probabilities < least)
    for n, (speech, quiet) in enumerate(zip(speaks.tolist(), is_quiet.tolist(), strict=True)):
        here = n * WINDOW
        if speech and quiet_since:
            quiet_since = 0
            after_pause = here if after_pause < pause_at else after_pause
        if start is None:
            start = here if speech else None
            continue
        if here - start > longest:
            found.append((start, pause_at or here))
            start = after_pause if 0 < pause_at <= after_pause else None
            pause_at = after_pause = quiet_since = 0
        if start is None or not quiet:
            continue
        quiet_since = quiet_since or here
        if here - quiet_since > pause:
            pause_at = quiet_since
        if here - quiet_since >= silence:
            if quiet_since - start > shortest:
                found.append((start, quiet_since))
            start = None
            pause_at = after_pause = quiet_since = 0
    if start is not None and length - start > shortest:
        found.append((start, length))
    return found


def padded(spoken: list[tuple[int, int]], pad_ms: int, length: int) -> list[Stretch]:
    """With `pad_ms` before and after each, or half of the silence where there is less."""
    pad = pad_ms * SAMPLE_RATE / 1000
    stretches = [{"start": start, "end": end} for start, end in spoken]
    if stretches:
        stretches[0]["start"] = int(max(0, stretches[0]["start"] - pad))
        stretches[-1]["end"] = int(min(length, stretches[-1]["end"] + pad))
    for stretch, after in pairwise(stretches):
        silence = after["start"] - stretch["end"]
        room = pad if silence >= 2 * pad else silence // 2
        stretch["end"] = int(min(length, stretch["end"] + room))
        after["start"] = int(max(0, after["start"] - room))
    return stretches


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
