"""The rows of the table: what is compared with what, and the goal."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from bench.pairs import Arm, Measured, compare
from local.service import ROOT, Service

CLIPS = ("quick-brown-fox", "de", "fr", "es")
RATE = 16_000


@dataclass(frozen=True)
class Row:
    name: str
    what: str  # the ratio in words
    goal: str
    is_met: Callable[[float], bool]
    measure: Callable[[Stage], tuple[float, Measured]]


def sound(name: str) -> np.ndarray:
    with wave.open(str(ROOT / "samples" / f"{name}.wav")) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16)


def save(path: Path, samples: np.ndarray) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    return path


def padded(samples: np.ndarray, seconds: float) -> np.ndarray:
    """Exactly so long: cut, or with silence after it."""
    length = int(seconds * RATE)
    return np.concatenate([samples, np.zeros(length, np.int16)])[:length]


class Program:
    """A process that answers each line with a line: bench/stock.py, bench/engine.py."""

    def __init__(self, module: str, model: Path):
        self._popen = subprocess.Popen(
            [sys.executable, "-m", module, str(model)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **order: Any) -> Any:
        assert self._popen.stdin
        assert self._popen.stdout
        self._popen.stdin.write(json.dumps(order) + "\n")
        self._popen.stdin.flush()
        return json.loads(self._popen.stdout.readline())

    def pids(self) -> list[int]:
        return [self._popen.pid]

    def close(self) -> None:
        assert self._popen.stdin
        self._popen.stdin.close()
        self._popen.wait(30)


class Stage:
    """What all rows share: the recordings, faster-whisper by itself, and the service."""

    def __init__(self, folder: Path, model: Path, cores: int, pairs: int):
        self.folder, self.model, self.cores, self.pairs = folder, model, cores, pairs
        self._number = 0
        self.stock = Program("bench.stock", model)
        self.engine = Program("bench.engine", model)

    def close(self) -> None:
        self.stock.close()
        self.engine.close()

    @contextmanager
    def service(self, **settings: str) -> Iterator[Client]:
        """As many slots as cores, a thread for each."""
        self._number += 1
        defaults = {"model_size": str(self.model), "compute_type": "int8", "cpu_threads": "1"}
        slots = {"worker_slots": str(self.cores), "max_audio_seconds": "20000"}
        folder = self.folder / f"service-{self._number}"
        with Service.in_folder(folder, {**defaults, **slots, **settings}) as service:
            service.wait_ready(120)
            yield Client(service)

    def clips(self, seconds: float, number: int) -> list[Path]:
        """Speech in four languages."""
        whole = {name: np.tile(sound(name), 12) for name in CLIPS} if seconds > 10 else None
        made = []
        for n in range(number):
            name = CLIPS[n % len(CLIPS)]
            samples = whole[name] if whole else sound(name)
            made.append(save(self.folder / f"{seconds}-{n}.wav", padded(samples, seconds)))
        return made


class Client:
    def __init__(self, service: Service):
        self.service = service
        self._http = httpx2.Client(base_url=service.base_url, timeout=60, trust_env=False)
        self._note = 0

    def pids(self) -> list[int]:
        names = ("Redis", "API", "worker")
        return [self.service.popen(name).pid for name in names]

    def transcribe(self, files: list[Path], **options: str) -> list[str]:
        """All at once, as users would; returns when the last one is done."""
        jobs = [self._submit(file, options) for file in files]
        return [self._text(job) for job in jobs]

    def _submit(self, file: Path, options: dict[str, str]) -> str:
        """In other bytes each time (a note after the sound), or it would be a cache hit."""
        self._note += 1
        note = b"note\x04\x00\x00\x00" + self._note.to_bytes(4, "little")
        answer = self._http.post(
            "/transcribe", files={"file": (file.name, file.read_bytes() + note)}, data=options
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job_id"])

    def _text(self, job: str) -> str:
        while self._http.get(f"/status/{job}").json()["status"] in {"queued", "processing"}:
            time.sleep(0.02)
        return str(self._http.get(f"/result/{job}").json()["text"])


def against_the_library(stage: Stage, seconds: float, number: int) -> tuple[float, Measured]:
    """Jobs per second through HTTP, queue and worker, over WhisperModel.transcribe in a loop that
    has all cores. Sequential mode, whose text must be the same."""
    files = stage.clips(seconds, number)
    texts: dict[str, list[str]] = {}
    options = {"vad_filter": True, "temperature": [0.0]}

    with stage.service() as client:

        def ours() -> None:
            texts["ours"] = client.transcribe(files, mode="sequential", temperature="0")

        def theirs() -> None:
            names = [str(file) for file in files]
            texts["theirs"] = stage.stock.ask(do="transcribe", files=names, options=options)

        measured = compare(
            Arm("faster-whisper", theirs, stage.stock.pids),
            Arm("service", ours, client.pids),
            stage.pairs,
        )
    assert texts["ours"] == texts["theirs"], "the texts differ"
    return measured.wall_ratio, measured


def language_detection(stage: Stage) -> tuple[float, Measured]:
    files = stage.clips(5, 4)[:1] * 8
    with stage.service() as client:
        measured = compare(
            Arm("detected", lambda: ignore(client.transcribe(files)), client.pids),
            Arm("given", lambda: ignore(client.transcribe(files, language="en")), client.pids),
            stage.pairs,
        )
    return measured.wall_ratio, measured


def worst_window(stage: Stage) -> tuple[float, Measured]:
    """A window that fails its tests at every temperature, over one that passes at once."""
    files = stage.clips(5, 4)[:1] * 4
    never = {"log_prob_threshold": "0", "no_speech_threshold": "none", "language": "en"}
    with stage.service() as client:
        measured = compare(
            Arm("worst", lambda: ignore(client.transcribe(files, **never)), client.pids),
            Arm("normal", lambda: ignore(client.transcribe(files, language="en")), client.pids),
            stage.pairs,
        )
    return measured.wall_ratio, measured


def preprocessing(stage: Stage) -> tuple[float, Measured]:
    """Decode, VAD, windows and spectrograms of an hour with 1,600 stretches of speech."""
    pause = np.zeros(RATE // 2, np.int16)
    turn = np.concatenate([padded(sound("quick-brown-fox"), 1.8), pause])
    hour = save(stage.folder / "hour.wav", np.tile(turn, 1 + 3600 * RATE // len(turn)))
    vad = {"min_silence_duration_ms": 200, "speech_pad_ms": 50}
    order = {"do": "prepare", "file": str(hour), "vad": vad}
    measured = compare(
        Arm("faster-whisper", lambda: ignore(stage.stock.ask(**order)), stage.stock.pids),
        Arm("engine", lambda: ignore(stage.engine.ask(**order)), stage.engine.pids),
        stage.pairs,
    )
    return measured.wall_ratio, measured


def ignore(_: object) -> None:
    """An arm's result is not looked at."""


ROWS = (
    Row(
        "a2",
        "5 s clips: faster-whisper's time / the service's, language detected, same text",
        ">= 2.0",
        lambda ratio: ratio >= 2.0,
        lambda stage: against_the_library(stage, 5, 8),
    ),
    Row(
        "a2-30",
        "30 s clips: faster-whisper's time / the service's, VAD on, same text",
        ">= 1.4",
        lambda ratio: ratio >= 1.4,
        lambda stage: against_the_library(stage, 30, 4),
    ),
    Row(
        "m",
        "5 s clips: time with the language detected / given",
        "<= 1.1",
        lambda ratio: ratio <= 1.1,
        language_detection,
    ),
    Row(
        "o",
        "worst window / normal window",
        "<= 5",
        lambda ratio: ratio <= 5,
        worst_window,
    ),
    Row(
        "h1",
        "before the model runs, 1 h with 1,600 pauses: faster-whisper's time / the engine's",
        ">= 5",
        lambda ratio: ratio >= 5,
        preprocessing,
    ),
)
