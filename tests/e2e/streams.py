"""Clients that wait, and a worker that does what a test says."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self

import httpx2

from local.service import Service
from shared.broker import celery_app
from shared.jobs import Claim
from shared.schemas import Segment, Transcript
from tests.conftest import PLAIN, wait_until
from tests.e2e.conftest import Client, variant
from worker.store import WorkerStore

ENDS = {"completed", "failed", "cancelled"}


@dataclass(frozen=True)
class Event:
    id: str
    name: str
    data: dict[str, Any]


class Stream:
    """A context manager: an event stream, read by a thread as it comes."""

    def __init__(self, client: Client, job: str, after: str = "", **headers: str):
        given = {"Last-Event-ID": after, **headers} if after else headers
        url = f"{client.http.base_url}/jobs/{job}/events"
        self._http = httpx2.Client(timeout=60, **PLAIN)
        self._request = self._http.build_request("GET", url, headers=given)
        self.events: list[Event] = []
        self.heartbeats = 0
        self.is_over = False  # ended by the server, as it should
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self.answer = self._http.send(self._request, stream=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A socket that is closed while its thread reads is neither closed nor read to an end.
        one: socket.socket = self.answer.extensions["network_stream"].get_extra_info("socket")
        with suppress(OSError):  # the server has closed it
            one.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._http.close()

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events]

    @property
    def segments(self) -> list[int]:
        return [event.data["id"] for event in self.events if event.name == "segment"]

    def until(self, *names: str) -> Event:
        """The last event, once it is one of these."""
        wait_until(
            lambda: self.events and self.events[-1].name in names, 30, f"{names}: {self.names}"
        )
        return self.events[-1]

    def until_told(self, segments: Iterable[int], last: str = "") -> None:
        """So many segments came, and the last event has this id."""
        wanted = list(segments)
        wait_until(
            lambda: self.segments == wanted and last in ("", *(e.id for e in self.events[-1:])),
            30,
            f"{wanted} {last}: {self.events}",
        )

    def until_over(self) -> list[Event]:
        wait_until(lambda: self.is_over or self.error, 30, f"an end: {self.names}")
        assert self.error is None
        return self.events

    def _read(self) -> None:
        try:
            fields: dict[str, str] = {}
            for line in self.answer.iter_lines():
                name, _, value = line.partition(": ")
                if line == ":":
                    self.heartbeats += 1
                elif line:
                    fields[name] = value
                else:
                    if "data" in fields:
                        data = json.loads(fields["data"])
                        self.events.append(Event(fields["id"], fields["event"], data))
                    fields = {}
            self.is_over = True
        except Exception as exc:  # for the test to look at
            self.error = exc


class Hand:
    """A worker that does what a test says, in the place of the service's own."""

    def __init__(self, service: Service, folder: Path):
        self.service = service
        self.client = Client(service)
        self._folder = folder
        self._numbers = count(1)
        self.latest = folder  # the file of the latest job
        service.kill("worker")
        service.popen("worker").wait(30)
        self.store = WorkerStore(service.settings, celery_app(service.redis_url), "by-hand")

    def close(self) -> None:
        self.store.close()
        self.client.http.close()

    def submit(self, **fields: str) -> str:
        """A job for a file that nobody has sent before."""
        number = next(self._numbers)
        self.latest = variant(self._folder / f"{number}.wav", number)
        return self.client.submit(self.latest, **fields)["job_id"]

    def claim(self) -> Claim:
        claim = self.store.claim()
        assert claim is not None
        return claim

    def begin(self) -> tuple[str, Claim]:
        """A job that is being processed."""
        job, claim = self.submit(), self.claim()
        assert claim.holders == (job,)
        return job, claim

    def complete(self, claim: Claim, segments: Iterable[Segment] = ()) -> None:
        words = list(segments)
        transcript = Transcript(
            text="".join(word.text for word in words),
            language="en",
            language_probability=1,
            duration=9,
            duration_after_vad=9,
            segments=words,
            task="transcribe",
            model="demo",
            processing_seconds=1,
        )
        content = transcript.model_dump_json(exclude_none=True).encode()
        assert self.store.complete(claim, content, self.service.settings.model_key, 9.0)

    def finish_part(self, claim: Claim, texts: Iterable[str]) -> None:
        words = [word.model_dump(exclude_none=True) for word in segments(texts)]
        assert self.store.finish_part(claim, json.dumps({"spent": 1, "segments": words})) == "ok"

    def memory(self) -> int:
        """Resident bytes of the API."""
        status = Path(f"/proc/{self.service.popen('API').pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def segments(texts: Iterable[str]) -> list[Segment]:
    return [
        Segment(
            id=number,
            start=number,
            end=number + 1,
            text=text,
            avg_logprob=-0.5,
            compression_ratio=1,
            no_speech_prob=0,
            temperature=0,
        )
        for number, text in enumerate(texts)
    ]
