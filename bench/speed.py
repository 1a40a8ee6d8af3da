"""Rows about time on clips, and before the model runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np

from bench.pairs import Arm, Measured, Spent, compare, timed
from bench.stage import CLIPS, RATE, Stage, padded, save, sound, transcript
from local.service import ROOT, allocator


def against_the_engine(stage: Stage) -> Measured:
    """Jobs per second through HTTP, queue and worker, over the engine called with the same files
    by as many threads as the worker has slots."""
    files = stage.clips(5, 48)
    names = [str(file) for file in files]
    texts: dict[str, list[str]] = {}

    with stage.service() as client:

        def service() -> None:
            texts["service"] = client.transcribe(files)

        def engine() -> None:
            texts["engine"] = stage.engine.ask(do="transcribe", files=names, options={})

        measured = compare(
            timed("engine", engine, stage.engine.pids),
            timed("service", service, client.pids),
            stage.pairs,
        )
    assert texts["service"] == texts["engine"], "the texts differ"
    return measured


def against_the_library(stage: Stage, seconds: float, number: int, **options: str) -> Measured:
    """Jobs per second through HTTP, queue and worker, over WhisperModel.transcribe in a loop that
    has all cores. The text must be the same."""
    files = stage.clips(seconds, number)
    texts: dict[str, list[str]] = {}

    with stage.service() as client:

        def ours() -> None:
            texts["ours"] = client.transcribe(files, temperature="0", **options)

        def theirs() -> None:
            names = [str(file) for file in files]
            order = {"vad_filter": True, "temperature": [0.0]}
            texts["theirs"] = stage.stock.ask(do="transcribe", files=names, options=order)

        measured = compare(
            timed("faster-whisper", theirs, stage.stock.pids),
            timed("service", ours, client.pids),
            stage.pairs,
        )
    assert texts["ours"] == texts["theirs"], "the texts differ"
    if seconds < 10:  # each is one whole sample
        assert texts["ours"] == [transcript(CLIPS[n % len(CLIPS)]) for n in range(number)]
    return measured


def against_a_peer(stage: Stage, path: str, **options: str) -> Measured:
    """Clips that arrive at once. The text must be the same."""
    files = stage.clips(5, 8)
    texts: dict[str, list[str]] = {}

    with stage.service() as client, stage.peer(path) as peer:

        def ours() -> None:
            texts["ours"] = client.transcribe(files, **options)

        def theirs() -> None:
            texts["theirs"] = peer.transcribe(files)

        measured = compare(
            timed("its request path", theirs, peer.pids),
            timed("service", ours, client.pids),
            stage.pairs,
        )
    assert texts["ours"] == texts["theirs"], "the texts differ"
    return measured


def language_detection(stage: Stage) -> Measured:
    files = stage.clips(5, 4)[:1] * 8
    with stage.service() as client:
        return compare(
            timed("detected", lambda: client.transcribe(files), client.pids),
            timed("given", lambda: client.transcribe(files, language="en"), client.pids),
            stage.pairs,
        )


def worst_window(stage: Stage) -> Measured:
    """A window that fails its tests at every temperature, over one that passes at once."""
    files = stage.clips(5, 4)[:1] * 4
    never = {"log_prob_threshold": "0", "no_speech_threshold": "none", "language": "en"}
    with stage.service() as client:
        return compare(
            timed("worst", lambda: client.transcribe(files, **never), client.pids),
            timed("normal", lambda: client.transcribe(files, language="en"), client.pids),
            stage.pairs,
        )


def preprocessing(stage: Stage) -> Measured:
    """Decode, VAD, windows and spectrograms of an hour with 1,600 stretches of speech."""
    pause = np.zeros(RATE // 2, np.int16)
    turn = np.concatenate([padded(sound("quick-brown-fox"), 1.8), pause])
    hour = save(stage.folder / "hour.wav", np.tile(turn, 1 + 3600 * RATE // len(turn)))
    vad = {"min_silence_duration_ms": 200, "speech_pad_ms": 50}
    order = {"do": "prepare", "file": str(hour), "vad": vad}
    return compare(
        timed("faster-whisper", lambda: stage.stock.ask(**order), stage.stock.pids),
        timed("engine", lambda: stage.engine.ask(**order), stage.engine.pids),
        stage.pairs,
    )


def loading(stage: Stage) -> Measured:
    """What a worker does before a model's first run, over the same with the int8 copy that an
    earlier start made. Each in a process of its own; the file is in the page cache."""
    model = stage.model_of("base", "float16")
    command = [sys.executable, "-m", "bench.start", str(model), str(stage.folder / "copies")]

    def start(*options: str) -> Spent:
        done = subprocess.run(
            [*command, *options],
            cwd=ROOT,
            env={**os.environ, **allocator()},
            stdout=subprocess.PIPE,
            check=True,
        )
        spent = json.loads(done.stdout)
        return Spent(spent["seconds"], spent["cpu"])

    return compare(Arm("float16", lambda: start("--as-stored")), Arm("copy", start), stage.pairs)
