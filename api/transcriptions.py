"""POST /transcribe: an upload becomes a durable job."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response

from api import idempotency
from api.dependencies import state_of
from api.errors import answers
from api.forms import form_schema, options_of
from api.intake import Arrival, announced_bytes, show, take_in
from api.uploads import receive
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
        IdempotencyConflict,
        StoreUnavailable,
        StoreFull,
        QueueFull,
        TooManyJobs,
        AudioMinutesUsed,
        StorageFull,
    ),
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
        received = await receive(
            request.stream(),
            request.headers.get("content-type", ""),
            path,
            settings.max_file_size_bytes,
            settings.upload_patience_seconds,
        )
        options, job = options_of(received.fields)
        return Arrival(received.checksum, received.size_bytes, options, job)

    settings = state_of(request).settings
    return show(response, await take_in(request, upload, announced_bytes(request)))
