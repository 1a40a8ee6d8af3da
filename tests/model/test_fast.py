"""The option `fast`: a short recording is heard with less silence after it, with the same text; and
in full, as if the option did not exist, where that answer looks wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from shared.options import TranscriptionOptions
from shared.schemas import Transcript
from tests.conftest import FOX, SAMPLES, wait_until
from worker.engine import batched
from worker.engine.engine import Engine
from worker.engine.scheduler import Answer, Request, Scheduler
from worker.engine.speech import Window
from worker.engine.transcript import Heard

TRUTH = json.loads((SAMPLES / "transcripts.json").read_text())
FRAMES = {  # of each sample's speech and 3 s, rounded up
    "quick-brown-fox.wav": 1000,
    "two-sentences.wav": 1200,
    "de.wav": 1000,
    "fr.wav": 1000,
    "es.wav": 1000,
}
FULL = 3000
Calls = list[list[int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Of each call of the model, the frames of its windows."""
    seen: Calls = []
    run = Scheduler._run

    def noted(self: Scheduler, requests: list[Request]) -> list[Answer]:
        seen.append([request.features.shape[-1] for request in requests])
        return run(self, requests)

    monkeypatch.setattr(Scheduler, "_run", noted)
    return seen


def heard(engine: Engine, name: str, **options) -> Transcript:
    chosen = TranscriptionOptions(**options)
    return engine.transcribe(SAMPLES / name, chosen, lambda _: None, lambda *_: None)


def content(transcript: Transcript) -> dict:
    return transcript.model_dump(exclude={"processing_seconds", "options"})


# --- What is heard


@pytest.mark.parametrize("name", FRAMES)
def test_a_short_recording_gives_the_right_text_from_fewer_frames(engine, calls, name):
    found = heard(engine, name, fast=True)
    assert (found.text, found.language) == (TRUTH[name]["text"], TRUTH[name]["language"])
    assert calls == [[FRAMES[name]]]


@pytest.mark.parametrize("name", FRAMES)
def test_words_and_segments_have_the_times_of_the_full_window(engine, calls, name):
    """The alignment takes a shorter encoding as it is."""
    short, full = (heard(engine, name, fast=fast, word_timestamps=True) for fast in (True, False))
    assert calls == [[FRAMES[name]], [FULL]]
    words = [[word for segment in one.segments for word in segment.words] for one in (short, full)]
    assert [word.word for word in words[0]] == [word.word for word in words[1]]
    times = [[time for word in found for time in (word.start, word.end)] for found in words]
    assert times[0] == pytest.approx(times[1], abs=0.1)


def test_a_language_that_is_given_is_not_detected(engine, calls):
    assert heard(engine, "de.wav", fast=True, language="de").text == TRUTH["de.wav"]["text"]
    assert calls == [[1000]]


def test_without_the_option_all_is_heard(engine, calls):
    heard(engine, FOX.name)
    assert calls == [[FULL]]


def test_a_long_recording_is_heard_in_full(engine, calls):
    heard(engine, "long.ogg", fast=True, temperature="0")
    assert len(calls) > 1
    assert {frames for call in calls for frames in call} == {FULL}


@pytest.mark.parametrize(
    ("seconds", "frames"),
    [
        ([0.1], 1000),
        ([7.0], 1000),
        ([7.1], 1200),
        ([13.0], 1600),
        ([17.0], 2000),
        ([20.0], 2400),
        ([20.1], FULL),
        ([30.0], FULL),
        ([3.0, 3.0], FULL),
        ([], FULL),
    ],
)
def test_one_window_of_20_seconds_gets_3_seconds_of_silence_and_10_in_all(seconds, frames):
    """Others get the full window."""
    windows = [Window(np.zeros(0, np.float32), 0.0, duration, []) for duration in seconds]
    assert batched.frames_for(windows, TranscriptionOptions(fast=True)) == frames
    assert batched.frames_for(windows, TranscriptionOptions()) == FULL


# --- Where the answer looks wrong


def test_an_unlikely_answer_is_heard_again_in_full(engine, calls):
    """And then the transcript is the one without the option, in all that it says."""
    wrong = {"log_prob_threshold": 0.0, "temperature": "0", "no_speech_threshold": "none"}
    found = heard(engine, FOX.name, fast=True, **wrong)
    assert calls == [[1000], [FULL]]
    assert content(found) == content(heard(engine, FOX.name, **wrong))


def test_higher_temperatures_are_tried_on_the_full_window_only(engine, calls):
    heard(engine, FOX.name, fast=True, log_prob_threshold=0.0, no_speech_threshold="none")
    assert calls == [[1000], [FULL], [FULL], [FULL]]


def test_an_answer_that_ran_out_of_room_is_heard_again_in_full(engine, calls, monkeypatch):
    """As Whisper does when it goes round in a loop."""
    monkeypatch.setattr(engine.model.whisper, "max_length", 16)
    heard(engine, FOX.name, fast=True, temperature="0")
    assert calls == [[1000], [FULL]]


def test_the_language_is_that_of_the_window_that_counts(engine, monkeypatch):
    run = Scheduler._run

    def misled(self: Scheduler, requests: list[Request]) -> list[Answer]:
        (answer,) = run(self, requests)
        if requests[0].features.shape[-1] == FULL:
            return [answer]
        return [replace(answer, tokens=[], language="de", language_probability=0.3)]

    monkeypatch.setattr(Scheduler, "_run", misled)
    assert content(heard(engine, FOX.name, fast=True)) == content(heard(engine, FOX.name))


@pytest.mark.parametrize(
    ("text", "change", "is_doubtful"),
    [
        (" the quick brown fox", {}, False),
        (" a b c d e f g h i j k l m n o p q r s t u v w x y z 1 2", {}, False),
        (" a b c d e f g h i j k l m n o p q r s t u v w x y z 1 2 3", {}, True),
        (" the quick brown fox", {"ran_out": True}, True),
        (" the quick brown fox", {"avg_logprob": -1.1}, True),
        (" the quick brown fox", {"avg_logprob": -1.1, "no_speech_prob": 0.9}, True),
        (" no no no no no no no no no no no no no no no no no", {}, True),
        (" ", {}, True),
    ],
)
def test_what_looks_wrong_in_a_second_of_speech(engine, text, change, is_doubtful):
    """More than 28 tokens, no end, unlikely, silent, repetitive, empty."""
    run = batched._Run(engine.model.whisper, None, TranscriptionOptions(fast=True), Heard(0, 0))
    run._speak("en")
    answer = replace(Answer(run.tokenizer.encode(text), -0.1, 0.0, None, 1.0), **change)
    window = Window(np.zeros(16_000, np.float32), 0.0, 1.0, [])
    assert run._is_doubtful(window, answer) is is_doubtful


# --- In company


@pytest.fixture
def company(engine: Engine) -> Iterator[Scheduler]:
    """Calls of up to eight windows, one at a time."""
    with closing(Scheduler(engine.model.whisper, replicas=1, max_batch=8)) as made:
        yield made


def test_clips_share_a_call_with_those_of_as_many_frames_only(engine, calls, company, monkeypatch):
    """All wait behind one call; then four are heard together, the longer one and the one without
    the option alone; each gets its own text."""
    go, run = threading.Event(), company._run

    def held(requests: list[Request]) -> list[Answer]:
        go.wait(30)
        return run(requests)

    monkeypatch.setattr(company, "_run", held)

    def text(name: str, fast: bool) -> str:
        options = TranscriptionOptions(fast=fast)
        whole = engine.prepare(SAMPLES / name, options, lambda _: None, lambda *_: None).whole
        segments = batched.transcribe(
            engine.model.whisper, company, whole.windows, whole.stretches, options, Heard(0, 0)
        )
        return "".join(segment.text for segment in segments).strip()

    with ThreadPoolExecutor(7) as pool:
        first = pool.submit(text, FOX.name, False)
        wait_until(lambda: company._turn == 1, 30, "the call that the others wait behind")
        others = [pool.submit(text, name, True) for name in FRAMES]
        others.append(pool.submit(text, FOX.name, False))
        wait_until(lambda: len(company._lines) == 7, 30, "all others wait")
        go.set()
        texts = [future.result(60) for future in others]
    assert first.result() == texts[-1] == TRUTH[FOX.name]["text"]
    assert texts[:-1] == [TRUTH[name]["text"] for name in FRAMES]
    assert sorted(calls) == [[1000] * 4, [1200], [FULL], [FULL]]
