"""Rows about time on clips, and before the model runs."""

from __future__ import annotations

import numpy as np

from bench.pairs import Measured, compare, timed
from bench.stage import CLIPS, RATE, Stage, padded, save, sound, transcript


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
