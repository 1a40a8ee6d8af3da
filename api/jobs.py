"""GET /result, GET /jobs/{id}/partial, DELETE /jobs: what becomes of a job."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api import formats
from api.access import audit, caller_of
from api.dependencies import state_of
from api.errors import answers
from api.status import job_id_of, poll_after_seconds
from shared.errors import (
    InvalidField,
    JobCancelled,
    JobEndedAlready,
    JobExpired,
    JobFailed,
    JobNotFound,
    ResultNotReady,
    StoreUnavailable,
)
from shared.jobs import JobStatus
from shared.schemas import (
    JobEnded,
    JobPartial,
    JobResult,
    Transcript,
    VerboseTranscript,
)

router = APIRouter(tags=["jobs"])

ENDS = {
    "cancelled": ("cancelled", "The job was cancelled"),
    "erased": ("deleted", "The job and its result were erased"),
}


@router.get(
    "/result/{job_id}",
    summary="Get the transcript",
    response_model=None,
    responses={
        200: {"model": JobResult | VerboseTranscript, "content": formats.CONTENT_OF_RESULT},
        **answers(
            JobNotFound,
            JobExpired,
            ResultNotReady,
            JobCancelled,
            JobFailed,
            InvalidField,
            StoreUnavailable,
        ),
    },
)
async def result(
    job_id: str, request: Request, asked: Annotated[formats.Writing, Query()]
) -> Response:
    store = state_of(request).store
    job = await store.read(job_id_of(job_id), caller_of(request).sees)
    audit(request, "result_read", job.job_id)
    if job.status is JobStatus.FAILED:
        raise JobFailed(job.error_code, job.error_message)
    if job.status is JobStatus.CANCELLED:
        raise JobCancelled
    if job.status is not JobStatus.COMPLETED:
        raise ResultNotReady(
            f"The job is {job.status}, its result is not ready. Ask again after the time that "
            "Retry-After names.",
            retry_after_seconds=poll_after_seconds(job),
        )
    transcript = await store.transcript(job)
    return await formats.respond(asked, job.job_id, transcript, job.options.metadata_json)


@router.get(
    "/jobs/{job_id}/partial",
    response_model=JobPartial,
    response_model_exclude={"segments": {"__all__": {"tokens", "warnings"}}},
    summary="Read what is transcribed so far",
    responses=answers(JobNotFound, JobExpired, StoreUnavailable),
)
async def partial(job_id: str, request: Request, response: Response) -> JobPartial:
    """The beginning of a long recording while the rest is still running: it grows part by part. A
    short one has nothing until it is done."""
    store = state_of(request).store
    job = await store.read(job_id_of(job_id), caller_of(request).sees)
    audit(request, "partial_read", job.job_id)
    response.headers["Cache-Control"] = "no-store"
    if job.status is JobStatus.COMPLETED:
        segments = Transcript.model_validate_json(await store.transcript(job)).segments
    else:
        segments = await store.partial(job)
        response.headers["Retry-After"] = str(poll_after_seconds(job))
    return JobPartial(
        job_id=job.job_id,
        status=job.status,
        metadata=job.options.metadata,
        progress=job.progress,
        text="".join(segment.text for segment in segments).strip(),
        segments=segments,
    )


@router.delete(
    "/jobs/{job_id}",
    response_model=JobEnded,
    summary="Cancel a job or erase its result",
    responses=answers(JobNotFound, StoreUnavailable),
)
async def delete(job_id: str, request: Request) -> JobEnded:
    """Cancels an unfinished job; erases a finished one, and its transcript with the last job."""
    return await end(request, job_id_of(job_id))


@router.delete("/job/{job_id}", response_model=JobEnded, include_in_schema=False)
async def delete_by_old_name(job_id: str, request: Request) -> JobEnded:
    return await delete(job_id, request)


@router.post(
    "/jobs/{job_id}/cancel",
    response_model=JobEnded,
    summary="Cancel a job",
    responses=answers(JobNotFound, JobEndedAlready, StoreUnavailable),
)
async def cancel(job_id: str, request: Request) -> JobEnded:
    """Cancels an unfinished job, and never erases anything."""
    return await end(request, job_id_of(job_id), erases=False)


async def end(request: Request, job_id: str, *, erases: bool = True) -> JobEnded:
    """Cancels the job; one that has ended already is erased. Raises JobNotFound, JobEndedAlready
    where nothing is to be erased, StoreUnavailable."""
    state, sees = state_of(request), caller_of(request).sees
    outcome = "unfinished"
    while outcome == "unfinished":  # not only at first: it may be retried in between
        outcome, options, given_up = await state.store.cancel(job_id, sees)
        if outcome == "finished" and not erases:
            raise JobEndedAlready
        if outcome == "finished":
            # Before the record: an upload without one is a lost job, which a reaper submits again.
            await asyncio.to_thread(state.storage.remove, job_id)
            outcome, options = await state.store.erase(job_id, sees)
    if outcome == "unknown":
        raise JobNotFound
    audit(request, f"job_{outcome}", job_id)
    await asyncio.to_thread(state.storage.remove, job_id)
    if given_up:
        await asyncio.to_thread(state.storage.remove_parts, given_up)
    status, message = ENDS[outcome]
    return JobEnded(job_id=job_id, status=status, message=message, metadata=options.metadata)
