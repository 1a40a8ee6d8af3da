"""The one way in: bytes that come from somewhere become a durable job.

A source writes the bytes to the path that it is given, and says what they are to become. An upload
is one (api/transcriptions.py); whatever else brings bytes differs in its source alone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from api import idempotency
from api.access import audit, caller_of
from api.dependencies import State, state_of
from api.egress import Egress
from api.store import Submission
from api.uploads import FORM_OVERHEAD_BYTES, too_large
from shared.errors import (
    AudioMinutesUsed,
    DigestUnknown,
    EmptyFile,
    FileTooLarge,
    Forbidden,
    IdempotencyConflict,
    InvalidField,
    MalformedUpload,
    MissingFile,
    NotAudio,
    QueueFull,
    ServiceError,
    StorageFull,
    StoreFull,
    StoreUnavailable,
    TooManyJobs,
    Unavailable,
    UploadTooSlow,
    UrlNotAllowed,
)
from shared.job_options import JobOptions, Priority
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
    "replayed": "The same request, with the same Idempotency-Key, was accepted before as this job",
}

REFUSALS = (  # what can be wrong with an upload, or in its way
    MalformedUpload,
    UploadTooSlow,
    FileTooLarge,
    NotAudio,
    MissingFile,
    EmptyFile,
    InvalidField,
    UrlNotAllowed,
    IdempotencyConflict,
    StoreUnavailable,
    StoreFull,
    QueueFull,
    TooManyJobs,
    AudioMinutesUsed,
    StorageFull,
)


@dataclass(frozen=True)
class Arrival:
    """What a source brought."""

    checksum: str  # SHA-256 of the bytes, hex
    size_bytes: int
    options: TranscriptionOptions
    job: JobOptions
    patience_seconds: float = inf  # its caller waits no longer for its turn
    url: str = ""  # where they were fetched from

    @property
    def content(self) -> list[Any]:
        """What makes two requests the same."""
        return [self.url or self.checksum, self.options.canonical(), self.job.record()]


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
    Forbidden (of the priority), UrlNotAllowed (of the webhook), FileTooLarge, StorageFull,
    StoreUnavailable, StoreFull, QueueFull, WaitTooLong, TooManyJobs, AudioMinutesUsed,
    IdempotencyConflict.
    """
    state = state_of(request)
    most_bytes = state.settings.max_file_size_bytes
    with refusing(state):
        if (announced_bytes or 0) > most_bytes + FORM_OVERHEAD_BYTES:
            raise too_large(most_bytes)
        await state.admission.before_body(announced_bytes, caller_of(request).name)
        async with place_for(state, announced_bytes) as place:
            arrival = await source(place.path)
            told = idempotency.told(request, arrival.content)
            return await submit(request, place, arrival, told, endpoint)


def announced_bytes(request: Request) -> int | None:
    """The length of the body, where its sender says it."""
    announced = request.headers.get("content-length", "")
    return int(announced) if announced.isdigit() else None


@contextmanager
def refusing(state: State) -> Iterator[None]:
    """What goes wrong while bytes arrive is an error of ours, and is counted."""
    try:
        try:
            yield
        except ClientDisconnect as exc:
            raise MalformedUpload("The connection ended in the middle of the upload.") from exc
        except OSError as exc:
            if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise StorageFull from exc
            if exc.errno in {errno.EMFILE, errno.ENFILE}:  # no more open files
                raise Unavailable from exc
            raise
    except DigestUnknown:  # the answer to a question
        raise
    except ServiceError as exc:
        state.metrics.rejected.labels(REJECTIONS.get(exc.code, "invalid")).inc()
        raise


@asynccontextmanager
async def place_for(state: State, announced_bytes: int | None = None) -> AsyncIterator[Place]:
    """A new job's folder, which is gone at the end unless the job was queued."""
    job_id = str(uuid4())
    place = Place(job_id, state.storage.folder(job_id))
    try:
        place.path = await asyncio.to_thread(state.storage.begin, job_id, announced_bytes or 0)
        state.admission.reserved()
        yield place
    finally:
        if not place.is_kept:
            await asyncio.to_thread(state.storage.remove, job_id)


async def submit(
    request: Request,
    place: Place,
    arrival: Arrival,
    told: Mapping[str, str],
    endpoint: str,
    least: str = "",
) -> JobAccepted:
    """The bytes have arrived at their place: they become a job, whose record keeps what is `told`.

    When the store does not answer, nobody knows whether it has the job. A request with a key will
    be sent again and be answered with that job, so its upload stays; a reaper settles it.

    `least`: see JobStore.submit; with `hit` there are no bytes. Raises Forbidden, UrlNotAllowed and
    what Admission.submit does."""
    state, caller = state_of(request), caller_of(request)
    if arrival.job.priority is Priority.HIGH and not caller.may_hurry:
        raise Forbidden(
            "`priority=high` needs an API key with the scope `priority`. Ask for such a key, or "
            "send `normal` or `low`."
        )
    arrival = replace(arrival, job=with_checked_webhook(arrival.job, state.egress))
    manifest = manifest_of(place.job_id, arrival, told, caller.name, state.settings)
    if least != "hit":
        await asyncio.to_thread(state.storage.keep, manifest)
    try:
        submission = await state.admission.submit(
            manifest, caller.limits, least, arrival.patience_seconds
        )
    except (StoreUnavailable, asyncio.CancelledError):  # or this process ends meanwhile
        place.is_kept = "idempotency" in told and least != "hit"
        raise
    place.is_kept = submission.outcome in {"new", "joined"}
    if submission.outcome == "joined":
        await asyncio.to_thread(state.storage.share_audio, submission.other, place.job_id)
    if submission.outcome != "replayed" and not least:
        state.metrics.upload_size.observe(arrival.size_bytes)
    return await accepted(request, manifest, arrival.job, submission, endpoint)


async def accepted(
    request: Request,
    manifest: Manifest,
    options: JobOptions,
    submission: Submission,
    endpoint: str,
) -> JobAccepted:
    """The answer to a submission, which is counted and logged."""
    state = state_of(request)
    if submission.outcome == "replayed":
        job = await state.store.read(submission.other, caller_of(request).sees)
        return JobAccepted(
            job_id=job.job_id,
            status=job.status,
            message=MESSAGES["replayed"],
            deduplicated=job.outcome != "new",
            metadata=job.options.metadata,
            priority=job.options.priority,
            links=links(job.job_id),
            is_replayed=True,
        )
    state.metrics.submitted.labels(endpoint, state.settings.model_size).inc()
    state.metrics.cache.labels(OUTCOMES[submission.outcome]).inc()
    log.info(
        "job accepted",
        extra={
            "action": "job_accepted",
            "job_id": manifest.job_id,
            "outcome": submission.outcome,
            "size_bytes": manifest.size_bytes,
        },
    )
    audit(request, "job_submitted", manifest.job_id)
    return JobAccepted(
        job_id=manifest.job_id,
        status=JobStatus.COMPLETED if submission.outcome == "hit" else JobStatus.QUEUED,
        message=MESSAGES[submission.outcome],
        deduplicated=submission.outcome != "new",
        metadata=options.metadata,
        priority=options.priority,
        links=links(manifest.job_id),
    )


def show(response: Response, job: JobAccepted) -> JobAccepted:
    """The headers that go with it."""
    response.headers["Location"] = job.links.status
    response.headers["Retry-After"] = "1"
    if job.is_replayed:
        response.headers[idempotency.REPLAYED] = "true"
    return job


def with_checked_webhook(job: JobOptions, egress: Egress) -> JobOptions:
    """Its address as it will be asked. Raises UrlNotAllowed."""
    if not job.webhook_url:
        return job
    url = egress.check("webhook_url", job.webhook_url, only_https=True)
    return job.model_copy(update={"webhook_url": str(url)})


def fingerprint_of(arrival: Arrival, owner: str, settings: Settings) -> str:
    tenant = "" if settings.share_results else owner
    return fingerprint(arrival.checksum, arrival.options, settings.model_key, tenant=tenant)


def manifest_of(
    job_id: str, arrival: Arrival, told: Mapping[str, str], owner: str, settings: Settings
) -> Manifest:
    return Manifest(
        job_id=job_id,
        fingerprint=fingerprint_of(arrival, owner, settings),
        checksum=arrival.checksum,
        options=arrival.options.canonical(),
        model=settings.model_key,
        size_bytes=arrival.size_bytes,
        owner=owner,
        job_options={**arrival.job.record(), **told},
    )


def links(job_id: str) -> Links:
    return Links(
        status=f"/status/{job_id}",
        result=f"/result/{job_id}",
        events=f"/jobs/{job_id}/events",
        cancel=f"/jobs/{job_id}",
    )
