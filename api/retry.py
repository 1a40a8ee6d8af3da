"""POST /jobs/{job_id}/retry: a job that failed on our side runs again, from the upload that was
kept for that."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from api.access import caller_of
from api.dependencies import state_of
from api.errors import answers
from api.intake import refusing
from api.status import job_id_of, poll_after_seconds, view
from api.store import NO_LIMITS, Submission
from shared.errors import (
    AudioMinutesUsed,
    InputMissing,
    JobExpired,
    JobNotFailed,
    JobNotFound,
    QueueFull,
    RetryInVain,
    StoreFull,
    StoreUnavailable,
    TooManyJobs,
    UploadGone,
    failure_of,
)
from shared.jobs import Job, JobStatus
from shared.metrics import OUTCOMES
from shared.schemas import JobView
from shared.storage import Manifest, Storage

router = APIRouter(tags=["jobs"])

log = logging.getLogger("audit")


@router.post(
    "/jobs/{job_id}/retry",
    status_code=202,
    response_model=JobView,
    summary="Retry a failed job",
    responses=answers(
        JobNotFound,
        JobExpired,
        JobNotFailed,
        RetryInVain,
        UploadGone,
        StoreUnavailable,
        StoreFull,
        QueueFull,
        TooManyJobs,
        AudioMinutesUsed,
    ),
)
async def retry(job_id: str, request: Request, response: Response) -> JobView:
    """The job keeps its id and its options, and enters the queue as if it had just been submitted:
    its attempts are counted from 0, and its webhook is told of its next end, under another
    `webhook-id`. Only what failed on the service's side can be retried, while its upload is kept:
    until `expires_at`."""
    state, caller = state_of(request), caller_of(request)
    failed = await state.store.read(job_id_of(job_id), caller.sees)
    check(failed)
    model = state.settings.model_key
    manifest = await asyncio.to_thread(manifest_of, state.storage, failed, model)
    # An operator who retries somebody's job is not held to limits, which are the owner's.
    limits = caller.limits if caller.name == manifest.owner else NO_LIMITS
    with refusing(state):
        await state.store.admit()
        submission = await state.admission.submit(manifest, limits, least="failed")
    await asyncio.to_thread(settle, state.storage, manifest, submission)
    state.metrics.submitted.labels("retry", state.settings.model_size).inc()
    state.metrics.cache.labels(OUTCOMES[submission.outcome]).inc()
    log.info(
        "job retried",
        extra={
            "action": "job_retried",
            "job_id": failed.job_id,
            "error_code": failed.error_code,
            "retries": failed.retries + 1,
            "outcome": submission.outcome,
        },
    )
    job = await state.store.read(failed.job_id, caller.sees)
    response.headers["Location"] = f"/status/{job.job_id}"
    response.headers["Retry-After"] = str(poll_after_seconds(job))
    return view(job, await state.admission.look())


def check(job: Job) -> None:
    """Raises JobNotFailed, RetryInVain, UploadGone."""
    if job.status is not JobStatus.FAILED:
        raise JobNotFailed(f"The job is {job.status}, so there is nothing to retry.")
    if job.error_code == InputMissing.code:
        raise UploadGone
    if not failure_of(job.error_code, "").retryable:
        raise RetryInVain


def kept_manifest(storage: Storage, job: Job) -> Manifest:
    """Raises UploadGone."""
    manifest = storage.manifest(job.job_id)
    if manifest is None or not storage.audio(job.job_id).exists():
        raise UploadGone
    return manifest


def manifest_of(storage: Storage, job: Job, model: str) -> Manifest:
    """Of the job as it enters again, with the model of now: another job may have got its transcript
    of the same file meanwhile. Raises UploadGone."""
    manifest = kept_manifest(storage, job)
    told = {**manifest.job_options, "retries": str(job.retries + 1)}
    return replace(manifest, model=model, job_options=told)


def settle(storage: Storage, manifest: Manifest, submission: Submission) -> None:
    """What becomes of the upload. Should Redis lose the job, it comes back as one that was retried:
    its next end has a `webhook-id` that nobody has seen."""
    if submission.outcome == "hit":
        storage.remove(manifest.job_id)
        return
    with suppress(OSError):  # it has ended already, or the disk is full
        storage.keep_manifest(manifest)
    if submission.outcome == "joined":
        storage.share_audio(submission.other, manifest.job_id)
