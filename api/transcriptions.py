"""POST /transcribe: an upload becomes a durable job."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from api.access import audit, caller_of
from api.dependencies import State, state_of
from api.errors import answers
from api.uploads import FORM_OVERHEAD_BYTES, Upload, receive, too_large
from shared.errors import (
    AudioMinutesUsed,
    EmptyFile,
    FileTooLarge,
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
    UploadTooSlow,
)
from shared.jobs import JobStatus
from shared.metrics import OUTCOMES, REJECTIONS
from shared.options import TranscriptionOptions, fingerprint
from shared.schemas import JobAccepted, Links
from shared.storage import Manifest

log = logging.getLogger(__name__)
router = APIRouter(tags=["transcription"])

MESSAGES = {
    "new": "Transcription job submitted successfully",
    "joined": "The same file is being transcribed already; this job shares its result",
    "hit": "The same file was transcribed before; the result is ready",
}


def form_schema() -> dict[str, Any]:
    """The OpenAPI schema of the form: the file, and every option with its limits."""
    schema = TranscriptionOptions.model_json_schema(ref_template="#/components/schemas/{model}")
    properties = {
        "file": {
            "type": "string",
            "format": "binary",
            "description": "The recording: any audio or video file that FFmpeg can read.",
        },
        **schema["properties"],
    }
    definitions = schema.get("$defs", {})
    vad = {
        "type": "string",
        "description": "JSON object: " + ", ".join(definitions["VadParameters"]["properties"]),
    }
    properties["vad_parameters"] = vad
    properties["temperature"] = {
        "type": "string",
        "default": "0.0,0.2,0.4,0.6,0.8,1.0",
        "description": properties["temperature"]["description"],
    }
    return {"type": "object", "required": ["file"], "properties": properties}


@router.post(
    "/transcribe",
    status_code=202,
    response_model=JobAccepted,
    summary="Submit a recording",
    responses=answers(
        MalformedUpload,
        UploadTooSlow,
        FileTooLarge,
        NotAudio,
        MissingFile,
        EmptyFile,
        InvalidField,
        StoreUnavailable,
        StoreFull,
        QueueFull,
        TooManyJobs,
        AudioMinutesUsed,
        StorageFull,
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form_schema()}},
        }
    },
)
async def transcribe(request: Request, response: Response) -> JobAccepted:
    """Stores the upload and queues its transcription.

    Answers as soon as the job is durable. The same file with the same options is transcribed once,
    however often it is sent, so a request may be repeated safely.
    """
    state = state_of(request)
    try:
        accepted = await accept(request, state)
        audit(request, "job_submitted", accepted.job_id)
    except ServiceError as exc:
        state.metrics.rejected.labels(REJECTIONS.get(exc.code, "invalid")).inc()
        raise
    response.headers["Location"] = accepted.links.status
    response.headers["Retry-After"] = "1"
    return accepted


async def accept(request: Request, state: State) -> JobAccepted:
    settings, storage, caller = state.settings, state.storage, caller_of(request)
    announced = request.headers.get("content-length", "")
    announced_bytes = int(announced) if announced.isdigit() else None
    if (announced_bytes or 0) > settings.max_file_size_bytes + FORM_OVERHEAD_BYTES:
        raise too_large(settings.max_file_size_bytes)
    await state.admission.before_body(announced_bytes)

    job_id = str(uuid4())
    is_kept = False
    try:
        part = await asyncio.to_thread(storage.begin, job_id, announced_bytes or 0)
        state.admission.reserved()
        upload = await receive(
            request.stream(),
            request.headers.get("content-type", ""),
            part,
            settings.max_file_size_bytes,
            settings.upload_patience_seconds,
        )
        manifest = manifest_of(
            job_id, upload, settings.model_key, caller.name, is_shared=settings.share_results
        )
        await asyncio.to_thread(storage.keep, manifest)
        submission = await state.admission.submit(manifest, caller.limits)
        is_kept = submission.outcome != "hit"
    except ClientDisconnect as exc:
        raise MalformedUpload("The connection ended in the middle of the upload.") from exc
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFull from exc
        raise
    finally:
        if not is_kept:
            await asyncio.to_thread(storage.remove, job_id)
    if submission.leader:
        await asyncio.to_thread(storage.share_audio, submission.leader, job_id)

    state.metrics.submitted.labels("transcribe", settings.model_size).inc()
    state.metrics.cache.labels(OUTCOMES[submission.outcome]).inc()
    state.metrics.upload_size.observe(upload.size_bytes)
    log.info(
        "job accepted",
        extra={
            "action": "job_accepted",
            "job_id": job_id,
            "outcome": submission.outcome,
            "size_bytes": upload.size_bytes,
        },
    )
    return JobAccepted(
        job_id=job_id,
        status=JobStatus.COMPLETED if submission.outcome == "hit" else JobStatus.QUEUED,
        message=MESSAGES[submission.outcome],
        deduplicated=submission.outcome != "new",
        links=links(job_id),
    )


def manifest_of(
    job_id: str, upload: Upload, model_key: str, owner: str, *, is_shared: bool
) -> Manifest:
    """`is_shared`: the transcription may be that of another owner. Raises InvalidField naming every
    field that is wrong."""
    try:
        options = TranscriptionOptions.model_validate(upload.fields)
    except ValidationError as exc:
        raise InvalidField([_field_problem(dict(error)) for error in exc.errors()]) from exc
    return Manifest(
        job_id=job_id,
        fingerprint=fingerprint(
            upload.checksum, options, model_key, tenant="" if is_shared else owner
        ),
        checksum=upload.checksum,
        options=options.canonical(),
        model=model_key,
        size_bytes=upload.size_bytes,
        owner=owner,
    )


def _field_problem(error: dict[str, Any]) -> tuple[str, str]:
    field = ".".join(str(part) for part in error["loc"])[:64]
    if error["type"] == "extra_forbidden":
        return field, "is not a field of this endpoint; its fields are listed at /docs"
    return field, str(error["msg"]).removeprefix("Value error, ")


def links(job_id: str) -> Links:
    return Links(status=f"/status/{job_id}", result=f"/result/{job_id}", cancel=f"/jobs/{job_id}")
