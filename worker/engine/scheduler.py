"""Which windows run when: those of all transcriptions of this worker share the model here.

A window that can share a call with others (same decoding, prompts of one length, as many frames)
joins them, up to `max_batch`. Who has had the least goes first, so a clip never waits for a long
recording, and long ones share evenly; every fourth turn goes to who came first, so that clips can't
starve a long recording.

A window that runs can't be stopped, so turns alone would let every clip wait for one. While clips
keep coming, longer recordings leave a replica free for them, unless it is the only one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.transcribe import get_ctranslate2_storage
from numpy.typing import NDArray

FAIR_TURN = 4
CLIP_WINDOWS = 2  # at most
YIELD_SECONDS = 5.0  # how long room is kept after a clip


@dataclass(frozen=True)
class Decoding:
    """What must be the same for all windows of one call."""

    beam_size: int
    best_of: int
    patience: float
    length_penalty: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    temperature: float
    suppress_tokens: tuple[int, ...]
    prompt_length: int
    has_timestamps: bool


@dataclass(frozen=True)
class Request:
    """One window to encode and decode."""

    features: NDArray[np.float32]  # (mels, frames): an even number, 3000 at most
    prompt: list[int]
    decoding: Decoding
    language_at: int | None  # where in `prompt` the language goes once it is detected
    keeps_encoding: bool  # for word times; such a window has a call of its own


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    avg_logprob: float
    no_speech_prob: float
    language: str | None  # detected; None when it was given
    language_probability: float
    encoding: Any = None  # ctranslate2.StorageView of this window alone, where it was kept
    ran_out: bool = False  # of room for more tokens: it may be the middle of a sentence


@dataclass
class Line:
    """The windows of one transcription that wait."""

    is_clip: bool
    waiting: deque[tuple[Request, Future[Answer]]] = field(default_factory=deque)
    served: int = 0


Batch = list[tuple[Request, Future[Answer]]]


class Closed(Exception):
    """The scheduler was stopped."""


class Scheduler:
    """Owns the threads that call the model, one for each replica of it."""

    def __init__(self, whisper: WhisperModel, *, replicas: int, max_batch: int):
        self._whisper = whisper
        self._max_batch = max_batch
        self.capacity = replicas * max_batch  # windows that can run at the same time
        self._lines: dict[object, Line] = {}
        self._replicas = replicas
        self._long_calls = 0  # that run now, of recordings that are no clips
        self._clip_left = -inf  # when the last clip ended
        self._turn = 0
        self._changed = threading.Condition()
        self._is_open = True
        self._threads = [
            threading.Thread(target=self._serve, name=f"model-{n}", daemon=True)
            for n in range(replicas)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, owner: object, requests: Iterable[Request], *, is_clip: bool = False
    ) -> list[Future[Answer]]:
        """Queues windows of one transcription, in their order. `is_clip`: it has CLIP_WINDOWS at
        most."""
        futures: list[Future[Answer]] = []
        with self._changed:
            if not self._is_open:
                raise Closed
            line = self._lines.setdefault(owner, Line(is_clip))
            for request in requests:
                future: Future[Answer] = Future()
                line.waiting.append((request, future))
                futures.append(future)
            self._changed.notify_all()
        return futures

    def leave(self, owner: object) -> None:
        """The transcription is over, or cancelled: what still waits is dropped."""
        with self._changed:
            line = self._lines.pop(owner, Line(is_clip=False))
            if line.is_clip:
                self._clip_left = time.monotonic()
            for _, future in line.waiting:
                future.cancel()

    def close(self) -> None:
        with self._changed:
            self._is_open = False
            for owner in list(self._lines):
                for _, future in self._lines.pop(owner).waiting:
                    future.set_exception(Closed())
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while call := self._next():
            line, batch = call
            requests = [request for request, _ in batch]
            try:
                answers = self._run(requests)
            except Exception as exc:  # whoever asked is told; the thread lives on
                for _, future in batch:
                    future.set_exception(exc)
                continue
            finally:
                self._done(line)
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

    def _next(self) -> tuple[Line, Batch] | None:
        """Waits for work: whose turn it is, and what its call holds. None: there will be none."""
        with self._changed:
            while self._is_open:
                waiting = [line for line in self._lines.values() if line.waiting]
                if lines := [line for line in waiting if line.is_clip or self._has_room()]:
                    return self._pick(lines)
                self._changed.wait(YIELD_SECONDS if waiting else None)
            return None

    def _has_room(self) -> bool:
        """For one more call of a recording that is no clip."""
        is_one_kept = self._replicas > 1 and self._are_clips_coming()
        return self._long_calls < self._replicas - is_one_kept

    def _are_clips_coming(self) -> bool:
        is_near = time.monotonic() < self._clip_left + YIELD_SECONDS
        return is_near or any(line.is_clip for line in self._lines.values())

    def _pick(self, lines: list[Line]) -> tuple[Line, Batch]:
        """The window whose turn it is, and all that can share its call."""
        self._turn += 1
        if self._turn % FAIR_TURN:
            lines.sort(key=lambda line: line.served)  # else in the order of their arrival
        leader = lines[0]
        first = leader.waiting[0][0]
        batch: Batch = []
        size = 1 if first.keeps_encoding else self._max_batch
        for line in lines:
            while len(batch) < size and line.waiting and self._fits(line.waiting[0][0], first):
                request, future = line.waiting.popleft()
                if future.set_running_or_notify_cancel():
                    batch.append((request, future))
                line.served += 1
        self._long_calls += not leader.is_clip
        return leader, batch

    def _done(self, leader: Line) -> None:
        with self._changed:
            self._long_calls -= not leader.is_clip
            self._changed.notify_all()

    @staticmethod
    def _fits(request: Request, first: Request) -> bool:
        return request is first or (
            request.decoding == first.decoding
            and request.features.shape == first.features.shape
            and not request.keeps_encoding
        )

    def _run(self, requests: list[Request]) -> list[Answer]:
        """One encoder pass serves the language and the text."""
        whisper = self._whisper
        encoding = whisper.model.encode(
            get_ctranslate2_storage(np.stack([request.features for request in requests])),
            to_cpu=whisper.model.device == "cuda" and len(whisper.model.device_index) > 1,
        )
        prompts = [list(request.prompt) for request in requests]
        languages: list[tuple[str | None, float]] = [(None, 1.0)] * len(requests)
        if any(request.language_at is not None for request in requests):
            detected = whisper.model.detect_language(encoding)
            for n, request in enumerate(requests):
                if request.language_at is not None:
                    token, probability = detected[n][0]
                    prompts[n][request.language_at] = whisper.hf_tokenizer.token_to_id(token)
                    languages[n] = (token[2:-2], probability)
        results = generate(whisper, encoding, prompts, requests[0].decoding)
        answers = []
        for request, result, (language, probability) in zip(
            requests, results, languages, strict=True
        ):
            tokens = result.sequences_ids[0]
            total = result.scores[0] * len(tokens) ** request.decoding.length_penalty
            answers.append(
                Answer(
                    tokens=tokens,
                    avg_logprob=total / (len(tokens) + 1),
                    no_speech_prob=result.no_speech_prob,
                    language=language,
                    language_probability=probability,
                    encoding=encoding if request.keeps_encoding else None,
                    ran_out=len(tokens) >= _room(whisper, request.prompt),
                )
            )
        return answers


def _room(whisper: WhisperModel, prompt: list[int]) -> int:
    """The most tokens that CTranslate2 answers; the prompt's last one is not counted."""
    most: int = whisper.max_length
    return min(most // 2, most - (len(prompt) - 1))


def generate(whisper: WhisperModel, encoding: Any, prompts: list[list[int]], how: Decoding) -> Any:
    """WhisperModel's own choice of search: a beam at temperature 0, samples above it."""
    if how.temperature > 0:
        search = {
            "beam_size": 1,
            "num_hypotheses": how.best_of,
            "sampling_topk": 0,
            "sampling_temperature": how.temperature,
        }
    else:
        search = {"beam_size": how.beam_size, "patience": how.patience}
    return whisper.model.generate(
        encoding,
        prompts,
        length_penalty=how.length_penalty,
        repetition_penalty=how.repetition_penalty,
        no_repeat_ngram_size=how.no_repeat_ngram_size,
        max_length=whisper.max_length,
        suppress_blank=True,
        suppress_tokens=how.suppress_tokens,
        return_scores=True,
        return_no_speech_prob=True,
        **search,
    )
