"""Mode `batched`: windows cut at silences, each decoded by itself, with those of other
transcriptions where the device gains from it.

Text, segments and times are those of faster_whisper.BatchedInferencePipeline, which leaves out
three things: here a window that looks wrong is tried again at higher temperatures (RETRIES times at
most, so that the worst window costs a few normal ones), one that is likely silence gives no text,
and a phrase that has no end by the end of its window is kept.

With the option `fast` the encoder hears a short recording without most of the silence that Whisper
is trained to have after it. An answer that looks wrong then counts for nothing: the window is heard
in full, as if `fast` had not been asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.audio import pad_or_trim
from faster_whisper.tokenizer import Tokenizer
from faster_whisper.transcribe import Segment as WhisperSegment
from faster_whisper.transcribe import Word as WhisperWord
from faster_whisper.transcribe import (
    get_compression_ratio,
    get_suppressed_tokens,
    restore_speech_timestamps,
)

from shared.options import TranscriptionOptions
from worker.engine import speech
from worker.engine.decode import SAMPLE_RATE
from worker.engine.scheduler import CLIP_WINDOWS, Answer, Decoding, Request, Scheduler
from worker.engine.sequential import APPEND, PREPEND, given_language
from worker.engine.speech import Window
from worker.engine.transcript import Heard
from worker.engine.vad import Audio

RETRIES = 2  # above the first temperature
RETRY_SAMPLES = 2  # of best_of
CHECK_SECONDS = 0.5  # between two calls of `checkpoint` while an answer is waited for

# Option `fast`. What is known of its accuracy, and where these numbers come from: API_DOCS.md.
FAST_SECONDS = 20  # of speech, in one window: the most that it serves
FAST_SILENCE_SECONDS = 3  # at least, after the speech
FAST_CONTEXTS = (10, 12, 16, 20, 24)  # seconds; few, so that clips share calls
FAST_TOKENS = 16  # more than these and
FAST_TOKENS_PER_SECOND = 12  # these together: the decoder goes round in a loop

FRAMES_PER_SECOND = 100
FULL = speech.WINDOW_SECONDS * FRAMES_PER_SECOND  # frames


def can(audio: Audio, options: TranscriptionOptions) -> bool:
    """Windows are cut at silences, which only the VAD filter knows."""
    return options.vad_filter or len(audio) <= speech.WINDOW_SECONDS * SAMPLE_RATE


def frames_for(windows: list[Window], options: TranscriptionOptions) -> int:
    """How much the encoder hears of each window: in full, unless `fast` allows less."""
    if options.fast and len(windows) == 1 and windows[0].duration <= FAST_SECONDS:
        needed = windows[0].duration + FAST_SILENCE_SECONDS
        return next(s for s in FAST_CONTEXTS if s >= needed) * FRAMES_PER_SECOND
    return FULL


def transcribe(
    whisper: WhisperModel,
    scheduler: Scheduler,
    windows: list[Window],
    stretches: list[speech.Stretch],
    options: TranscriptionOptions,
    heard: Heard,
    checkpoint: Callable[[], None] = lambda: None,
) -> Generator[WhisperSegment, None, None]:
    """Segments in their order, with times of the recording that `stretches` are of; the language
    of `heard` is filled in before the first. `checkpoint` is called every CHECK_SECONDS while an
    answer is waited for, and raises to stop. Then, and when the iterator is closed, the windows
    that wait leave the queue."""
    is_clip = len(windows) <= CLIP_WINDOWS
    run = _Run(whisper, scheduler, options, heard, is_clip, checkpoint)
    try:
        yield from restore_speech_timestamps(run.segments(windows), stretches, SAMPLE_RATE)
    finally:
        scheduler.leave(run)


@dataclass(eq=False)
class _Run:
    """One transcription's way through the scheduler."""

    whisper: WhisperModel
    scheduler: Scheduler
    options: TranscriptionOptions
    heard: Heard
    is_clip: bool = True
    checkpoint: Callable[[], None] = lambda: None
    tokenizer: Tokenizer = None
    last_speech: float = 0.0  # end of the last word, for the times of the next

    def segments(self, windows: list[Window]) -> Iterator[WhisperSegment]:
        language = given_language(self.whisper, self.options)
        if language:
            self.heard.language = language
        self._speak(self.heard.language)
        if not windows:
            self._listen_to_silence(language)
            return
        rest = iter(windows)
        frames = frames_for(windows, self.options)
        if not language or frames < FULL:  # the first window tells; the others wait for it
            first = next(rest)
            answer = self._first_answer(first, frames, is_language_known=bool(language))
            if answer.language:
                self.heard.language = answer.language
                self.heard.language_probability = answer.language_probability
                self._speak(answer.language)
            yield from self._segments_of(first, answer)
        ahead: deque[tuple[Window, Future[Answer]]] = deque()
        for window in rest:
            # Not all at once: each waits as a spectrogram of a megabyte.
            ahead.append((window, self._ask(window)))
            if len(ahead) > 2 * self.scheduler.capacity:
                done, future = ahead.popleft()
                yield from self._segments_of(done, self._wait(future))
        for done, future in ahead:
            yield from self._segments_of(done, self._wait(future))

    def _first_answer(self, window: Window, frames: int, *, is_language_known: bool) -> Answer:
        """Where fewer frames give a doubtful one, that of all frames, its language included."""
        answer = self._wait(self._ask(window, frames=frames, is_language_known=is_language_known))
        if frames < FULL and self._is_doubtful(window, answer):
            return self._wait(self._ask(window, is_language_known=is_language_known))
        return answer

    def _wait(self, future: Future[Answer]) -> Answer:
        while not wait([future], timeout=CHECK_SECONDS).done:
            self.checkpoint()
        return future.result()

    def _speak(self, language: str) -> None:
        self.tokenizer = Tokenizer(
            self.whisper.hf_tokenizer,
            self.whisper.model.is_multilingual,
            task=self.options.task,
            language=language,
        )

    def _listen_to_silence(self, language: str | None) -> None:
        """Nothing to transcribe, but a language is always named."""
        if not language:
            empty = np.full((self.whisper.model.n_mels, 1), -1.5, np.float32)
            found, probability, _ = self.whisper.detect_language(features=empty)
            self.heard.language, self.heard.language_probability = found, probability

    def _ask(
        self,
        window: Window,
        *,
        frames: int = FULL,
        is_language_known: bool = True,
        temperature: float | None = None,
    ) -> Future[Answer]:
        options, tokenizer = self.options, self.tokenizer
        features = self.whisper.feature_extractor(window.audio)[..., :-1]
        prompt = self.whisper.get_prompt(
            tokenizer,
            tokenizer.encode(options.initial_prompt) if options.initial_prompt else [],
            without_timestamps=options.without_timestamps,
            hotwords=options.hotwords,
        )
        is_retry = temperature is not None
        decoding = Decoding(
            beam_size=options.beam_size,
            best_of=min(options.best_of, RETRY_SAMPLES) if is_retry else options.best_of,
            patience=options.patience,
            length_penalty=options.length_penalty,
            repetition_penalty=options.repetition_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            temperature=options.temperature[0] if temperature is None else temperature,
            suppress_tokens=get_suppressed_tokens(tokenizer, [-1]),
            prompt_length=len(prompt),
            has_timestamps=not options.without_timestamps,
        )
        request = Request(
            features=pad_or_trim(features, frames),
            prompt=prompt,
            decoding=decoding,
            language_at=None if is_language_known else prompt.index(tokenizer.language),
            keeps_encoding=options.word_timestamps,
        )
        return self.scheduler.submit(self, [request], is_clip=self.is_clip)[0]

    def _segments_of(self, window: Window, answer: Answer) -> Iterator[WhisperSegment]:
        temperature = self.options.temperature[0]
        best = answer
        for retry in self.options.temperature[1 : 1 + RETRIES]:
            if not self._looks_wrong(best):
                break
            again = self._wait(self._ask(window, temperature=retry))
            if again.avg_logprob > best.avg_logprob or not self._looks_wrong(again):
                best, temperature = again, retry
        if self._is_silence(best):
            return
        split, _, _ = self.whisper._split_segments_by_timestamps(
            tokenizer=self.tokenizer,
            tokens=best.tokens,
            time_offset=window.offset,
            segment_size=ceil(window.duration) * self.whisper.frames_per_second,
            segment_duration=window.duration,
            seek=0,
        )
        split += self._unfinished(window, best.tokens[sum(len(part["tokens"]) for part in split) :])
        start_frame = int(window.offset * self.whisper.frames_per_second)
        parts = [{**part, "seek": start_frame} for part in split]
        if self.options.word_timestamps:
            self.last_speech = self.whisper.add_word_timestamps(
                [parts],
                self.tokenizer,
                best.encoding,
                [ceil(window.duration) * self.whisper.frames_per_second],
                PREPEND,
                APPEND,
                self.last_speech,
            )
        made = (self._segment(part, best, temperature) for part in parts)
        yield from (segment for segment in made if segment.text.strip())

    def _unfinished(self, window: Window, tokens: list[int]) -> list[dict[str, Any]]:
        """What follows the last finished phrase. Sequential mode hears it again in its next window;
        here there is none, and the library drops it."""
        if not tokens or not self.tokenizer.decode(tokens).strip():
            return []
        start = max(0, tokens[0] - self.tokenizer.timestamp_begin) * self.whisper.time_precision
        end = window.offset + window.duration
        return [{"start": min(window.offset + start, end), "end": end, "tokens": tokens}]

    def _segment(self, part: dict[str, Any], answer: Answer, temperature: float) -> WhisperSegment:
        text = self.tokenizer.decode(part["tokens"])
        words = [WhisperWord(**word) for word in part["words"]] if "words" in part else None
        return WhisperSegment(
            id=0,
            seek=part["seek"],
            start=round(part["start"], 3),
            end=round(part["end"], 3),
            text=text,
            tokens=part["tokens"],
            avg_logprob=answer.avg_logprob,
            compression_ratio=get_compression_ratio(text),
            no_speech_prob=answer.no_speech_prob,
            words=words,
            temperature=temperature,
        )

    def _is_silence(self, answer: Answer) -> bool:
        limit, least = self.options.no_speech_threshold, self.options.log_prob_threshold
        if limit is None or answer.no_speech_prob <= limit:
            return False
        return least is None or answer.avg_logprob <= least

    def _looks_wrong(self, answer: Answer) -> bool:
        """Too repetitive, or too unlikely; but silence needs no second look."""
        if self._is_silence(answer):
            return False
        most, least = self.options.compression_ratio_threshold, self.options.log_prob_threshold
        text = self.tokenizer.decode(answer.tokens).strip()
        is_repetitive = most is not None and get_compression_ratio(text) > most
        return is_repetitive or (least is not None and answer.avg_logprob < least)

    def _is_doubtful(self, window: Window, answer: Answer) -> bool:
        """The tests of `fast`: stricter, because a second look costs little. Hearing nothing is
        doubtful too, as the window was taken for speech."""
        most = FAST_TOKENS + FAST_TOKENS_PER_SECOND * window.duration
        return (
            answer.ran_out
            or len(answer.tokens) > most
            or not self.tokenizer.decode(answer.tokens).strip()
            or self._is_silence(answer)
            or self._looks_wrong(answer)
        )
