"""Far more work than the service can do: it refuses in time, says when to come back, keeps what it
promised to those it let in, and is idle soon after."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection

import httpx2
import pytest

from tests.conftest import FOX, FOX_WORDS, wait_until
from tests.e2e.conftest import QUICK, Client, metric, running, variant

LIMIT_SECONDS = 4
OVERLOAD_SECONDS = 9
SENDERS = 6


@dataclass
class Sender:
    """Sends one new file after the other, whatever the answers."""

    url: str
    content: bytes
    number: int
    accepted: list[str] = field(default_factory=list)
    refused: list[httpx2.Response] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def send(self, until: float) -> None:
        with httpx2.Client(base_url=self.url, timeout=30, trust_env=False) as http:
            for turn in range(1_000_000):
                if time.monotonic() > until:
                    return
                unique = (self.number * 1_000_000 + turn).to_bytes(8, "little")
                file = self.content + b"note\x08\x00\x00\x00" + unique
                answer = http.post("/transcribe", files={"file": file})
                if answer.status_code == 202:
                    self.accepted.append(answer.json()["job_id"])
                elif answer.status_code == 503:
                    self.refused.append(answer)
                    time.sleep(0.05)  # many a client ignores Retry-After; none is this fast
                else:
                    self.others.append(answer.text)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A service with one slot, which lets in what begins soon."""
    settings = {**QUICK, "max_queue_seconds": str(LIMIT_SECONDS)}
    settings |= {"worker_slots": "1", "cpu_threads": "1"}
    with running(tmp_path_factory.mktemp("limited"), settings) as service:
        client = Client(service)
        yield client
        client.http.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("padding", [0, 1_500_000], ids=["small", "large"])
def test_overload_is_refused_and_those_let_in_do_not_wait_longer_than_promised(
    padding, limited, tmp_path
):
    """Small uploads are refused when they are read, large ones before that."""
    service, client = limited.service, limited
    before = refusals(client)
    note = b"note" + padding.to_bytes(4, "little") + bytes(padding) if padding else b""
    content = FOX.read_bytes() + note
    file = variant(tmp_path / "known.wav", 2 + padding)
    known = client.submit(file)["job_id"]
    runs = [client.wait(known)]
    first = variant(tmp_path / "first.wav", 1)
    first.write_bytes(content + first.read_bytes()[-12:])
    runs.append(client.wait(client.submit(first)["job_id"]))  # the pace is measured

    senders = [Sender(service.base_url, content, n) for n in range(SENDERS)]
    until = time.monotonic() + OVERLOAD_SECONDS
    polls, queues = [], []
    with ThreadPoolExecutor(SENDERS) as pool:
        running = [pool.submit(sender.send, until) for sender in senders]
        while time.monotonic() < until:
            began = time.perf_counter()
            client.http.get(f"/status/{known}").raise_for_status()
            polls.append(time.perf_counter() - began)
            queues.append(client.stats()["queue"])
            assert client.submit(file)["status"] == "completed", "what is known is not refused"
            time.sleep(0.1)
        for each in running:
            each.result()
    accepted = [job for sender in senders for job in sender.accepted]
    refused = [answer for sender in senders for answer in sender.refused]
    assert [other for sender in senders for other in sender.others] == []
    assert len(refused) > len(accepted) > 10, "it was an overload"
    assert {answer.json()["code"] for answer in refused} == {"queue_full"}

    # Each was let in by the pace of its moment, and the machine may have got slower meanwhile.
    paces = [run["processing_seconds"] for run in runs]
    paces += [queue["backlog_seconds"] / queue["queued"] for queue in queues if queue["queued"]]
    slower = max(paces) / min(paces)
    longest_queue = max(queue["queued"] for queue in queues)
    assert longest_queue * min(paces) <= LIMIT_SECONDS, "they were let in past the limit"
    waits = [queue["wait_seconds"] for queue in queues]
    latest = max(int(answer.headers["retry-after"]) for answer in refused)
    assert min(int(answer.headers["retry-after"]) for answer in refused) >= 1
    assert latest <= max(3, 1.5 * max(waits)), "it is told by the backlog"

    idle_by = time.monotonic() + LIMIT_SECONDS * 1.1 * slower
    seen = [client.wait(job, within=max(1, idle_by - time.monotonic())) for job in accepted]
    longest = max(job["queue_seconds"] for job in seen)
    print(
        f"\n{len(accepted)} accepted, {len(refused)} refused, longest wait {longest:.1f} s of "
        f"{LIMIT_SECONDS}, {longest_queue} in the queue, {slower:.1f} times slower meanwhile, "
        f"latest Retry-After {latest} s, slowest poll {max(polls) * 1000:.0f} ms"
    )
    assert longest <= LIMIT_SECONDS * slower
    assert sorted(polls)[len(polls) * 9 // 10] < 0.5 * slower
    assert {client.text(job).strip() for job in accepted} == {FOX_WORDS}
    queue = wait_until(
        lambda: (q := client.stats()["queue"]) and not q["processing"] and q, 30, "it is idle"
    )
    assert (queue["queued"], queue["parts"], queue["backlog_seconds"]) == (0, 0, 0)
    assert refusals(client) - before == len(refused)
    page = client.http.get("/metrics").text
    assert metric(page, "whisper_queue_wait_seconds") == 0
    assert client.submit(first)["status"] == "completed"


def refusals(client: Client) -> float:
    page = client.http.get("/metrics").text
    return metric(page, "whisper_jobs_rejected_total", reason="queue_full")


def test_an_upload_has_its_place_on_the_disk_from_its_first_byte(service, client):
    """So that uploads under way can't overrun the disk together; what it does not need it gives
    back."""
    size = 20_000_000
    padding = b"note" + size.to_bytes(4, "little") + bytes(size)
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    body = head + FOX.read_bytes() + padding + b"\r\n--x--\r\n"
    folders = service.settings.data_dir / "uploads"
    before = set(folders.iterdir())

    def arriving() -> list[int]:
        parts = [folder / "audio.part" for folder in set(folders.iterdir()) - before]
        return [part.stat().st_blocks * 512 for part in parts if part.exists()]

    address = (service.settings.host, service.settings.port)
    with closing(HTTPConnection(*address, timeout=30)) as connection:
        connection.putrequest("POST", "/transcribe")
        connection.putheader("Content-Type", "multipart/form-data; boundary=x")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:100_000])
        wait_until(lambda: any(held >= len(body) for held in arriving()), 30, "it has its place")
        connection.send(body[100_000:])
        answer = connection.getresponse()
        job = json.load(answer)["job_id"]
    client.wait(job)
    assert client.text(job).strip() == FOX_WORDS
