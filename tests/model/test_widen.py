"""The widened demo model has the shape of the real ones and says what the demo model says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faster_whisper import WhisperModel

from tests.conftest import SAMPLES
from tools.demo_model import widen
from worker.engine.model import DEMO_FOLDER

TRUTH = json.loads((SAMPLES / "transcripts.json").read_text())
NAMES = ["quick-brown-fox.wav", "de.wav", "fr.wav", "es.wav"]
# Millions of parameters, as the Hub counts them (huggingface.co/openai/whisper-tiny...).
PARAMETERS = {"tiny": 37.8, "base": 72.6, "small": 242, "medium": 764}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("widened")


def heard(model: WhisperModel, name: str) -> tuple[str, str, list[tuple[float, float]]]:
    segments, info = model.transcribe(str(SAMPLES / name), temperature=0)
    found = list(segments)
    times = [(segment.start, segment.end) for segment in found]
    return "".join(segment.text for segment in found).strip(), info.language, times


@pytest.mark.parametrize(
    ("shape", "compute_type"), [("tiny", "int8"), ("tiny", "float32"), ("base", "int8")]
)
def test_the_text_is_that_of_the_demo_model(folder, shape, compute_type):
    widen.widen(DEMO_FOLDER, folder / shape, shape)
    wide = WhisperModel(str(folder / shape), compute_type=compute_type)
    narrow = WhisperModel(str(DEMO_FOLDER), compute_type=compute_type)
    for name in NAMES:
        text, language, times = heard(wide, name)
        assert (text, language) == (TRUTH[name]["text"], TRUTH[name]["language"])
        expected = heard(narrow, name)[2]
        assert [t for pair in times for t in pair] == pytest.approx(
            [t for pair in expected for t in pair], abs=0.02
        )


def test_words_are_found_with_the_same_alignment_heads(folder):
    widen.widen(DEMO_FOLDER, folder / "tiny-words", "tiny")
    found = []
    for model in (folder / "tiny-words", DEMO_FOLDER):
        loaded = WhisperModel(str(model), compute_type="float32")
        segments, _ = loaded.transcribe(str(SAMPLES / NAMES[0]), word_timestamps=True)
        found.append([word for segment in segments for word in segment.words])
    assert [word.word for word in found[0]] == [word.word for word in found[1]]
    assert [word.start for word in found[0]] == pytest.approx([w.start for w in found[1]], abs=0.04)


@pytest.mark.parametrize("shape", PARAMETERS)
def test_the_shape_is_that_of_the_real_model(folder, shape):
    width, heads, layers = widen.SHAPES[shape]
    widen.widen(DEMO_FOLDER, folder / f"{shape}-shape", shape)
    made = widen.read(folder / f"{shape}-shape" / "model.bin").variables
    for side in ("encoder", "decoder"):
        assert made[f"{side}/num_heads"] == heads == width // 64
        last = f"{side}/layer_{layers - 1}/ffn/linear_0/weight"
        assert made[last].shape == (4 * width, width)
        assert f"{side}/layer_{layers}/ffn/linear_0/weight" not in made
    assert made["decoder/embeddings/weight"].shape == (51_865, width)
    total = sum(value.size for key, value in made.items() if not key.endswith("_scale"))
    assert total == pytest.approx(PARAMETERS[shape] * 1e6, rel=0.005)


def test_a_width_that_does_not_fit_is_one_sentence(tmp_path, folder, capsys, monkeypatch):
    widen.widen(DEMO_FOLDER, folder / "wide", "tiny")
    command = ["widen", "base", str(tmp_path / "out"), "--source", str(folder / "wide")]
    monkeypatch.setattr("sys.argv", command)
    assert widen.main() == 1
    assert "no multiple" in capsys.readouterr().err
