"""The engine: a recording and its options in, a transcript out.

The one interface that the rest of the worker knows. This engine runs one transcription for each
slot through faster-whisper, so its text is faster-whisper's own. It alone knows that library's
types; they become ours here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faster_whisper.transcribe import Segment as WhisperSegment
from faster_whisper.transcribe import TranscriptionInfo

from shared.options import TranscriptionOptions
from shared.schemas import Segment, Transcript, TranscriptWarning, Word
from worker.engine.decode import SAMPLE_RATE, decode
from worker.engine.model import LoadedModel

# Called with the share of the audio that is done (0-1) and the stage that took the last seconds;
# raises to stop the transcription between two segments.
Checkpoint = Callable[[float], None]
StageTimer = Callable[[str, float], None]

NO_SPEECH = TranscriptWarning(code="no_speech", message="No speech was found in the recording.")
PARTIAL = TranscriptWarning(
    code="truncated_media", message="The file ends early; the transcript covers what was decoded."
)


class Engine:
    """Owns the warm model. Safe to call from several threads, one call for each slot."""

    def __init__(self, model: LoadedModel, *, max_audio_seconds: float):
        self.model = model
        self._max_audio_seconds = max_audio_seconds

    def transcribe(
        self,
        path: Path,
        options: TranscriptionOptions,
        checkpoint: Checkpoint,
        stage: StageTimer,
    ) -> Transcript:
        """Decodes and transcribes the file at `path`.

        Raises a MediaError when the file can't be transcribed, and whatever `checkpoint` raises.
        """
        began = time.perf_counter()
        audio, is_partial = decode(
            path, max_seconds=self._max_audio_seconds, allow_partial=options.allow_partial
        )
        stage("decode", time.perf_counter() - began)
        checkpoint(0.0)

        decoded = time.perf_counter()
        duration = len(audio) / SAMPLE_RATE
        found, info = self.model.whisper.transcribe(audio, **arguments(options))
        segments: list[Segment] = []
        for segment in found:
            segments.append(segment_of(len(segments), segment))
            checkpoint(min(1.0, segment.end / duration))
        stage("transcribe", time.perf_counter() - decoded)

        warnings = [PARTIAL] if is_partial else []
        if not segments:
            warnings.append(NO_SPEECH)
        return transcript_of(
            segments, info, options, self.model.name, time.perf_counter() - began, warnings
        )


def arguments(options: TranscriptionOptions) -> dict[str, Any]:
    """Our options as arguments of WhisperModel.transcribe, which has the same names."""
    values = options.model_dump(exclude={"allow_partial"}, exclude_none=False)
    values["temperature"] = list(options.temperature)
    return values


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
        start=round(float(segment.start), 3),
        end=round(float(segment.end), 3),
        text=segment.text,
        avg_logprob=round(float(segment.avg_logprob), 4),
        compression_ratio=round(float(segment.compression_ratio), 4),
        no_speech_prob=round(float(segment.no_speech_prob), 4),
        temperature=round(float(segment.temperature or 0.0), 2),
        words=words,
    )


def transcript_of(
    segments: list[Segment],
    info: TranscriptionInfo,
    options: TranscriptionOptions,
    model: str,
    processing_seconds: float,
    warnings: list[TranscriptWarning],
) -> Transcript:
    return Transcript(
        text="".join(segment.text for segment in segments).strip(),
        language=info.language,
        language_probability=round(float(info.language_probability), 4),
        duration=round(float(info.duration), 3),
        duration_after_vad=round(float(info.duration_after_vad), 3),
        segments=segments,
        task=options.task,
        model=model,
        processing_seconds=round(processing_seconds, 3),
        warnings=warnings,
    )
