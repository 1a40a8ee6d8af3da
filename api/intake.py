"""The one way in: bytes that come from somewhere become a durable job.

A source writes the bytes to the path that it is given, and says what they are to become. An upload
is one (api/transcriptions.py); whatever else brings bytes differs in its source alone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from fastapi import Request
from starlette.requests import ClientDisconnect

from api.access import audit, caller_of
from api.dependencies import State, state_of
from api.uploads import FORM_OVERHEAD_BYTES, too_large
from shared.errors import MalformedUpload, ServiceError, StorageFull
from shared.job_options import JobOptions
from shared.jobs import JobStatus
from shared.metrics import OUTCOMES, REJECTIONS
from shared.options import TranscriptionOptions, fingerprint
from shared.schemas import JobAccepted, Links
from shared.settings import Settings
from shared.storage import Manifest

log = logging.getLogger(__name__)

MESSAGES = {
    "new": "Transcription job submitted successfully",
    "joined": "The same file is being transcribed already; this job shares its result",
    "hit": "The same file was transcribed before; the result is ready",
}


@dataclass(frozen=True)
class Arrival:
    """What a source brought."""

    checksum: str  # SHA-256 of the bytes, hex
    size_bytes: int
    options: TranscriptionOptions
    job: JobOptions


@dataclass
class Place:
    """Where the bytes of a job that is to be are written."""

    job_id: str
    path: Path
    is_kept: bool = False  # the job is queued, and needs them


Source = Callable[[Path], Awaitable[Arrival]]


async def take_in(
    request: Request,
    source: Source,
    announced_bytes: int | None = None,
    endpoint: str = "transcribe",
) -> JobAccepted:
    """Stores what the source brings, and queues its transcription. The job is durable when this
    returns; when it raises, nothing stays.

    `announced_bytes`: how many will come, where that is known: their place on the disk is taken
    before they do. `endpoint`: as the metrics call it. Raises whatever the source raises,
    FileTooLarge, StorageFull, StoreUnavailable, StoreFull, QueueFull, TooManyJobs,
    AudioMinutesUsed.
    """
    state = state_of(request)
    most_bytes = state.settings.max_file_size_bytes
    try:
        if (announced_bytes or 0) > most_bytes + FORM_OVERHEAD_BYTES:
            raise too_large(most_bytes)
        await state.admission.before_body(announced_bytes)
        async with place_for(state, announced_bytes) as place:
            return await submit(request, place, await source(place.path), endpoint)
    except ServiceError as exc:
        state.metrics.rejected.labels(REJECTIONS.get(exc.code, "invalid")).inc()
        raise


@asynccontextmanager
async def place_for(state: State, announced_bytes: int | None) -> AsyncIterator[Place]:
    """A new job's folder, which is gone at the end unless the job was queued."""
    job_id = str(uuid4())
    place = Place(job_id, state.storage.folder(job_id))
    try:
        place.path = await asyncio.to_thread(state.storage.begin, job_id, announced_bytes or 0)
        state.admission.reserved()
        yield place
    except ClientDisconnect as exc:
        raise MalformedUpload("The connection ended in the middle of the upload.") from exc
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFull from exc
        raise
    finally:
        if not place.is_kept:
            await asyncio.to_thread(state.storage.remove, job_id)


async def submit(request: Request, place: Place, arrival: Arrival, endpoint: str) -> JobAccepted:
    """The bytes have arrived at their place: they become a job."""
    state, caller = state_of(request), caller_of(request)
    manifest = manifest_of(place.job_id, arrival, caller.name, state.settings)
    await asyncio.to_thread(state.storage.keep, manifest)
    submission = await state.admission.submit(manifest, caller.limits)
    place.is_kept = submission.outcome != "hit"
    if submission.leader:
        await asyncio.to_thread(state.storage.share_audio, submission.leader, place.job_id)
    state.metrics.submitted.labels(endpoint, state.settings.model_size).inc()
    state.metrics.cache.labels(OUTCOMES[submission.outcome]).inc()
    state.metrics.upload_size.observe(arrival.size_bytes)
    log.info(
        "job accepted",
        extra={
            "action": "job_accepted",
            "job_id": place.job_id,
            "outcome": submission.outcome,
            "size_bytes": arrival.size_bytes,
        },
    )
    audit(request, "job_submitted", place.job_id)
    return JobAccepted(
        job_id=place.job_id,
        status=JobStatus.COMPLETED if submission.outcome == "hit" else JobStatus.QUEUED,
        message=MESSAGES[submission.outcome],
        deduplicated=submission.outcome != "new",
        metadata=arrival.job.metadata,
        priority=arrival.job.priority,
        links=links(place.job_id),
    )


def manifest_of(job_id: str, arrival: Arrival, owner: str, settings: Settings) -> Manifest:
    tenant = "" if settings.share_results else owner
    return Manifest(
        job_id=job_id,
        fingerprint=fingerprint(
            arrival.checksum, arrival.options, settings.model_key, tenant=tenant
        ),
        checksum=arrival.checksum,
        options=arrival.options.canonical(),
        model=settings.model_key,
        size_bytes=arrival.size_bytes,
        owner=owner,
        job_options=arrival.job.record(),
    )


def links(job_id: str) -> Links:
    return Links(status=f"/status/{job_id}", result=f"/result/{job_id}", cancel=f"/jobs/{job_id}")
