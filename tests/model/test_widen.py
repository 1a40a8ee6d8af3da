"""The widened demo model has the shape of the real ones and says what the demo model says, with
the same scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import ctranslate2
import numpy as np
import pytest
from faster_whisper import WhisperModel
from faster_whisper.audio import decode_audio
from faster_whisper.feature_extractor import FeatureExtractor

from tests.conftest import FOX, FOX_WORDS, SAMPLES
from tools.demo_model import widen
from worker.engine.model import DEMO_FOLDER
from worker.engine.model_file import read_contents

TRUTH = json.loads((SAMPLES / "transcripts.json").read_text())
NAMES = [FOX.name, "de.wav", "fr.wav", "es.wav"]
# Width, heads, layers, parameters: huggingface.co/openai/whisper-tiny... (config, safetensors).
PUBLISHED = {
    "tiny": (384, 6, 4, 37_760_640),
    "base": (512, 8, 6, 72_593_920),
    "small": (768, 12, 12, 241_734_912),
    "medium": (1024, 16, 24, 763_857_920),
}
MELS, AUDIO_POSITIONS, TEXT_POSITIONS, VOCABULARY = 80, 1500, 448, 51_865
PROMPT = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]


class Near(NamedTuple):
    """How far sums may be apart that add up in another order: about ten times what was measured
    in float32, two to seven times in int8, which rounds to steps."""

    encoder: float
    logit: float
    score: float
    seconds: float  # one position of the encoder is 0.02


NEAR = {"float32": Near(1e-4, 2e-4, 1e-5, 0.021), "int8": Near(0.2, 1, 0.01, 0.041)}


class Said(NamedTuple):
    """What CTranslate2 makes of the fox."""

    encoder: np.ndarray  # positions, width
    tokens: list[str]
    score: float
    logits: np.ndarray  # tokens, vocabulary


class Heard(NamedTuple):
    """What faster-whisper makes of a recording."""

    text: str
    language: str
    score: float
    words: list[str]
    times: list[float]


@pytest.fixture(scope="module")
def demo() -> widen.Model:
    return widen.read(DEMO_FOLDER / "model.bin")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, demo) -> Iterator[Callable[[str, str], Path]]:
    """Makes each (shape, type of the source) once; the shape "demo" is the demo model itself."""
    root = tmp_path_factory.mktemp("widened")

    @cache
    def make(shape: str, source: str) -> Path:
        if shape != "demo":
            widen.widen(make("demo", source), root / f"{shape}-{source}", shape)
            return root / f"{shape}-{source}"
        if source == "int8":
            return DEMO_FOLDER
        folder = root / "demo-float32"
        folder.mkdir()
        for file in DEMO_FOLDER.glob("*.json"):
            shutil.copy(file, folder)
        widen.write(widen.stored_in(demo, "float32"), folder / "model.bin")
        return folder

    yield make
    said.cache_clear()
    loaded.cache_clear()
    shutil.rmtree(root)


@cache
def said(folder: Path, compute_type: str) -> Said:
    whisper = ctranslate2.models.Whisper(str(folder), compute_type=compute_type, intra_threads=2)
    mel = FeatureExtractor()(decode_audio(str(FOX)))[None]  # not padded to 30 s: that is slow
    encoder = whisper.encode(
        ctranslate2.StorageView.from_array(np.ascontiguousarray(mel, dtype=np.float32))
    )
    best = whisper.generate(
        encoder, [PROMPT], beam_size=1, return_scores=True, return_logits_vocab=True
    )[0]
    logits = np.stack([np.array(step) for step in best.logits[0]])
    return Said(np.array(encoder)[0], best.sequences[0], best.scores[0], logits)


@cache
def loaded(folder: Path, compute_type: str) -> WhisperModel:
    return WhisperModel(str(folder), compute_type=compute_type, cpu_threads=2)


@cache
def heard(folder: Path, compute_type: str, name: str) -> Heard:
    segments, info = loaded(folder, compute_type).transcribe(
        str(SAMPLES / name), temperature=0, word_timestamps=True
    )
    segment, *others = segments
    assert not others
    words = [word.word for word in segment.words]
    times = [time for word in segment.words for time in (word.start, word.end)]
    return Heard(segment.text.strip(), info.language, segment.avg_logprob, words, times)


@pytest.mark.parametrize(
    ("shape", "source", "compute_type"),
    [
        ("tiny", "int8", "float32"),
        ("tiny", "float32", "float32"),
        ("tiny", "int8", "int8"),
        ("base", "float32", "float32"),
        ("base", "int8", "int8"),
        ("small", "int8", "int8"),
    ],
)
def test_every_number_is_that_of_the_demo_model(folder_of, shape, source, compute_type):
    narrow = said(folder_of("demo", source), compute_type)
    wide = said(folder_of(shape, source), compute_type)
    near = NEAR[compute_type]
    copies = wide.encoder.reshape(len(narrow.encoder), -1, narrow.encoder.shape[1])
    assert np.abs(copies - narrow.encoder[:, None]).max() < near.encoder
    assert wide.tokens == narrow.tokens
    assert len(wide.tokens) == len(FOX_WORDS.split())
    assert np.abs(wide.logits - narrow.logits).max() < near.logit
    assert wide.score == pytest.approx(narrow.score, abs=near.score)


@pytest.mark.parametrize(
    ("shape", "compute_type", "name"),
    [
        *(("tiny", "int8", name) for name in NAMES),
        *(("tiny", "float32", name) for name in NAMES[:2]),
        *(("base", "int8", name) for name in NAMES[2:]),
    ],
)
def test_the_text_is_that_of_the_demo_model(folder_of, shape, compute_type, name):
    narrow = heard(DEMO_FOLDER, compute_type, name)
    wide = heard(folder_of(shape, "int8"), compute_type, name)
    near = NEAR[compute_type]
    assert (wide.text, wide.language) == (TRUTH[name]["text"], TRUTH[name]["language"])
    assert wide.score == pytest.approx(narrow.score, abs=near.score)
    assert wide.words == narrow.words
    assert wide.times == pytest.approx(narrow.times, abs=near.seconds)


@pytest.mark.parametrize("shape", PUBLISHED)
def test_the_shape_is_that_of_the_real_model(demo, shape):
    width, heads, layers, parameters = PUBLISHED[shape]
    made = widen.widened(demo, shape).variables
    found = {
        key: value.shape
        for key, value in made.items()
        if value.ndim and not key.endswith("weight_scale")
    }
    assert found == shapes_of_whisper(width, layers)
    assert made["encoder/num_heads"] == made["decoder/num_heads"] == heads
    matrices = {value.dtype.name for key, value in made.items() if key.endswith("/weight")}
    assert matrices == {"int8"}
    # Whisper's keys have no bias; CTranslate2 stores zeros in each of the three attentions.
    total = sum(int(np.prod(of)) for of in found.values())
    assert total - 3 * layers * width == parameters


def shapes_of_whisper(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Every variable of that model as CTranslate2 stores it."""
    linear = {"encoder/conv1": (width, MELS, 3), "encoder/conv2": (width, width, 3)}
    norms = ["encoder/layer_norm", "decoder/layer_norm"]
    for side in ("encoder", "decoder"):
        for at in (f"{side}/layer_{number}" for number in range(layers)):
            linear |= {
                f"{at}/self_attention/linear_0": (3 * width, width),
                f"{at}/self_attention/linear_1": (width, width),
                f"{at}/ffn/linear_0": (4 * width, width),
                f"{at}/ffn/linear_1": (width, 4 * width),
            }
            norms += [f"{at}/self_attention/layer_norm", f"{at}/ffn/layer_norm"]
            if side == "decoder":
                linear |= {
                    f"{at}/attention/linear_0": (width, width),
                    f"{at}/attention/linear_1": (2 * width, width),
                    f"{at}/attention/linear_2": (width, width),
                }
                norms.append(f"{at}/attention/layer_norm")
    return (
        {f"{name}/weight": shape for name, shape in linear.items()}
        | {f"{name}/bias": shape[:1] for name, shape in linear.items()}
        | {f"{name}/{part}": (width,) for name in norms for part in ("gamma", "beta")}
        | {
            "encoder/position_encodings/encodings": (AUDIO_POSITIONS, width),
            "decoder/position_encodings/encodings": (TEXT_POSITIONS, width),
            "decoder/embeddings/weight": (VOCABULARY, width),
        }
    )


def test_a_model_is_written_as_it_was_read(tmp_path, demo):
    widen.write(demo, tmp_path / "model.bin")
    assert (tmp_path / "model.bin").read_bytes() == (DEMO_FOLDER / "model.bin").read_bytes()


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["widen", *map(str, arguments)])
    return widen.main()


def test_the_command_writes_all_that_a_model_needs(tmp_path, monkeypatch):
    assert command(monkeypatch, "tiny", tmp_path / "new" / "tiny", "--source", DEMO_FOLDER) == 0
    made = {file.name for file in (tmp_path / "new" / "tiny").iterdir()}
    assert made == {file.name for file in DEMO_FOLDER.iterdir()} - {"README.md"}


def test_the_command_stores_in_floats_as_models_are_published(tmp_path, monkeypatch, demo):
    """Every float is a float16 then, none is int8; but such a model is not widened again."""
    assert command(monkeypatch, "tiny", tmp_path / "f16", "--stored", "float16") == 0
    with (tmp_path / "f16" / "model.bin").open("rb") as file:
        kinds = {v.name: v.kind for v in read_contents(file).variables if v.shape}
    assert set(kinds.values()) == {"float16"}
    wide = widen.widened(demo, "tiny").variables
    assert set(kinds) == {k for k, v in wide.items() if v.ndim and not k.endswith("_scale")}
    with pytest.raises(widen.NotWidenable, match="holds float16, not only int8 and float32"):
        widen.read(tmp_path / "f16" / "model.bin")


WHOLE = (DEMO_FOLDER / "model.bin").read_bytes()
FIRST = b"decoder/activation\0"  # then 0 dimensions, a type, a size


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "ends too early"),
        (WHOLE[:3], "ends too early"),
        (WHOLE[:5000], "ends too early"),
        (WHOLE[:-1], "ends too early"),
        (b"PK\3\4 a model of another kind", "has format 67324752, not 6"),
        (WHOLE.replace(b"WhisperSpec", b"Wav2VecSpec", 1), "holds Wav2VecSpec 3"),
        (WHOLE.replace(FIRST + b"\0\1", FIRST + b"\0\7", 1), "is of type 7"),
        (WHOLE.replace(FIRST + b"\0\1\1", FIRST + b"\0\1\2", 1), "another size than its shape"),
    ],
    ids=["empty", "3-bytes", "5000-bytes", "last-byte", "zip", "wav2vec", "type", "size"],
)
def test_a_cut_or_foreign_file_is_one_sentence(tmp_path, monkeypatch, capsys, content, sentence):
    (tmp_path / "model.bin").write_bytes(content)
    assert command(monkeypatch, "tiny", tmp_path / "out", "--source", tmp_path) == 1
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
    assert str(tmp_path / "model.bin") in told
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_one_sentence(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "tiny", tmp_path / "out", "--source", tmp_path) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_shape_is_told_the_known_ones(tmp_path, monkeypatch, capsys):
    with pytest.raises(widen.NotWidenable, match=r"no shape large; .*tiny, base, small, medium"):
        widen.widen(DEMO_FOLDER, tmp_path / "out", "large")
    with pytest.raises(SystemExit):
        command(monkeypatch, "large", tmp_path / "out")
    assert "choose from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_source_that_does_not_fit_is_refused(demo):
    tiny = widen.widened(demo, "tiny")
    with pytest.raises(widen.NotWidenable, match="512 is no multiple of the source's 384"):
        widen.widened(tiny, "base")
    half_heads = demo.variables | {"decoder/num_heads": np.array(4, dtype=np.int16)}
    with pytest.raises(widen.NotWidenable, match="decoder are no heads of 64"):
        widen.widened(replace(demo, variables=half_heads), "tiny")
    fifth = {key.replace("/layer_0/", "/layer_4/"): value for key, value in demo.variables.items()}
    with pytest.raises(widen.NotWidenable, match="encoder has 5 layers, the shape 4"):
        widen.widened(replace(demo, variables=demo.variables | fifth), "tiny")
