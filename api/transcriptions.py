"""POST /transcribe: an upload becomes a durable job."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response

from api import idempotency
from api.dependencies import state_of
from api.errors import answers
from api.forms import form_schema, options_of
from api.intake import Arrival, announced_bytes, show, take_in
from api.uploads import Judge, Upload, once, receive
from shared.errors import (
    AudioMinutesUsed,
    EmptyFile,
    FileTooLarge,
    IdempotencyConflict,
    InvalidField,
    MalformedUpload,
    MissingFile,
    NotAudio,
    QueueFull,
    StorageFull,
    StoreFull,
    StoreUnavailable,
    TooManyJobs,
    UploadTooSlow,
)
from shared.schemas import JobAccepted

router = APIRouter(tags=["transcription"])

REFUSALS = (  # what can be wrong with an upload, or in its way
    MalformedUpload,
    UploadTooSlow,
    FileTooLarge,
    NotAudio,
    MissingFile,
    EmptyFile,
    InvalidField,
    IdempotencyConflict,
    StoreUnavailable,
    StoreFull,
    QueueFull,
    TooManyJobs,
    AudioMinutesUsed,
    StorageFull,
)


@router.post(
    "/transcribe",
    status_code=202,
    response_model=JobAccepted,
    summary="Submit a recording",
    responses=answers(*REFUSALS),
    openapi_extra={
        "parameters": [idempotency.PARAMETER],
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form_schema()}},
        },
    },
)
async def transcribe(request: Request, response: Response) -> JobAccepted:
    """Stores the upload and queues its transcription.

    Answers as soon as the job is durable. The same file with the same options is transcribed once,
    however often it is sent, so a request may be repeated safely.
    """

    async def upload(path: Path) -> Arrival:
        form = await uploaded(request, path)
        options, job = options_of(form.fields)
        return Arrival(form.checksum, form.size_bytes, options, job)

    return show(response, await take_in(request, upload, announced_bytes(request)))


async def uploaded(request: Request, path: Path, judge: Judge = once) -> Upload:
    """The form that this request brings, its file at `path`. Raises as api.uploads.receive does."""
    settings = state_of(request).settings
    return await receive(
        request.stream(),
        request.headers.get("content-type", ""),
        path,
        settings.max_file_size_bytes,
        settings.upload_patience_seconds,
        judge,
    )
