"""POST /batches: many files in one request, each of which becomes a job of its own.

All files arrive before the first one is submitted: so the fields may come after them, and a request
that breaks in the middle submits nothing.

A batch is the list of its jobs, and nothing else: its id is in their records and manifests, so it
is as durable as they are, and goes with the last of them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from api import idempotency
from api.access import caller_of
from api.dependencies import state_of
from api.errors import answers
from api.forms import form_schema, options_of
from api.intake import REFUSALS, Arrival, Place, announced_bytes, place_for, refusing, submit
from api.jobs import end
from api.lists import views
from api.status import poll_after_seconds
from api.store import JobList
from api.uploads import (
    FORM_OVERHEAD_BYTES,
    HEADER_BYTES,
    ArrivedFile,
    batch_too_large,
    receive_files,
)
from shared.errors import (
    BatchNotFound,
    BatchTooLarge,
    JobNotFound,
    ServiceError,
    StoreUnavailable,
)
from shared.jobs import Job, JobStatus
from shared.metrics import REJECTIONS
from shared.schemas import (
    BatchAccepted,
    BatchEnded,
    BatchEntry,
    BatchLinks,
    BatchView,
    Failure,
    JobAccepted,
)
from shared.storage import Storage

router = APIRouter(tags=["batches"])

MAX_FILES = 100
TOUCH_SECONDS = 600  # far less than the reaper's ABANDONED_SECONDS
MAX_FILE_SIZES = 8  # together as large as so many of the largest; nginx takes ten times one
OVERHEAD_BYTES = FORM_OVERHEAD_BYTES + MAX_FILES * HEADER_BYTES


def batch_schema() -> dict[str, Any]:
    schema = form_schema()
    file = schema["properties"]["file"]
    schema["properties"]["file"] = {"type": "array", "maxItems": MAX_FILES, "items": file}
    return schema


@router.post(
    "/batches",
    status_code=202,
    response_model=BatchAccepted,
    summary="Submit many recordings",
    responses=answers(*REFUSALS, BatchTooLarge),
    openapi_extra={
        "parameters": [idempotency.PARAMETER],
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": batch_schema()}},
        },
    },
)
async def create(request: Request, response: Response) -> BatchAccepted:
    """Each file becomes a job with the fields of the form, or has an error of its own, which spoils
    no other. Where none of them becomes a job, the answer is the first one's error."""
    state = state_of(request)
    with refusing(state):
        async with AsyncExitStack() as places:
            files, fields = await take_files(request, places)
            options, job_options = options_of(fields)
            content = [each.error.code if each.error else each.checksum for _, each in files]
            told = idempotency.told(request, [options.canonical(), job_options.record(), content])
            told["batch"] = str(uuid4())
            outcomes: list[JobAccepted | ServiceError] = []
            for number, (place, file) in enumerate(files):
                told["batch_number"] = str(number)
                arrival = Arrival(file.checksum, file.size_bytes, options, job_options)
                outcomes.append(await become_of(request, place, file, arrival, told))
        jobs = [each for each in outcomes if isinstance(each, JobAccepted)]
        if not jobs:
            raise next(each for each in outcomes if isinstance(each, ServiceError))
    for refused in outcomes:
        if isinstance(refused, ServiceError):
            state.metrics.rejected.labels(REJECTIONS.get(refused.code, "invalid")).inc()
    batch_id = told["batch"]
    if "idempotency" in told:  # what was sent before, in part or as a whole, keeps its id
        job = await state.store.read(jobs[0].job_id, caller_of(request).sees)
        batch_id = job.batch_id or batch_id
    if all(each.is_replayed for each in jobs):
        response.headers[idempotency.REPLAYED] = "true"
    response.headers["Location"] = links(batch_id).status
    response.headers["Retry-After"] = "1"
    return BatchAccepted(
        batch_id=batch_id,
        accepted=len(jobs),
        refused=len(outcomes) - len(jobs),
        jobs=[entry(number, outcome) for number, outcome in enumerate(outcomes)],
        links=links(batch_id),
    )


async def take_files(
    request: Request, places: AsyncExitStack
) -> tuple[list[tuple[Place, ArrivedFile]], dict[str, str]]:
    """Each file of the body at a place of its own, and the fields."""
    state, taken = state_of(request), []
    settings = state.settings
    most_bytes = settings.max_file_size_bytes * MAX_FILE_SIZES
    announced = announced_bytes(request)
    if (announced or 0) > most_bytes + OVERHEAD_BYTES:
        raise batch_too_large(most_bytes)
    await state.admission.before_body(announced, caller_of(request).name)

    async def next_place() -> Path:
        taken.append(await places.enter_async_context(place_for(state)))
        return taken[-1].path

    files, fields = await receive_files(
        staying(state.storage, taken, request.stream()),
        request.headers.get("content-type", ""),
        next_place,
        (settings.max_file_size_bytes, MAX_FILES, most_bytes),
        settings.upload_patience_seconds,
    )
    return list(zip(taken, files, strict=True)), fields


async def staying(
    storage: Storage, taken: list[Place], stream: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """The chunks. What has arrived of a batch is not abandoned while the rest arrives."""
    clock = asyncio.get_running_loop().time
    touched = clock()
    async for chunk in stream:
        if clock() - touched > TOUCH_SECONDS:
            touched = clock()
            for place in taken:
                await asyncio.to_thread(storage.touch, place.job_id)
        yield chunk


async def become_of(
    request: Request, place: Place, file: ArrivedFile, arrival: Arrival, told: dict[str, str]
) -> JobAccepted | ServiceError:
    if file.error:
        return file.error
    try:
        return await submit(request, place, arrival, told, "batches")
    except ServiceError as exc:
        return exc


def entry(number: int, outcome: JobAccepted | ServiceError) -> BatchEntry:
    if isinstance(outcome, JobAccepted):
        return BatchEntry(file=number, job=outcome)
    return BatchEntry(file=number, error=Failure(code=outcome.code, message=outcome.message))


def links(batch_id: str) -> BatchLinks:
    path = f"/batches/{batch_id}"
    return BatchLinks(status=path, jobs=f"/jobs?batch={batch_id}", cancel=path)


async def jobs_of(request: Request, batch_id: str) -> list[Job]:
    """In the order of the files. Raises BatchNotFound."""
    jobs, _ = await state_of(request).store.page(
        JobList(batch_id=batch_id), caller_of(request).sees, "", "", MAX_FILES
    )
    if not jobs:
        raise BatchNotFound
    return jobs[::-1]


@router.get(
    "/batches/{batch_id}",
    response_model=BatchView,
    summary="Ask how far a batch is",
    responses=answers(BatchNotFound, StoreUnavailable),
)
async def batch(batch_id: str, request: Request, response: Response) -> BatchView:
    jobs = await jobs_of(request, batch_id)
    unfinished = [job for job in jobs if not job.status.is_terminal]
    response.headers["Cache-Control"] = "no-store"
    if unfinished:
        response.headers["Retry-After"] = str(min(map(poll_after_seconds, unfinished)))
    seen = Counter(job.status for job in jobs)
    return BatchView(
        batch_id=batch_id,
        is_done=not unfinished,
        counts={status: seen[status] for status in JobStatus},
        jobs=await views(request, jobs),
    )


@router.delete(
    "/batches/{batch_id}",
    response_model=BatchEnded,
    summary="Cancel a batch's jobs or erase their results",
    responses=answers(BatchNotFound, StoreUnavailable),
)
async def delete(batch_id: str, request: Request) -> BatchEnded:
    """What `DELETE /jobs/{job_id}` does, for each of its jobs."""
    ended = []
    for job_id in await state_of(request).store.batch(batch_id):
        with suppress(JobNotFound):  # not the caller's, or erased meanwhile
            ended.append(await end(request, job_id))
    if not ended:
        raise BatchNotFound
    return BatchEnded(batch_id=batch_id, jobs=ended)
