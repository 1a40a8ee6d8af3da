"""Signals of quality: what in a transcript is doubtful by the model's own figures, and what to say.

The thresholds are those by which Whisper itself takes a window for wrong or for silent
(API_DOCS.md, Warnings), whatever thresholds the caller set for trying again. Text stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from faster_whisper.transcribe import get_compression_ratio

from shared.schemas import Segment, TranscriptWarning, WarningCode

MAX_COMPRESSION_RATIO = 2.4
MIN_AVG_LOGPROB = -1.0
MAX_NO_SPEECH_PROB = 0.6
MIN_LANGUAGE_PROBABILITY = 0.5
REPEATS = 4  # of the same text in a row; people do say a thing three times

MESSAGES: dict[WarningCode, str] = {
    "no_speech": "No speech was found in the recording.",
    "truncated_media": "The file ends early; the transcript covers what was decoded.",
    "low_language_confidence": "The language was recognised with a probability below "
    f"{MIN_LANGUAGE_PROBABILITY}. If it is wrong, submit the file again and name it.",
    "possible_repetition": "The same text comes again and again; the model may have gone round in "
    "a loop. `warnings` of the segments say where.",
    "possible_hallucination": "Text is improbable, or was written where the model heard hardly any "
    "speech; it may be made up. `warnings` of the segments say where.",
}


def judged(segments: Sequence[Segment]) -> list[Segment]:
    """The same, each with the codes of what makes it doubtful."""
    repeated = {segment.id for segment in repetitions(segments)}
    made = []
    for segment in segments:
        codes: list[WarningCode] = []
        if segment.id in repeated:
            codes.append("possible_repetition")
        if segment.no_speech_prob > MAX_NO_SPEECH_PROB or segment.avg_logprob < MIN_AVG_LOGPROB:
            codes.append("possible_hallucination")
        made.append(segment.model_copy(update={"warnings": codes}))
    return made


def repetitions(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Those of windows whose text compresses too well, and those that say the same again and
    again, also in windows of their own."""
    for _, window in groupby(segments, lambda segment: segment.seek):
        told = list(window)
        ratio = get_compression_ratio("".join(segment.text for segment in told).strip())
        for segment in told:
            if max(ratio, segment.compression_ratio) > MAX_COMPRESSION_RATIO:
                yield segment
    for _, run in groupby(segments, sounds):
        same = list(run)
        if len(same) >= REPEATS:
            yield from same


def sounds(segment: Segment) -> str:
    """Its text without what makes no difference in speech."""
    plain = "".join(letter for letter in segment.text.casefold() if letter.isalnum())
    return plain or segment.text.strip()


def warnings_of(
    segments: Sequence[Segment], language_probability: float, *, is_partial: bool
) -> list[TranscriptWarning]:
    """Of a transcript with these judged segments. The language of silence is nobody's concern."""
    codes: list[WarningCode] = []
    if is_partial:
        codes.append("truncated_media")
    if not segments:
        codes.append("no_speech")
    elif language_probability < MIN_LANGUAGE_PROBABILITY:
        codes.append("low_language_confidence")
    doubts = {code for segment in segments for code in segment.warnings}
    codes += [code for code in MESSAGES if code in doubts]
    return [TranscriptWarning(code=code, message=MESSAGES[code]) for code in codes]
