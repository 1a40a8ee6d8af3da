"""Signals of quality: what is doubtful is said, and silence gives no words."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from shared.options import TranscriptionOptions
from shared.schemas import Segment, Transcript
from tests.conftest import FOX, SAMPLES
from tests.model.media import encode, samples_of
from worker.engine import quality
from worker.engine.decode import SAMPLE_RATE
from worker.engine.engine import Engine
from worker.engine.quality import judged, warnings_of

FULL_SCALE = 32767


def heard(engine: Engine, path: Path, **options) -> Transcript:
    chosen = TranscriptionOptions(**options)
    return engine.transcribe(path, chosen, lambda _: None, lambda *_: None)


def codes(transcript: Transcript) -> list[str]:
    return [warning.code for warning in transcript.warnings]


def noise(seconds: float, decibels: float) -> np.ndarray:
    """White, so far below full scale."""
    draw = np.random.default_rng(1).standard_normal(int(seconds * SAMPLE_RATE))
    return (draw * FULL_SCALE * 10 ** (decibels / 20)).astype(np.int16)


def hum(seconds: float, hertz: float, level: float) -> np.ndarray:
    """Of the mains, with its overtones."""
    clock = 2 * np.pi * hertz * np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    sound = np.sin(clock) + np.sin(2 * clock) / 2 + np.sin(3 * clock) / 4
    return (sound * level * FULL_SCALE / 1.75).astype(np.int16)


SILENCES = {
    "nothing": np.zeros(5 * SAMPLE_RATE, np.int16),
    "nothing for a minute": np.zeros(60 * SAMPLE_RATE, np.int16),
    "a moment of nothing": np.zeros(SAMPLE_RATE // 10, np.int16),
    "low noise": noise(5, -60),
    "noise": noise(5, -40),
    "noise for longer than a window": noise(40, -50),
    "hum of 50 Hz": hum(5, 50, 0.1),
    "loud hum of 60 Hz": hum(40, 60, 0.3),
    "hum of 120 Hz": hum(5, 120, 0.1),
}


@pytest.mark.parametrize("vad_filter", [True, False], ids=["vad", "no-vad"])
@pytest.mark.parametrize("mode", ["batched", "sequential"])
@pytest.mark.parametrize("name", SILENCES)
def test_silence_gives_no_text_and_says_so(engine, tmp_path, name, mode, vad_filter):
    """The bundled model invents nothing, with and without the VAD filter."""
    path = encode(tmp_path / "a.wav", SILENCES[name])
    result = heard(engine, path, mode=mode, vad_filter=vad_filter)
    assert (result.text, result.segments, codes(result)) == ("", [], ["no_speech"])


@pytest.mark.parametrize("mode", ["batched", "sequential"])
@pytest.mark.parametrize("name", [n for n in SILENCES if "120" not in n])
def test_with_the_vad_filter_no_model_hears_silence(engine, tmp_path, monkeypatch, name, mode):
    """So no other model can invent anything there, either."""
    path = encode(tmp_path / "a.wav", SILENCES[name])
    assert heard(engine, path, mode=mode).duration_after_vad == 0


@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_a_sentence_said_again_and_again_is_possibly_a_loop(engine, tmp_path, mode):
    """Nobody can know that somebody did say it eight times."""
    turn = np.concatenate([samples_of(FOX), np.zeros(3000, np.int16)])
    result = heard(engine, encode(tmp_path / "a.wav", np.tile(turn, 8)), mode=mode, language="en")
    assert result.text.count("quick brown fox") == 8
    assert codes(result) == ["possible_repetition"]
    assert [segment.warnings for segment in result.segments] == [["possible_repetition"]] * 8


@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_speech_that_is_not_understood_is_possibly_made_up(engine, tmp_path, mode):
    """Twice as fast, at twice the pitch."""
    path = encode(tmp_path / "a.wav", samples_of(FOX)[::2].copy())
    result = heard(engine, path, mode=mode, temperature=0)
    assert result.text
    assert result.segments[0].avg_logprob < -1
    assert codes(result) == ["possible_hallucination"]
    assert result.segments[0].warnings == ["possible_hallucination"]


@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_a_language_that_is_hardly_recognised_is_named(engine, tmp_path, mode):
    """Spanish, played too fast."""
    sound = samples_of(SAMPLES / "es.wav")
    places = np.arange(0, len(sound) - 1, 1.7)
    hurried = np.interp(places, np.arange(len(sound)), sound).astype(np.int16)
    path = encode(tmp_path / "a.wav", hurried)
    result = heard(engine, path, mode=mode, temperature=0, vad_filter=False)
    assert result.text
    assert result.language_probability < 0.5
    assert "low_language_confidence" in codes(result)
    given = heard(engine, path, mode=mode, temperature=0, vad_filter=False, language="es")
    assert "low_language_confidence" not in codes(given)


@pytest.mark.parametrize("name", ["quick-brown-fox.wav", "two-sentences.wav", "de.wav", "long.ogg"])
@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_plain_speech_raises_no_doubt(engine, name, mode):
    result = heard(engine, SAMPLES / name, mode=mode)
    assert codes(result) == []
    assert all(segment.warnings == [] for segment in result.segments)


def test_tokens_and_seek_are_those_of_the_library(engine):
    """What a client of OpenAI's verbose_json reads."""
    ours = heard(engine, SAMPLES / "long.ogg", language="en", temperature=0, mode="sequential")
    theirs, _ = engine.model.whisper.transcribe(
        str(SAMPLES / "long.ogg"), vad_filter=True, language="en", temperature=[0]
    )
    assert [(s.seek, s.tokens) for s in ours.segments] == [(s.seek, s.tokens) for s in theirs]
    batched = heard(engine, SAMPLES / "long.ogg", language="en", temperature=0)
    tokenizer = engine.model.whisper.hf_tokenizer
    end = tokenizer.token_to_id("<|endoftext|>")  # special tokens and times are above it
    for told in batched.segments:
        assert tokenizer.decode([token for token in told.tokens if token < end]) == told.text
    assert len({s.seek for s in batched.segments}) > 1


# --- Figures that no sample has -------------------------------------------------------------------


def segment(number: int = 0, text: str = " hello", **figures) -> Segment:
    good = {"avg_logprob": -0.2, "compression_ratio": 1.0, "no_speech_prob": 0.1}
    figures = {"seek": 100 * number, **good, **figures}
    return Segment(id=number, start=number, end=number + 1, text=text, temperature=0, **figures)


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({}, []),
        ({"compression_ratio": 2.4}, []),
        ({"compression_ratio": 2.41}, ["possible_repetition"]),
        ({"avg_logprob": -1.0}, []),
        ({"avg_logprob": -1.01}, ["possible_hallucination"]),
        ({"no_speech_prob": 0.6}, []),
        ({"no_speech_prob": 0.61}, ["possible_hallucination"]),
        (
            {"compression_ratio": 3.0, "no_speech_prob": 0.9},
            ["possible_repetition", "possible_hallucination"],
        ),
    ],
    ids=str,
)
def test_a_segment_is_doubtful_beyond_whispers_own_thresholds(figures, expected):
    (told,) = judged([segment(**figures)])
    assert told.warnings == expected
    found = warnings_of([told], 1.0, is_partial=False)
    assert [warning.code for warning in found] == expected


def test_the_same_text_four_times_in_a_row_is_repetition():
    """In windows of their own, and however it is punctuated; three times it can be meant."""
    said = [" Thank you.", " Yes.", " yes", " Yes!", " YES.", " Thank you.", " No.", " No.", " No."]
    told = judged([segment(n, text) for n, text in enumerate(said)])
    assert [s.id for s in told if s.warnings == ["possible_repetition"]] == [1, 2, 3, 4]
    marks = judged([segment(n, " ...") for n in range(4)])
    assert all(s.warnings == ["possible_repetition"] for s in marks)
    bells = judged([segment(n, text) for n, text in enumerate([" ...", " ?", " ...", " ?"])])
    assert not any(s.warnings for s in bells)


def test_a_loop_in_one_window_is_seen_in_segments_that_look_well_alone():
    """faster-whisper's batched mode compresses each segment by itself."""
    loop = [segment(n, f" and then we went to the {'ab'[n % 2]}", seek=0) for n in range(12)]
    assert all("possible_repetition" in s.warnings for s in judged(loop))
    apart = [segment(n, s.text) for n, s in enumerate(loop)]
    assert not any(s.warnings for s in judged(apart))


@pytest.mark.parametrize(
    ("probability", "said", "expected"),
    [
        (0.49, [segment()], ["low_language_confidence"]),
        (0.5, [segment()], []),
        (1.0, [segment()], []),
        (0.2, [], ["no_speech"]),
    ],
)
def test_a_language_that_was_guessed_is_said_to_be(probability, said, expected):
    """But not that of silence, which is nobody's."""
    found = warnings_of(said, probability, is_partial=False)
    assert [warning.code for warning in found] == expected


def test_judging_is_quick():
    """A recording of four hours."""
    words = json.loads((SAMPLES / "transcripts.json").read_text())["long.ogg"]["text"].split()
    said = [
        segment(n, " " + " ".join(words[n % 50 :][:12]), seek=n // 5 * 3000) for n in range(3000)
    ]
    began = time.process_time()
    judged(said)
    assert time.process_time() - began < 1


def test_every_warning_has_a_message():
    assert all(text.endswith(".") for text in quality.MESSAGES.values())
