"""The engine: a recording and its options in, a transcript out.

The one interface that the rest of the worker knows: decode, find speech, cut windows, let the model
hear them, write down. Text and times are faster-whisper's own for the same options.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from faster_whisper.transcribe import Segment as WhisperSegment

from shared.options import TranscriptionOptions
from shared.schemas import Segment, Transcript
from worker.engine import batched, sequential, speech
from worker.engine.decode import SAMPLE_RATE, Decoder
from worker.engine.model import LoadedModel, warm_up
from worker.engine.parts import Part, Plan, Result, cut
from worker.engine.scheduler import Scheduler
from worker.engine.speech import Stretch
from worker.engine.transcript import Heard, segment_of, transcript_of
from worker.engine.vad import Audio, VoiceDetector

# Called with the share of the audio that is done (0-1); raises to stop between two segments.
Checkpoint = Callable[[float], None]
StageTimer = Callable[[str, float], None]

# On a CPU a window costs the same alone and in company; a GPU is idle without company.
MAX_BATCH = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class Recording:
    """Decoded, and its speech found."""

    audio: Audio  # what the model is to hear of it
    stretches: list[Stretch] | None  # what `audio` was joined from; None: it is all of it
    is_partial: bool
    heard: Heard
    whole: Part | None  # None: its windows are not decoded independently
    spent: float  # seconds


class Engine:
    """Owns the warm model. Safe to call from several threads, one call for each slot."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        replicas: int,
        max_audio_seconds: float,
        part_seconds: float = 300,
        voice_threads: int = 1,
        decoder: Decoder | None = None,
    ):
        """`part_seconds`: speech in a part of a long recording. `voice_threads`: how many look for
        speech in a long one. `decoder`: one that has started already; the engine closes it."""
        self.model = model
        self._decoder = decoder or Decoder()
        self._detector = VoiceDetector(voice_threads)
        self._max_audio_seconds = max_audio_seconds
        self._part_seconds = part_seconds
        self._scheduler = Scheduler(
            model.whisper, replicas=replicas, max_batch=MAX_BATCH[model.device]
        )

    def close(self) -> None:
        """Ends the threads; no transcription may be under way."""
        self._scheduler.close()
        self._detector.close()
        self._decoder.close()

    @property
    def longest_call_seconds(self) -> float:
        """Since when the model has owed an answer; 0: it owes none."""
        return float(self.model.whisper.model.longest_call_seconds)

    def check(self) -> None:
        """Raises whatever the model raises when it can't even hear silence: then no file is at
        fault, as after an error of a GPU, which spoils every later call."""
        warm_up(self.model.whisper)

    def transcribe(
        self,
        path: Path,
        options: TranscriptionOptions,
        checkpoint: Checkpoint,
        stage: StageTimer,
    ) -> Transcript:
        """Decodes and transcribes the file at `path`, all of it here.

        Raises a MediaError when the file can't be transcribed, and whatever `checkpoint` raises.
        """
        recording = self.prepare(path, options, checkpoint, stage)
        return self.hear(recording, options, checkpoint, stage)

    def prepare(
        self,
        path: Path,
        options: TranscriptionOptions,
        checkpoint: Checkpoint,
        stage: StageTimer,
    ) -> Recording:
        """All that comes before the model. Raises as `transcribe` does."""
        began = time.perf_counter()
        audio, is_partial = self._decoder.decode(
            path,
            max_seconds=self._max_audio_seconds,
            allow_partial=options.allow_partial,
            checkpoint=lambda: checkpoint(0.0),
        )
        stage("decode", time.perf_counter() - began)
        checkpoint(0.0)
        duration = len(audio) / SAMPLE_RATE
        heard = Heard(duration, duration)
        stretches = whole = None
        if options.vad_filter:
            found = time.perf_counter()
            stretches = speech.find(self._detector, audio, options, lambda: checkpoint(0.0))
            heard.duration_after_vad = speech.seconds(stretches)
            stage("vad", time.perf_counter() - found)
        if options.mode == "batched" and batched.can(audio, options):
            everything = [{"start": 0, "end": len(audio)}]
            pieces = everything if stretches is None else stretches
            whole = Part(speech.windows(audio, pieces), pieces)
            audio = audio[:0].copy()  # the windows hold what matters
        elif stretches is not None:
            audio = speech.join(audio, stretches)
        spent = time.perf_counter() - began
        return Recording(audio, stretches, is_partial, heard, whole, spent)

    def hear(
        self,
        recording: Recording,
        options: TranscriptionOptions,
        checkpoint: Checkpoint,
        stage: StageTimer,
    ) -> Transcript:
        """Raises whatever `checkpoint` raises."""
        began = time.perf_counter()
        heard = recording.heard
        if recording.whole is None:
            found = sequential.transcribe(
                self.model.whisper, recording.audio, recording.stretches, options, heard
            )
        else:
            found = self._batched(recording.whole, options, heard, checkpoint)
        segments: list[Segment] = []
        with closing(found):
            for segment in found:
                segments.append(segment_of(len(segments), segment))
                checkpoint(min(1.0, segment.end / heard.duration))
        spent = time.perf_counter() - began
        stage("transcribe", spent)
        return transcript_of(
            segments,
            heard,
            options,
            self.model.name,
            recording.spent + spent,
            is_partial=recording.is_partial,
        )

    def plan(
        self, recording: Recording, options: TranscriptionOptions
    ) -> tuple[Plan, list[Part]] | None:
        """How a long recording is shared out; None: it is not long, or its mode knows no parts."""
        whole = recording.whole
        if not whole:
            return None
        looks_back = options.word_timestamps
        parts = cut(whole.windows, whole.stretches, self._part_seconds, looks_back=looks_back)
        if len(parts) < 2:
            return None
        began = time.perf_counter()
        whisper = self.model.whisper
        features = whisper.feature_extractor(parts[0].windows[0].audio)
        sequential.first_encoding(whisper, features, options, recording.heard)  # for its language
        spent = recording.spent + time.perf_counter() - began
        return Plan.of(recording.heard, is_partial=recording.is_partial, spent=spent), parts

    def hear_part(
        self,
        part: Part,
        plan: Plan,
        options: TranscriptionOptions,
        checkpoint: Checkpoint,
        stage: StageTimer,
    ) -> Result:
        """Raises whatever `checkpoint` raises."""
        began = time.perf_counter()
        heard = Heard(plan.duration, plan.duration_after_vad)
        first = part.windows[part.looks_back]
        own = int(first.offset * self.model.whisper.frames_per_second)
        segments: list[Segment] = []
        with closing(self._batched(part, plan.options(options), heard, checkpoint)) as found:
            for segment in found:
                if segment.seek >= own:
                    segments.append(segment_of(len(segments), segment))
                checkpoint(part.share_until(segment.end))
        spent = time.perf_counter() - began
        stage("transcribe", spent)
        return Result(spent=spent, segments=segments)

    def _batched(
        self, part: Part, options: TranscriptionOptions, heard: Heard, checkpoint: Checkpoint
    ) -> Generator[WhisperSegment, None, None]:
        return batched.transcribe(
            self.model.whisper,
            self._scheduler,
            part.windows,
            part.stretches,
            options,
            heard,
            lambda: checkpoint(0.0),
        )
