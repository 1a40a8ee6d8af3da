"""What the rows share: recordings, faster-whisper and the engine by themselves, the service."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from bench.pairs import Measured
from local.ports import free_port
from local.service import ROOT, Service, allocator
from tools.demo_model.widen import widen

CLIPS = ("quick-brown-fox", "de", "fr", "es")
RATE = 16_000


@dataclass(frozen=True)
class Row:
    name: str
    what: str  # the ratio in words
    goal: str
    is_met: Callable[[float], bool]
    measure: Callable[[Stage], Measured]


def sound(name: str) -> np.ndarray:
    with wave.open(str(ROOT / "samples" / f"{name}.wav")) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16)


def transcript(name: str) -> str:
    known = json.loads((ROOT / "samples" / "transcripts.json").read_text())
    return str(known[f"{name}.wav"]["text"])


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

    def __init__(self, module: str, model: Path, environment: Mapping[str, str] = {}):
        self._popen = subprocess.Popen(
            [sys.executable, "-m", module, str(model)],
            cwd=ROOT,
            env={**os.environ, **environment},
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
    """Programs start when a row first asks for them."""

    def __init__(self, folder: Path, shape: str, pairs: int):
        self.folder, self.pairs = folder, pairs
        self.cores = sorted(os.sched_getaffinity(0))
        self.model = self.model_of(shape)
        self._number = 0

    @cached_property
    def stock(self) -> Program:
        return Program("bench.stock", self.model)

    @cached_property
    def engine(self) -> Program:
        """With a worker's allocator, so that it is what the worker runs."""
        return Program("bench.engine", self.model, allocator())

    def close(self) -> None:
        for name in ("stock", "engine"):
            if name in self.__dict__:
                self.__dict__[name].close()

    def model_of(self, shape: str, kind: str = "int8") -> Path:
        """`kind`: the numbers that it is stored in."""
        folder = self.folder / f"{shape}-{kind}"
        if not folder.exists():
            widen(ROOT / "worker" / "demo_model", folder, shape, kind)
        return folder

    @contextmanager
    def service(self, **settings: str) -> Iterator[Client]:
        """As many slots as cores, a thread for each."""
        self._number += 1
        defaults = {
            "model_size": str(self.model),
            "compute_type": "int8",
            "cpu_threads": "1",
            "worker_slots": str(len(self.cores)),
            "max_audio_seconds": "20000",
            "max_file_size_mb": "1000",
        }
        folder = self.folder / f"service-{self._number}"
        with Service.in_folder(folder, {**defaults, **settings}) as service:
            service.wait_ready(120)
            yield Client(service)

    @contextmanager
    def peer(self, path: str) -> Iterator[Peer]:
        """A server of bench/peers.py."""
        port = free_port()
        command = [sys.executable, "-m", "bench.peers", path, str(self.model), str(port)]
        popen = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **allocator()})
        peer = Peer(popen.pid, f"http://127.0.0.1:{port}")
        try:
            peer.wait_ready()
            yield peer
        finally:
            popen.terminate()
            popen.wait(30)

    def clips(self, seconds: float, number: int) -> list[Path]:
        """Speech in four languages, in turns."""
        whole = {name: np.tile(sound(name), 12) for name in CLIPS} if seconds > 10 else None
        made = []
        for n in range(number):
            name = CLIPS[n % len(CLIPS)]
            samples = whole[name] if whole else sound(name)
            made.append(save(self.folder / f"{seconds}-{n}.wav", padded(samples, seconds)))
        return made

    def talk(self, seconds: float) -> Path:
        """A recording of any length: sentences in one language, a pause after each."""
        pause = np.zeros(RATE * 3 // 4, np.int16)
        turn = np.concatenate([sound("quick-brown-fox"), pause])
        samples = np.tile(turn, 1 + int(seconds * RATE) // len(turn))
        return save(self.folder / f"talk-{seconds}.wav", padded(samples, seconds))


class Peer:
    def __init__(self, pid: int, url: str):
        self._pid = pid
        self._http = httpx2.Client(base_url=url, timeout=600, trust_env=False)

    def pids(self) -> list[int]:
        return [self._pid]

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                self._http.get("/").raise_for_status()
                return
            except httpx2.TransportError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def transcribe(self, files: list[Path]) -> list[str]:
        """All at once, as users would."""
        with ThreadPoolExecutor(len(files)) as callers:
            return list(callers.map(self._text, files))

    def _text(self, file: Path) -> str:
        answer = self._http.post("/", files={"file": (file.name, file.read_bytes())})
        return str(answer.raise_for_status().json()["text"])


class Client:
    def __init__(self, service: Service):
        self.service = service
        self._http = httpx2.Client(base_url=service.base_url, timeout=60, trust_env=False)
        self._note = 0

    def pids(self) -> list[int]:
        """Redis, the API and all workers."""
        return [self.service.popen(name).pid for name in self.service.supervisor.processes]

    def transcribe(self, files: list[Path], **options: str) -> list[str]:
        """All at once, as users would; returns when the last one is done."""
        jobs = [self.submit(file, **options) for file in files]
        return [self.text(job) for job in jobs]

    def submit(self, file: Path, **options: str) -> str:
        """In other bytes each time (a note after the sound), or it would be a cache hit."""
        self._note += 1
        note = b"note\x04\x00\x00\x00" + self._note.to_bytes(4, "little")
        answer = self._http.post(
            "/transcribe", files={"file": (file.name, file.read_bytes() + note)}, data=options
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job_id"])

    def status(self, job: str, wait: float = 0) -> str:
        """`wait`: for its end, so many seconds at most."""
        return str(self._http.get(f"/status/{job}", params={"wait": wait}).json()["status"])

    def text(self, job: str) -> str:
        """Waits until there is one."""
        while self.status(job, wait=30) in {"queued", "processing"}:
            pass
        return str(self._http.get(f"/result/{job}").json()["text"])

    def cancel(self, job: str) -> None:
        """Returns when the worker is idle."""
        self._http.delete(f"/jobs/{job}").raise_for_status()
        url = self.service.worker_url_of("worker") + "/healthz"
        while httpx2.get(url, trust_env=False).json()["busy"]:
            time.sleep(0.1)

    def completed(self, worker: str) -> float:
        """How many transcriptions a worker has completed."""
        page = httpx2.get(self.service.worker_url_of(worker) + "/metrics", trust_env=False).text
        found = re.findall(r'^whisper_jobs_total{.*status="completed".*} (.+)$', page, re.MULTILINE)
        return sum(map(float, found))
