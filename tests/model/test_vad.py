"""Speech is found where faster-whisper finds it: the same probabilities, to the last bit, and the
same stretches for any of them."""

from __future__ import annotations

import numpy as np
import pytest
from faster_whisper import vad as library
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.conftest import SAMPLES
from worker.engine import speech
from worker.engine.decode import Decoder
from worker.engine.vad import BLOCK, WINDOW, VoiceDetector

RATE = 16_000
LONG = BLOCK * WINDOW  # samples of a block


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    """A minute and a half of speech, with noise, a hum and silence in it."""
    decoder = Decoder()
    audio, _ = decoder.decode(SAMPLES / "long.ogg", max_seconds=600)
    decoder.close()
    draw = np.random.default_rng(1)
    audio = np.tile(audio, 1 + 90 * RATE // len(audio))[: 90 * RATE]
    audio[10 * RATE : 14 * RATE] += 0.05 * draw.standard_normal(4 * RATE).astype(np.float32)
    audio[20 * RATE : 25 * RATE] = 0
    hum = 0.2 * np.sin(np.arange(5 * RATE) * 2 * np.pi * 120 / RATE)
    audio[40 * RATE : 45 * RATE] = hum.astype(np.float32)
    return audio


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "length",
    [160, 511, 512, 513, 80_000, LONG - 512, LONG - 20, LONG, LONG + 30, 3 * LONG + 17, 90 * RATE],
)
def test_probabilities_are_those_of_faster_whisper(sound, length, threads):
    audio = sound[:length].copy()
    whole = np.pad(audio, (0, WINDOW - length % WINDOW))
    detector = VoiceDetector(threads)
    assert np.array_equal(detector.probabilities(audio), library.get_vad_model()(whole))
    assert np.array_equal(audio, sound[:length]), "the recording itself stays as it is"
    detector.close()


# What decides: runs of one level, as speech and pauses are, and single windows.
LEVELS = st.sampled_from([0.0, 0.1, 0.3499, 0.35, 0.36, 0.4999, 0.5, 0.51, 0.9, 1.0])
RUNS = st.lists(st.tuples(LEVELS, st.integers(1, 60)), min_size=1, max_size=25)
PROBABILITIES = RUNS.map(
    lambda runs: np.concatenate([np.full(length, level, np.float32) for level, length in runs])
) | arrays(np.float32, st.integers(1, 300), elements=st.floats(0, 1, width=32))
OPTIONS = st.fixed_dictionaries(
    {
        "threshold": st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.9]),
        "neg_threshold": st.sampled_from([None, 0.0, 0.2, 0.35, 0.8]),
        "min_speech_duration_ms": st.sampled_from([0, 32, 250, 1000]),
        "max_speech_duration_s": st.sampled_from([0.5, 1.0, 2.5, 30.0, float("inf")]),
        "min_silence_duration_ms": st.sampled_from([0, 50, 98, 160, 500, 2000]),
        "speech_pad_ms": st.sampled_from([0, 15, 30, 200, 400]),
    }
)


@given(PROBABILITIES, OPTIONS, st.integers(0, WINDOW - 1))
def test_stretches_are_those_of_faster_whisper(probabilities, options, rest):
    chosen = library.VadOptions(**options)
    length = len(probabilities) * WINDOW - rest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "get_vad_model", lambda: lambda _: probabilities)
        theirs = library.get_speech_timestamps(np.zeros(length, np.float32), chosen)
    spoken = speech.spoken(probabilities, chosen, length)
    assert speech.padded(spoken, chosen.speech_pad_ms, length) == theirs


def test_looking_for_speech_stops_when_the_transcription_is_cancelled(sound):
    """A recording of hours is looked through in blocks."""
    calls = []

    def checkpoint() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise InterruptedError

    detector = VoiceDetector(2)
    with pytest.raises(InterruptedError):
        detector.probabilities(sound, checkpoint)
    assert np.array_equal(
        detector.probabilities(sound[:WINDOW]), detector.probabilities(sound[:WINDOW])
    )
    detector.close()
