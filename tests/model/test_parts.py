"""Long recordings in parts: what comes out is what the whole would have given."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from shared.options import TranscriptionOptions
from shared.schemas import Transcript
from tests.conftest import SAMPLES
from tests.model.media import encode, samples_of
from worker.engine import speech
from worker.engine.engine import Engine
from worker.engine.parts import Part, cut, join

SPOKEN = ["quick-brown-fox.wav", "two-sentences.wav", "de.wav", "fr.wav"]


def recording(folder: Path, repeats: int = 6) -> Path:
    pause = np.zeros(12_000, np.int16)
    turn = [piece for name in SPOKEN for piece in (samples_of(SAMPLES / name), pause)]
    return encode(folder / "long.wav", np.tile(np.concatenate(turn), repeats))


def in_parts(engine: Engine, path: Path, options: TranscriptionOptions) -> Transcript:
    """As workers do it: each part through its file, in any order."""
    prepared = engine.prepare(path, options, lambda _: None, lambda *_: None)
    planned = engine.plan(prepared, options)
    assert planned
    plan, parts = planned
    files = [part.pack() for part in parts]
    results = {
        number: engine.hear_part(
            Part.unpack(files[number]), plan, options, lambda _: None, lambda *_: None
        )
        for number in reversed(range(len(files)))
    }
    ordered = [results[number] for number in range(len(files))]
    return join(plan, ordered, options, engine.model.name)


@pytest.mark.parametrize("words", [False, True], ids=["segments", "words"])
def test_the_parts_joined_are_the_whole(engine, tmp_path, monkeypatch, words):
    """Text, segments, language, figures and (within 20 ms) times."""
    monkeypatch.setattr(engine, "_part_seconds", 40)
    path, options = recording(tmp_path), TranscriptionOptions(word_timestamps=words, temperature=0)
    whole = engine.transcribe(path, options, lambda _: None, lambda *_: None)
    joined = in_parts(engine, path, options)
    assert len(whole.segments) > 20
    assert joined.text == whole.text
    for one, other in zip(joined.segments, whole.segments, strict=True):
        figures = {"id", "seek", "text", "tokens", "avg_logprob", "warnings"}
        assert one.model_dump(include=figures) == other.model_dump(include=figures)
        assert one.start == pytest.approx(other.start, abs=0.02)
        assert one.end == pytest.approx(other.end, abs=0.02)
        for word, same in zip(one.words or [], other.words or [], strict=True):
            assert word.word == same.word
            assert word.start == pytest.approx(same.start, abs=0.02)
    same = {"language", "language_probability", "duration", "duration_after_vad", "warnings"}
    assert joined.model_dump(include=same) == whole.model_dump(include=same)


def test_only_long_recordings_in_batched_mode_are_split(engine, tmp_path, monkeypatch):
    path = recording(tmp_path)

    def parts(seconds: float, **options) -> int:
        monkeypatch.setattr(engine, "_part_seconds", seconds)
        chosen = TranscriptionOptions(**options)
        prepared = engine.prepare(path, chosen, lambda _: None, lambda *_: None)
        planned = engine.plan(prepared, chosen)
        return len(planned[1]) if planned else 1

    whole = engine.prepare(path, TranscriptionOptions(), lambda _: None, lambda *_: None)
    seconds = whole.heard.duration_after_vad
    assert parts(seconds / 1.9) == 1
    assert parts(seconds / 2.1) > 2
    assert parts(30, mode="sequential") == 1
    assert parts(30, vad_filter=False) == 1


@pytest.mark.parametrize(("workers", "most"), [(2, 1.1), (3, 1.25), (4, 1.25)])
@pytest.mark.parametrize("minutes", [20, 30, 37, 120])
def test_workers_that_share_a_recording_end_together(workers, most, minutes):
    """Each takes the next part when it has done one: nobody waits for long at the end."""
    silence = np.zeros(0, np.float32)
    windows = [speech.Window(silence, 25.0 * n, 25.0, []) for n in range(minutes * 60 // 25)]
    ends = [0.0] * workers
    for part in cut(windows, [], 300):
        ends[ends.index(min(ends))] += part.seconds
    assert max(ends) <= most * sum(ends) / workers


def test_parts_hold_every_window_once(engine, tmp_path):
    prepared = engine.prepare(
        recording(tmp_path), TranscriptionOptions(), lambda _: None, lambda *_: None
    )
    whole = prepared.whole
    parts = cut(whole.windows, whole.stretches, 45)
    assert sum(len(part.windows) for part in parts) == len(whole.windows)
    back = cut(whole.windows, whole.stretches, 45, looks_back=True)
    assert [part.seconds for part in back] == pytest.approx([part.seconds for part in parts])
    assert sum(len(part.windows) for part in back) == len(whole.windows) + len(parts) - 1
    for part in parts + back:
        again = Part.unpack(part.pack())
        assert (again.stretches, again.looks_back) == (part.stretches, part.looks_back)
        for one, other in zip(again.windows, part.windows, strict=True):
            assert np.array_equal(one.audio, other.audio)
            assert (one.offset, one.duration) == pytest.approx((other.offset, other.duration))


def test_a_damaged_part_is_known_as_such(engine, tmp_path):
    prepared = engine.prepare(
        recording(tmp_path, 1), TranscriptionOptions(), lambda _: None, lambda *_: None
    )
    content = prepared.whole.pack()
    other = io.BytesIO()
    np.savez(other, sound=np.zeros(1))
    for broken in (b"", content[:1000], b"x" * 1000, other.getvalue()):
        with pytest.raises(ValueError, match="no part"):
            Part.unpack(broken)
