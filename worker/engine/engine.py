"""The engine: a recording and its options in, a transcript out.

The one interface that the rest of the worker knows: decode, find speech, cut windows, let the model
hear them, write down. Text and times are faster-whisper's own for the same options.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

from faster_whisper.transcribe import Segment as WhisperSegment

from shared.options import TranscriptionOptions
from shared.schemas import Segment, Transcript
from worker.engine import batched, sequential, speech
from worker.engine.decode import SAMPLE_RATE, Decoder
from worker.engine.model import LoadedModel
from worker.engine.scheduler import Scheduler
from worker.engine.speech import Audio
from worker.engine.transcript import Heard, segment_of, transcript_of

# Called with the share of the audio that is done (0-1); raises to stop between two segments.
Checkpoint = Callable[[float], None]
StageTimer = Callable[[str, float], None]

# On a CPU a window costs the same alone and in company; a GPU is idle without company.
MAX_BATCH = {"cpu": 1, "cuda": 16}


class Engine:
    """Owns the warm model. Safe to call from several threads, one call for each slot."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        replicas: int,
        max_audio_seconds: float,
        decoder: Decoder | None = None,
    ):
        """`decoder`: one that has started already; the engine closes it."""
        self.model = model
        self._decoder = decoder or Decoder()
        self._max_audio_seconds = max_audio_seconds
        self._scheduler = Scheduler(
            model.whisper, replicas=replicas, max_batch=MAX_BATCH[model.device]
        )

    def close(self) -> None:
        """Ends the threads; no transcription may be under way."""
        self._scheduler.close()
        self._decoder.close()

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
        audio, is_partial = self._decoder.decode(
            path,
            max_seconds=self._max_audio_seconds,
            allow_partial=options.allow_partial,
            checkpoint=lambda: checkpoint(0.0),
        )
        stage("decode", time.perf_counter() - began)
        checkpoint(0.0)

        decoded = time.perf_counter()
        duration = len(audio) / SAMPLE_RATE
        heard = Heard(duration, duration)
        segments: list[Segment] = []
        with closing(self._segments(audio, options, heard)) as found:
            for segment in found:
                segments.append(segment_of(len(segments), segment))
                checkpoint(min(1.0, segment.end / duration))
        stage("transcribe", time.perf_counter() - decoded)
        return transcript_of(
            segments,
            heard,
            options,
            self.model.name,
            time.perf_counter() - began,
            is_partial=is_partial,
        )

    def _segments(
        self, audio: Audio, options: TranscriptionOptions, heard: Heard
    ) -> Generator[WhisperSegment, None, None]:
        whisper = self.model.whisper
        if options.mode == "batched" and batched.can(audio, options):
            stretches = batched.stretches_of(audio, options)
            heard.duration_after_vad = speech.seconds(stretches)
            windows = speech.windows(audio, stretches)
            return batched.transcribe(whisper, self._scheduler, windows, stretches, options, heard)
        return sequential.transcribe(whisper, audio, options, heard)
