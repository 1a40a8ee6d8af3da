"""A model that is stored in floats loads from a copy in int8, and computes the very same."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import ctranslate2
import numpy as np
import pytest
from faster_whisper import WhisperModel
from faster_whisper.audio import decode_audio
from faster_whisper.feature_extractor import FeatureExtractor

from shared.errors import ModelUnavailable
from shared.settings import Settings
from tests.conftest import FOX, FOX_WORDS, ROOT, SAMPLES
from tools.demo_model import widen
from worker.engine import model, quantised
from worker.engine.model import DEMO_FOLDER

PROMPT = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
TYPES = ["int8", "int8_float32", "auto"]


def stored(folder: Path, changed: widen.Model) -> Path:
    folder.mkdir()
    for file in DEMO_FOLDER.glob("*.json"):
        shutil.copy(file, folder)
    widen.write(changed, folder / "model.bin")
    return folder


@pytest.fixture(scope="module")
def demo_in() -> Callable[[str], widen.Model]:
    demo = widen.read(DEMO_FOLDER / "model.bin")
    return lambda kind: widen.stored_in(demo, kind)


@pytest.fixture(scope="module", params=["float16", "float32"])
def published(request, tmp_path_factory, demo_in) -> Path:
    """The demo model as models are published."""
    return stored(tmp_path_factory.mktemp("published") / request.param, demo_in(request.param))


@pytest.fixture(scope="module", params=["float16", "float32"])
def rough(request, tmp_path_factory, demo_in) -> Path:
    """Weights that were no multiples of a step, as those of published models are not. Among the
    words one whose weights are half way between two steps, and one that has only zeros."""
    chance = np.random.default_rng(1)
    made = demo_in(request.param)
    weights = {
        key: (value * chance.uniform(0.97, 1.03, value.shape)).astype(value.dtype)
        for key, value in made.variables.items()
        if key.endswith("weight")
    }
    words = weights["decoder/embeddings/weight"]
    words[100] = np.concatenate([[127], np.arange(127) - 63.5]) / 1024
    words[101] = 0
    folder = tmp_path_factory.mktemp("rough") / request.param
    return stored(folder, replace(made, variables=made.variables | weights))


def settings_of(folder: Path, data_dir: Path, **changed: object) -> Settings:
    given = {"compute_type": "int8", "device": "cpu", "min_free_disk_mb": 1, **changed}
    return Settings(_env_file=None, model_size=str(folder), data_dir=data_dir, **given)


def copy_of(folder: Path, data_dir: Path, **changed: object) -> Path | None:
    return quantised.copy_of(folder, settings_of(folder, data_dir, **changed), "cpu")


def numbers(folder: Path, compute_type: str) -> Iterator[bytes]:
    """All that the model computes of the fox: what the encoder gives, what every word of the
    vocabulary gets at each step, the score."""
    whisper = ctranslate2.models.Whisper(str(folder), compute_type=compute_type, intra_threads=2)
    mel = FeatureExtractor()(decode_audio(str(FOX)))[None]
    encoder = whisper.encode(
        ctranslate2.StorageView.from_array(np.ascontiguousarray(mel, dtype=np.float32))
    )
    best = whisper.generate(
        encoder, [PROMPT], beam_size=1, return_scores=True, return_logits_vocab=True
    )[0]
    yield np.array(encoder).tobytes()
    yield np.stack([np.array(step) for step in best.logits[0]]).tobytes()
    yield repr((whisper.compute_type, best.sequences_ids, best.scores)).encode()


def assert_the_same(folder: Path, copy: Path | None, compute_type: str) -> None:
    assert copy
    assert copy.stat().st_size < (folder / "model.bin").stat().st_size * 0.6
    with quantised.standing_in(copy, folder) as place:
        theirs, ours = numbers(folder, compute_type), numbers(place, compute_type)
        assert [hashlib.sha256(each).hexdigest() for each in theirs] == [
            hashlib.sha256(each).hexdigest() for each in ours
        ]


def actions(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log told of copies, and forgets it."""
    found = [record.action for record in caplog.records if hasattr(record, "action")]
    caplog.clear()
    return found


def heard(whisper: WhisperModel, name: str = FOX.name) -> list[object]:
    segments, _ = whisper.transcribe(str(SAMPLES / name), language="en", word_timestamps=True)
    return list(segments)  # with tokens, times, probabilities, average log probability


@pytest.mark.parametrize("compute_type", TYPES)
def test_a_copy_computes_what_its_model_does_bit_for_bit(rough, tmp_path, compute_type):
    """No number differs in its last bit, whatever the weights are."""
    copy = copy_of(rough, tmp_path, compute_type=compute_type)
    assert_the_same(rough, copy, compute_type)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 processors")
@pytest.mark.parametrize("processor", ["GENERIC", "AVX", "AVX2"])
def test_a_copy_is_right_for_every_processor(rough, tmp_path, processor):
    """Workers on several kinds of machines may share the data folder."""
    copy = copy_of(rough, tmp_path)
    code = (
        "from pathlib import Path; from tests.model.test_quantised import assert_the_same;"
        f"assert_the_same(Path({str(rough)!r}), Path({str(copy)!r}), 'int8')"
    )
    environment = {**os.environ, "CT2_FORCE_CPU_ISA": processor}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_the_first_load_makes_the_copy_and_later_ones_use_it(published, tmp_path, caplog):
    """The same segments, to the last digit, as without a copy."""
    caplog.set_level(logging.INFO)
    settings = settings_of(published, tmp_path)
    expected = heard(model.open_in(published, settings, replicas=1, threads=2))
    assert expected[0].text.strip() == FOX_WORDS

    first = model.load(settings, threads=2)
    assert actions(caplog) == ["model_copy_made"]
    assert heard(first.whisper) == expected
    copy = copy_of(published, tmp_path)
    made = copy.stat()

    second = model.load(settings, threads=2)
    assert actions(caplog) == []
    assert heard(second.whisper) == expected
    assert second.compute_type == first.compute_type == "int8_float32"
    assert (copy.stat().st_ino, copy.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def test_a_copy_is_loaded_instead_of_the_model(published, tmp_path):
    """Shown by a copy of another model in its place, that says something else."""
    copy = copy_of(published, tmp_path)
    other = widen.read(DEMO_FOLDER / "model.bin")
    name = "encoder/position_encodings/encodings"
    shifted = other.variables | {name: np.zeros_like(other.variables[name])}
    widen.write(replace(other, variables=shifted), copy)
    settings = settings_of(published, tmp_path)
    ours = heard(model.open_fastest(published, settings, replicas=1, threads=2))
    assert ours != heard(model.open_in(published, settings, replicas=1, threads=2))


@pytest.mark.parametrize(
    ("changed", "device"),
    [
        ({"compute_type": "default"}, "cpu"),
        ({"compute_type": "float32"}, "cpu"),
        ({"compute_type": "int16"}, "cpu"),
        ({"compute_type": "int8_float16"}, "cpu"),
        ({}, "cuda"),
    ],
    ids=str,
)
def test_nothing_is_made_where_it_would_not_be_loaded(published, tmp_path, changed, device):
    settings = settings_of(published, tmp_path, **changed)
    assert quantised.copy_of(published, settings, device) is None
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_stored_in_int8_needs_no_copy(tmp_path, caplog):
    assert copy_of(DEMO_FOLDER, tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert actions(caplog) == []


def test_a_model_that_was_replaced_gets_a_new_copy_and_the_old_one_goes(tmp_path, demo_in):
    """Also with the same name and size."""
    folder = stored(tmp_path / "model", demo_in("float16"))
    old = copy_of(folder, tmp_path)
    words = demo_in("float16").variables["decoder/embeddings/weight"][::-1]
    changed = demo_in("float16").variables | {"decoder/embeddings/weight": words}
    widen.write(replace(demo_in("float16"), variables=changed), folder / "model.bin")
    new = copy_of(folder, tmp_path)
    assert new != old
    assert list(new.parent.glob("*.bin")) == [new]
    assert_the_same(folder, new, "int8")


def test_a_file_of_the_hub_is_known_by_its_content(tmp_path, published):
    """Machines that fetched the same file at different times share a copy."""
    content = hashlib.sha256((published / "model.bin").read_bytes()).hexdigest()
    seen = []
    for machine, fetched_at in (("one", 1_000), ("two", 2_000)):
        blob = tmp_path / machine / "blobs" / content
        blob.parent.mkdir(parents=True)
        shutil.copy(published / "model.bin", blob)
        os.utime(blob, (fetched_at, fetched_at))
        snapshot = tmp_path / machine / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        (snapshot / "model.bin").symlink_to(Path("../../blobs") / content)
        settings = settings_of(Path("base"), tmp_path / "data")
        seen.append(quantised.copy_of(snapshot, settings, "cpu"))
    assert seen[0] == seen[1]
    assert seen[0].is_relative_to(tmp_path / "data" / "models" / "base")


@pytest.mark.parametrize(
    "changed", [{"data_dir": Path("/dev/null/data")}, {"min_free_disk_mb": 10**9}], ids=str
)
def test_where_no_copy_can_be_written_the_model_loads_all_the_same(
    published, tmp_path, caplog, changed
):
    """And the log says why."""
    settings = settings_of(published, tmp_path).model_copy(update=changed)
    loaded = model.load(settings, threads=2)
    assert actions(caplog) == ["model_copy_missing"]
    assert heard(loaded.whisper)[0].text.strip() == FOX_WORDS
    assert not list(tmp_path.rglob("*.*"))


def test_a_write_that_fails_half_way_leaves_nothing_behind(published, tmp_path, caplog):
    """As on a disk that others fill meanwhile: here no file may grow beyond 1 MB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        assert copy_of(published, tmp_path) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert actions(caplog) == ["model_copy_missing"]
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["lock"]


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda _: b"", lambda _: b"PK\3\4"])
def test_a_damaged_copy_is_passed_over_and_made_anew(published, tmp_path, caplog, damage):
    settings = settings_of(published, tmp_path)
    copy = copy_of(published, tmp_path)
    whole = copy.read_bytes()
    copy.write_bytes(damage(whole))
    loaded = model.load(settings, threads=2)
    assert actions(caplog) == ["model_copy_unreadable"]
    assert heard(loaded.whisper)[0].text.strip() == FOX_WORDS
    assert copy_of(published, tmp_path) == copy
    assert copy.read_bytes() == whole


def test_what_a_killed_worker_left_is_not_taken_for_a_copy(published, tmp_path):
    copy = copy_of(published, tmp_path)
    whole = copy.read_bytes()
    copy.unlink()
    copy.with_suffix(".part").write_bytes(whole[:1000])
    (copy.parent / "another.part").write_bytes(whole[:1000])
    assert copy_of(published, tmp_path) == copy
    assert copy.read_bytes() == whole
    assert {file.name for file in copy.parent.iterdir()} == {"lock", copy.name}


def test_a_model_whose_copy_is_being_made_loads_without_waiting(published, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    copy = copy_of(published, tmp_path)
    copy.unlink()
    actions(caplog)
    with (copy.parent / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert copy_of(published, tmp_path) is None
    assert actions(caplog) == ["model_copy_awaited"]
    assert copy_of(published, tmp_path) == copy


def test_workers_that_start_at_once_make_one_whole_copy(published, tmp_path):
    whole = copy_of(published, tmp_path / "alone").read_bytes()
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(4)
    workers = [
        context.Process(target=start_with, args=(together, published, tmp_path)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    copy = copy_of(published, tmp_path)
    assert copy.read_bytes() == whole
    assert {file.name for file in copy.parent.iterdir()} == {"lock", copy.name}


def start_with(together, folder: Path, data_dir: Path) -> None:
    settings = settings_of(folder, data_dir)
    together.wait(60)
    whisper = model.open_fastest(folder, settings, replicas=1, threads=1)
    assert heard(whisper)[0].text.strip() == FOX_WORDS


def test_a_copy_is_made_in_little_memory(tmp_path, demo_in):
    """However large the model is: a fraction of its largest matrix, 27 MB."""
    folder = stored(tmp_path / "model", demo_in("float32"))
    tracemalloc.start()
    copy = copy_of(folder, tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert copy
    assert most < 6_000_000


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e-38])
def test_weights_that_int8_can_not_hold_are_left_to_ctranslate2(tmp_path, demo_in, caplog, bad):
    made = demo_in("float32")
    words = made.variables["decoder/embeddings/weight"].copy()
    words[7] = 0
    words[7, 3] = bad
    changed = made.variables | {"decoder/embeddings/weight": words}
    folder = stored(tmp_path / "model", replace(made, variables=changed))
    assert copy_of(folder, tmp_path) is None
    assert actions(caplog) == ["model_copy_missing"]


def test_a_file_that_is_no_model_is_one_clear_sentence(tmp_path, caplog):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(DEMO_FOLDER / "config.json", folder)
    (folder / "model.bin").write_bytes(b"PK\3\4 something else")
    with pytest.raises(ModelUnavailable, match="does not load on cpu with COMPUTE_TYPE=int8"):
        model.load(settings_of(folder, tmp_path))
    assert actions(caplog) == ["model_copy_missing"]
