"""What becomes of bytes that arrive, when the request that brings them is slow, or is cut off."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from api import batches, idempotency
from api.admission import Admission
from api.intake import Arrival, place_for, submit
from api.store import JobStore, Submission
from shared.job_options import JobOptions
from shared.options import TranscriptionOptions
from shared.settings import Settings
from shared.storage import Storage
from tests.conftest import FOX
from worker.reaper import ABANDONED_SECONDS, Reaper
from worker.store import WorkerStore

Chunks = AsyncIterator[bytes]


class Stuck(Admission):
    """The answer to a submission never comes."""

    submitted: asyncio.Event

    async def submit(self, *args: Any, **named: Any) -> Submission:
        await super().submit(*args, **named)
        self.submitted.set()
        return await asyncio.Future()


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage(settings.data_dir)


@pytest.fixture
def request_of(settings: Settings, store: JobStore, storage: Storage) -> Callable[..., Request]:
    """A request as the API gets it."""

    def make(body: Chunks, of: type[Admission] = Admission, **headers: str) -> Request:
        admission = of(settings, store, storage)
        state = SimpleNamespace(
            settings=settings, store=store, storage=storage, admission=admission, egress=None
        )

        async def receive() -> dict[str, Any]:
            chunk = await anext(body, b"")
            return {"type": "http.request", "body": chunk, "more_body": chunk != b""}

        scope = {
            "type": "http",
            "method": "POST",
            "headers": [
                (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
            ],
            "app": SimpleNamespace(state=SimpleNamespace(service=state)),
        }
        return Request(scope, receive)

    return make


async def nothing() -> Chunks:
    return
    yield b""


async def test_what_has_arrived_of_a_batch_stays_while_the_rest_arrives(
    settings, worker: WorkerStore, storage, request_of, monkeypatch
):
    """However long that takes: a folder in which nothing changes for an hour is abandoned else."""
    monkeypatch.setattr(batches, "TOUCH_SECONDS", -1)
    reaper = Reaper(worker, storage, settings, lambda *_: None)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    audio = FOX.read_bytes()

    async def slowly() -> Chunks:
        yield head + audio + b"\r\n" + head + audio[:1000]
        arrived = storage.root.glob("*/audio.part")
        whole = next(path for path in arrived if path.stat().st_size == len(audio))
        long_ago = time.time() - ABANDONED_SECONDS - 60
        for path in (whole, whole.parent):
            os.utime(path, (long_ago, long_ago))
        yield audio[1000:2000]
        yield audio[2000:3000]
        reaper.reconcile_uploads()
        yield audio[3000:] + b"\r\n--b--\r\n"

    request = request_of(slowly(), content_type="multipart/form-data; boundary=b")
    async with AsyncExitStack() as places:
        files, _ = await batches.take_files(request, places)
        assert [place.path.read_bytes() for place, _ in files] == [audio] * 2


async def test_a_request_with_a_key_that_is_cut_off_as_it_is_submitted_leaves_its_upload(
    worker: WorkerStore, storage, request_of
):
    """It will be sent again, and be answered with the job that has been queued; which needs it."""
    request = request_of(nothing(), Stuck, idempotency_key="again")
    admission = request.app.state.service.admission
    admission.submitted = asyncio.Event()
    arrival = Arrival("checksum", 4, TranscriptionOptions(), JobOptions())

    async def take_in() -> None:
        async with place_for(request.app.state.service) as place:
            place.path.write_bytes(b"RIFF")
            told = idempotency.told(request, arrival.content)
            await submit(request, place, arrival, told, "transcribe")

    running = asyncio.create_task(take_in())
    await asyncio.wait_for(admission.submitted.wait(), 10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    claim = worker.claim()
    assert claim
    assert storage.holder_with_audio(worker.holders(claim))
