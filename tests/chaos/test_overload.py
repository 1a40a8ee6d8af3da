"""`make overload`: one caller sends ten times what the service can do, for SECONDS, and two others
send now and then. Those two must not notice much of it."""

from __future__ import annotations

import itertools
import math
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx2
import pytest

from local.service import Service
from tests.chaos.ledger import recording
from tests.chaos.world import resident_bytes
from tests.conftest import FOX, wait_until
from tests.e2e.conftest import QUICK
from tests.e2e.test_access import Holder, new_key

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]

CAP_SECONDS = 20
OVERLOAD = 10  # times what the service can do
SENDERS = 8
CALM_JOBS = 20
PAUSE_SECONDS = (8.0, 14.0)  # of who sends now and then
SETTINGS = {
    "auth": "keys",
    "max_queue_seconds": str(CAP_SECONDS),
    "worker_slots": "1",
    "cpu_threads": "1",
    "log_level": "WARNING",
}
MIB = 1 << 20
MOST_BYTES = 16 * MIB  # that the API may grow by in the second half
HEADINGS = ("caller", "sent", "accepted", "refused", "queued p50", "p95", "max", "done p50", "p95")


@dataclass
class Caller:
    """Who has one key, and what became of what it sent. Seconds."""

    name: str
    holder: Holder  # of all its threads
    accepted: list[str] = field(default_factory=list)
    refused: list[httpx2.Response] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)
    ran: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)  # from sending to its end, where it waited

    def send(self, content: bytes) -> str:
        """The job's id, '' if it was refused."""
        answer = self.holder.http.post("/transcribe", files={"file": content})
        if answer.status_code == 202:
            self.accepted.append(answer.json()["job_id"])
            return self.accepted[-1]
        if answer.status_code in {429, 503}:
            self.refused.append(answer)
        else:
            self.others.append(answer.text)
        return ""

    def send_and_wait(self, content: bytes) -> None:
        began = time.monotonic()
        job = self.send(content)
        while job:
            status = self.holder.http.get(f"/status/{job}?wait=30").json()["status"]
            if status not in {"queued", "processing"}:
                assert status == "completed"
                self.done.append(time.monotonic() - began)
                return

    def learn(self) -> None:
        """How long each of its jobs was queued, and ran, now that all have ended."""
        for job in self.accepted:
            seen = self.holder.wait(job, within=1)
            self.queued.append(seen["queue_seconds"])
            self.ran.append(seen["processing_seconds"])

    @property
    def sent(self) -> int:
        return len(self.accepted) + len(self.refused) + len(self.others)

    def row(self) -> tuple[str, ...]:
        figures = (
            *(percentile(self.queued, of) for of in (0.5, 0.95, 1)),
            *(percentile(self.done, of) for of in (0.5, 0.95)),
        )
        counts = (self.sent, len(self.accepted), len(self.refused))
        return (self.name, *map(str, counts), *(f"{seconds:.2f}" for seconds in figures))


def percentile(values: list[float], of: float) -> float:
    """The value that such a share of them does not exceed."""
    return sorted(values)[math.ceil(of * len(values)) - 1] if values else math.nan


class Files:
    """The same sound in other bytes each."""

    def __init__(self) -> None:
        self._content = recording(FOX.name, times=11).wav  # above 1 MiB: refused without reading
        self._numbers = itertools.count()

    def next(self) -> bytes:
        return self._content + b"note\x08\x00\x00\x00" + next(self._numbers).to_bytes(8, "little")


def flood(caller: Caller, per_second: float, until: float, files: Files) -> None:
    """Keeps to its times, whatever the answers and however slow they are. Elsewhere clients have
    machines of their own; here they leave the service the cores that it wants."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    due = time.monotonic()
    while due < until:
        time.sleep(max(0.0, due - time.monotonic()))
        caller.send(files.next())
        due += 1 / per_second


def now_and_then(caller: Caller, until: float, files: Files) -> None:
    chance = random.Random(caller.name)
    while time.monotonic() < until:
        time.sleep(chance.uniform(*PAUSE_SECONDS))
        caller.send_and_wait(files.next())


def test_who_sends_now_and_then_hardly_notices_who_sends_far_too_much(tmp_path: Path) -> None:
    """And what is accepted begins in time, each refusal says when to come back, and after the
    overload the service is idle soon. What runs is not interrupted, so who is next waits for one
    file at most: twice as long as alone, at the speed that the machine has under that load."""
    seconds = float(os.environ.get("SECONDS") or 120)
    files = Files()
    with Service.in_folder(tmp_path, {**QUICK, **SETTINGS}) as service, ExitStack() as stack:
        service.wait_ready(60)

        def holder(name: str, *words: str) -> Holder:
            made = Holder(service, new_key(service, name, *words))
            stack.callback(made.http.close)
            return made

        watch = holder("watch", "--scopes", "metrics")
        calm, greedy, *polite = callers = [
            Caller(name, holder(name)) for name in ("calm", "greedy", "ann", "bob")
        ]
        for _ in range(CALM_JOBS):
            calm.send_and_wait(files.next())
        unit_seconds = median(calm.done)
        rate = OVERLOAD / unit_seconds / SENDERS

        until = time.monotonic() + seconds
        with ThreadPoolExecutor(SENDERS + len(polite)) as pool:
            running = [pool.submit(flood, greedy, rate, until, files) for _ in range(SENDERS)]
            running += [pool.submit(now_and_then, each, until, files) for each in polite]
            queues, held_bytes = [], []
            while time.monotonic() < until:
                queues.append(watch.stats()["queue"])
                held_bytes.append(resident_bytes(service.popen("API").pid))
                time.sleep(0.25)
            for each in running:
                each.result()
        wait_until(lambda: is_idle(watch), 4 * CAP_SECONDS, "it is idle")
        idle_seconds = time.monotonic() - until
        for caller in callers:
            caller.learn()

    print("\n" + table([HEADINGS, *(caller.row() for caller in callers)]))
    told = [int(answer.headers.get("retry-after", 0)) for answer in greedy.refused]
    polite_done = [each for caller in polite for each in caller.done]
    noticed = percentile(polite_done, 0.95) / percentile(calm.done, 0.95)
    slower = median(greedy.ran) / median(calm.ran)
    predicted = max(queue["wait_seconds"] for queue in queues)
    grown_bytes = held_bytes[-1] - held_bytes[len(held_bytes) // 2]
    print(
        f"{unit_seconds:.2f} s a job, {greedy.sent / seconds * unit_seconds:.1f} times as much "
        f"sent, each ran {slower:.2f} times as long; "
        f"polite p95 {noticed:.2f} times that of the calm; cap {CAP_SECONDS} s, "
        f"{predicted:.1f} s predicted at most; idle after {idle_seconds:.1f} s; Retry-After "
        f"{min(told)} to {max(told)} s; the API grew by {grown_bytes / MIB:.1f} MiB"
    )
    assert [other for caller in callers for other in caller.others] == []
    assert len(greedy.refused) > 3 * len(greedy.accepted), "it was an overload"
    assert min(told) >= 1
    assert [len(caller.refused) for caller in (calm, *polite)] == [0, 0, 0]
    assert noticed <= 2 * slower
    assert max(each for caller in callers for each in caller.queued) <= CAP_SECONDS
    assert idle_seconds <= 1.1 * CAP_SECONDS
    assert grown_bytes < MOST_BYTES


def is_idle(watch: Holder) -> bool:
    queue = watch.stats()["queue"]
    return not (queue["queued"] or queue["processing"])


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
