"""The engine on the bundled model: exact words, sane times, and the library's own text."""

from __future__ import annotations

import json

import ctranslate2
import numpy as np
import pytest

from shared.errors import ModelUnavailable
from shared.options import TranscriptionOptions
from shared.schemas import Transcript
from shared.settings import Settings
from tests.conftest import FOX, FOX_WORDS, SAMPLES
from tests.model.media import encode, samples_of
from worker.engine import model
from worker.engine.engine import Engine

TRUTH = json.loads((SAMPLES / "transcripts.json").read_text())
EXACT = ["quick-brown-fox.wav", "two-sentences.wav", "de.wav", "fr.wav", "es.wav"]


def transcribe(engine: Engine, path, checkpoint=lambda share: None, **options) -> Transcript:
    chosen = TranscriptionOptions(**options)
    return engine.transcribe(path, chosen, checkpoint, lambda stage, seconds: None)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("vad_filter", [True, False], ids=["vad", "no-vad"])
@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_the_samples_are_transcribed_word_by_word(engine, name, mode, vad_filter):
    """Real decode, real VAD, real CTranslate2; language detected."""
    result = transcribe(engine, SAMPLES / name, mode=mode, vad_filter=vad_filter)
    assert result.text == TRUTH[name]["text"]
    assert result.language == TRUTH[name]["language"]
    assert result.language_probability > 0.5
    assert result.warnings == []


@pytest.mark.parametrize("name", EXACT)
def test_segments_begin_when_the_speaker_does(engine, name):
    """Within 0.3 s of what espeak-ng spoke, in order, inside the recording."""
    result = transcribe(engine, SAMPLES / name)
    began = [segment["start"] for segment in TRUTH[name]["segments"]]
    assert min(abs(result.segments[0].start - start) for start in began) < 0.3
    edges = [edge for s in result.segments for edge in (s.start, s.end)]
    assert edges == sorted(edges)
    assert 0 <= edges[0] <= edges[-1] <= result.duration + 0.02


def test_words_have_times_when_asked(engine):
    """Each word once, in order, near where it was spoken."""
    result = transcribe(engine, FOX, word_timestamps=True)
    words = [word for segment in result.segments for word in segment.words]
    assert "".join(word.word for word in words).strip() == FOX_WORDS
    spoken = TRUTH[FOX.name]["words"]
    off = [abs(word.start - true["start"]) for word, true in zip(words, spoken, strict=True)]
    assert np.median(off) < 0.25
    assert all(0 <= word.probability <= 1 for word in words)
    assert transcribe(engine, FOX).segments[0].words is None


@pytest.mark.parametrize("name", ["silence.wav", "noise.wav"])
@pytest.mark.parametrize("mode", ["batched", "sequential"])
@pytest.mark.parametrize("options", [{}, {"vad_filter": False}, {"language": "en"}], ids=str)
def test_silence_and_noise_give_no_words(engine, name, options, mode):
    result = transcribe(engine, SAMPLES / name, mode=mode, **options)
    assert (result.text, result.segments) == ("", [])
    assert [warning.code for warning in result.warnings] == ["no_speech"]


@pytest.mark.parametrize("suffix", ["mp3", "m4a", "ogg", "webm", "flac", "mp4"])
def test_every_format_is_understood(engine, tmp_path, suffix):
    path = encode(tmp_path / f"fox.{suffix}", samples_of(FOX))
    assert transcribe(engine, path, language="en").text == FOX_WORDS


def test_progress_grows_to_one_and_a_checkpoint_can_stop_it(engine):
    seen: list[float] = []
    transcribe(engine, SAMPLES / "two-sentences.wav", checkpoint=seen.append)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] > 0.8

    class Stop(Exception):
        pass

    def stop(share: float) -> None:
        raise Stop

    with pytest.raises(Stop):
        transcribe(engine, FOX, checkpoint=stop)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("enormous", "There is no model named 'enormous'"),
        ("nobody-at-all/no-model", "can't be fetched from the Hub"),
        ("{folder}", "lacks model.bin"),
    ],
)
def test_a_model_that_can_not_be_had_is_one_clear_sentence(tmp_path, monkeypatch, name, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    settings = Settings(_env_file=None, model_size=name.format(folder=tmp_path))
    with pytest.raises(ModelUnavailable) as caught:
        model.load(settings)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.skipif(ctranslate2.get_cuda_device_count() > 0, reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_one_clear_sentence():
    settings = Settings(_env_file=None, model_size="demo", device="cuda")
    with pytest.raises(ModelUnavailable, match="does not load on cuda"):
        model.load(settings)


def test_the_bundled_model_is_small():
    total = sum(path.stat().st_size for path in model.DEMO_FOLDER.iterdir())
    assert total <= 16 * 1024 * 1024
