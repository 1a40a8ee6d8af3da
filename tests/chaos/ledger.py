"""What was sent and what came back, kept by the senders themselves, and never taken from the
service: every job that was accepted must come to its known end."""

from __future__ import annotations

import io
import json
import random
import threading
import time
import wave
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, Self

import av
import httpx2

from tests.conftest import SAMPLES

TRUTH = json.loads((SAMPLES / "transcripts.json").read_text())
ENDS = {"completed", "failed", "cancelled"}
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Source:
    """A recording with a known text. Sent again and again, each time in other bytes."""

    name: str
    wav: bytes
    truth: str
    language: str

    def fields(self, *, vad_filter: bool) -> dict[str, str]:
        return {
            "language": self.language,
            "temperature": "0",
            "vad_filter": str(vad_filter).lower(),
        }

    def is_truth(self, text: str) -> bool:
        """Nine words of ten, because the model mishears some in a long recording."""
        heard, spoken = text.split(), self.truth.split()
        return SequenceMatcher(None, heard, spoken, autojunk=False).ratio() >= 0.9


def clips() -> list[Source]:
    return [
        Source(name, (SAMPLES / name).read_bytes(), TRUTH[name]["text"], TRUTH[name]["language"])
        for name in ("quick-brown-fox.wav", "two-sentences.wav", "de.wav", "fr.wav", "es.wav")
    ]


def recording(name: str = "long.ogg", times: int = 1) -> Source:
    """The long sample as WAV, so many times over: there is time to break something meanwhile."""
    with av.open(str(SAMPLES / name)) as container:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=16_000)
        frames = [*container.decode(audio=0), None]
        pcm = b"".join(
            bytes(ready.planes[0])[: ready.samples * 2]
            for frame in frames
            for ready in resampler.resample(frame)
        )
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(pcm * times)
    text = " ".join([TRUTH[name]["text"]] * times)
    return Source(f"{name} x {times}", written.getvalue(), text, TRUTH[name]["language"])


@dataclass(eq=False)
class Job:
    """One upload, as its sender knows it. Times are time.monotonic()."""

    source: Source
    vad_filter: bool
    content: bytes
    number: int = 0
    is_poison: bool = False  # it is meant to fail with worker_lost
    sent_at: float = field(default_factory=time.monotonic)
    job_id: str = ""
    accepted_at: float = 0.0
    refused: str = ""  # why it was not accepted; the sender may not know whether it was
    ended_at: float = 0.0
    end: str = ""  # right | wrong | failed
    words: str = ""  # what came back where it is not right
    told: list[tuple[str, str]] = field(default_factory=list)  # its webhook: job id, type of event

    @property
    def is_open(self) -> bool:
        return bool(self.accepted_at) and not self.ended_at

    @property
    def is_told(self) -> bool:
        """Of the end that it came to."""
        kind = "failed" if self.is_poison else "completed"
        return (self.job_id, f"transcription.{kind}") in self.told


class Ledger:
    """Every job of a run. Users add to it from their threads."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.calm: dict[tuple[str, bool], str] = {}  # the texts while nothing is broken
        self.tell: Callable[[Job], str] | None = None  # where a job's end is to be told
        self._lock = threading.Lock()

    def begin(self, source: Source, *, vad_filter: bool, is_poison: bool = False) -> Job:
        with self._lock:
            number = len(self.jobs)
            content = source.wav + b"note\x04\x00\x00\x00" + number.to_bytes(4, "little")
            job = Job(source, vad_filter, content, number, is_poison)
            self.jobs.append(job)
        return job

    def open_jobs(self) -> list[Job]:
        return [job for job in list(self.jobs) if job.is_open]

    def untold(self) -> list[Job]:
        """Jobs that have ended right, and their webhooks know nothing of it."""
        return [job for job in list(self.jobs) if job.end == "right" and not job.is_told]

    def learn(self, user: User, sources: Iterable[Source]) -> None:
        """The text of every recording while nothing is broken: it is the known one, or near enough
        in a long one. From then on each answer must equal it."""
        for source in sources:
            for vad_filter in (True, False):
                job = self.begin(source, vad_filter=vad_filter)
                assert user.send(job), job.refused
                text = user.follow(job)
                assert job.end == "right", f"{source.name}: {job.words!r}, not {source.truth!r}"
                self.calm[source.name, vad_filter] = text
        user.close()

    def judge(self, job: Job, status: Mapping[str, Any], text: str) -> str:
        """right | wrong | failed"""
        if status["status"] != "completed":
            code = (status.get("error") or {}).get("code")
            job.words = f"{status['status']} {code}"
            return "right" if job.is_poison and code == "worker_lost" else "failed"
        known = self.calm.get((job.source.name, job.vad_filter))
        is_right = text == known if known is not None else job.source.is_truth(text)
        job.words = "" if is_right else text
        return "right" if is_right and not job.is_poison else "wrong"


class User:
    """Sends one upload and follows it to its end, whatever happens to the service meanwhile."""

    def __init__(self, ledger: Ledger, url: Callable[[], str], gone: threading.Event | None = None):
        """`url`: where to send to, asked for each connection. `gone`: no more following."""
        self.ledger = ledger
        self._url = url
        self._gone = gone or threading.Event()
        self._http = self._connected()

    def _connected(self) -> httpx2.Client:
        return httpx2.Client(base_url=self._url(), timeout=15, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def send(self, job: Job) -> bool:
        """False: it was not accepted, or the answer got lost."""
        fields = job.source.fields(vad_filter=job.vad_filter)
        if self.ledger.tell:
            fields["webhook_url"] = self.ledger.tell(job)
        try:
            answer = self._http.post(
                "/transcribe", files={"file": ("a.wav", job.content)}, data=fields
            )
            body = answer.json()
        except (httpx2.TransportError, ValueError) as exc:
            job.refused = type(exc).__name__
            self._renew()
            return False
        if answer.status_code != 202:
            job.refused = f"{answer.status_code} {body.get('code')}"
            return False
        job.job_id = body["job_id"]
        job.accepted_at = time.monotonic()
        job.content = b""
        return True

    def follow(self, job: Job) -> str:
        """The text, where there is one."""
        while not self._gone.is_set():
            if (status := self._read(f"/status/{job.job_id}")) and status.get("status") in ENDS:
                text = ""
                if status["status"] == "completed":
                    result = self._read(f"/result/{job.job_id}")
                    if result is None or "text" not in result:
                        continue  # asked again: Redis may have lost that it is completed
                    text = result["text"]
                job.end = self.ledger.judge(job, status, text)
                job.ended_at = time.monotonic()
                return text
            self._gone.wait(POLL_SECONDS)
        return ""

    def _read(self, path: str) -> dict[str, Any] | None:
        """None: no answer, or an error that may pass."""
        try:
            answer = self._http.get(path)
            return dict(answer.json()) if answer.status_code == 200 else None
        except (httpx2.TransportError, ValueError):
            self._renew()
            return None

    def _renew(self) -> None:
        self._http.close()
        self._http = self._connected()


class Crowd:
    """A context manager: users who send one recording after another, each in its own thread with
    its own share of the seed. `pause`: the longest between two uploads of one user."""

    def __init__(
        self,
        ledger: Ledger,
        url: Callable[[], str],
        seed: int,
        *,
        users: list[list[Source]],
        pause: float,
    ):
        self.ledger = ledger
        self._url = url
        self._seed = seed
        self._users = users
        self._pause = pause
        self._stopping, self._gone = threading.Event(), threading.Event()

    def __enter__(self) -> Self:
        self._threads = [
            threading.Thread(target=self._use, args=(number, sources), name=f"user-{number}")
            for number, sources in enumerate(self._users)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._gone.set()  # what is still open is lost
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """No more uploads. Who waits for a job goes on waiting."""
        self._stopping.set()

    def _use(self, number: int, sources: list[Source]) -> None:
        chance = random.Random(f"{self._seed} user {number}")
        user = User(self.ledger, self._url, self._gone)
        while not self._stopping.is_set():
            source, vad_filter = chance.choice(sources), chance.random() < 0.7
            job = self.ledger.begin(source, vad_filter=vad_filter)
            if user.send(job):
                user.follow(job)
            self._stopping.wait(chance.uniform(0, self._pause) if job.accepted_at else 0.5)
        user.close()
