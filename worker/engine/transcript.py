"""From faster-whisper's types to ours."""

from __future__ import annotations

from dataclasses import dataclass

from faster_whisper.transcribe import Segment as WhisperSegment

from shared.options import TranscriptionOptions
from shared.schemas import Segment, Transcript, Word
from worker.engine.quality import judged, warnings_of


@dataclass
class Heard:
    """What is known of a recording besides its segments; complete when the last one is there."""

    duration: float  # seconds
    duration_after_vad: float  # seconds
    language: str = "en"
    language_probability: float = 1.0


def segment_of(number: int, segment: WhisperSegment) -> Segment:
    words = None
    if segment.words is not None:
        words = [
            Word(
                start=round(float(word.start), 3),
                end=round(float(word.end), 3),
                word=word.word,
                probability=round(float(word.probability), 4),
            )
            for word in segment.words
        ]
    return Segment(
        id=number,
        seek=segment.seek,
        start=round(float(segment.start), 3),
        end=round(float(segment.end), 3),
        text=segment.text,
        tokens=segment.tokens,
        avg_logprob=round(float(segment.avg_logprob), 4),
        compression_ratio=round(float(segment.compression_ratio), 4),
        no_speech_prob=round(float(segment.no_speech_prob), 4),
        temperature=round(float(segment.temperature or 0.0), 2),
        words=words,
    )


def transcript_of(
    segments: list[Segment],
    heard: Heard,
    options: TranscriptionOptions,
    model: str,
    processing_seconds: float,
    *,
    is_partial: bool,
) -> Transcript:
    segments = judged(segments)
    probability = round(float(heard.language_probability), 4)
    return Transcript(
        text="".join(segment.text for segment in segments).strip(),
        language=heard.language,
        language_probability=probability,
        duration=round(heard.duration, 3),
        duration_after_vad=round(heard.duration_after_vad, 3),
        segments=segments,
        task=options.task,
        model=model,
        processing_seconds=round(processing_seconds, 3),
        warnings=warnings_of(segments, probability, is_partial=is_partial),
    )
