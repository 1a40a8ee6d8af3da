"""POST /transcribe: an upload, or what is at an address, becomes a durable job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from api import idempotency
from api.access import caller_of
from api.dependencies import state_of
from api.errors import answers
from api.fetch import Fetched
from api.forms import body_schemas, options_of, read_fields
from api.intake import REFUSALS, Arrival, announced_bytes, show, take_in, with_checked_webhook
from api.uploads import Judge, Upload, once, receive
from shared.errors import (
    InvalidField,
    MalformedBody,
    MissingFile,
    TooManyFetches,
    UrlStatus,
    UrlTooSlow,
    UrlUnreachable,
)
from shared.schemas import JobAccepted

router = APIRouter(tags=["transcription"])

WITHOUT_FILE = frozenset(body_schemas()) - {"multipart/form-data"}


@router.post(
    "/transcribe",
    status_code=202,
    response_model=JobAccepted,
    summary="Submit a recording",
    responses=answers(
        *REFUSALS, MalformedBody, UrlUnreachable, UrlStatus, UrlTooSlow, TooManyFetches
    ),
    openapi_extra={
        "parameters": [idempotency.PARAMETER],
        "requestBody": {
            "required": True,
            "content": body_schemas(),
        },
    },
)
async def transcribe(request: Request, response: Response) -> JobAccepted:
    """Stores the upload, or fetches what is at `url`, and queues its transcription.

    Answers as soon as the job is durable. The same file with the same options is transcribed once,
    however often it is sent, so a request may be repeated safely.
    """

    async def arrive(path: Path) -> Arrival:
        arrived: Upload | Fetched | None = None
        if is_without_file(request):
            fields = await named(request)
        else:
            arrived = await uploaded(request, path, takes_url=True)
            fields = arrived.fields
        url = fields.pop("url", "").strip()
        options, job = options_of(fields)
        if url:
            job = with_checked_webhook(job, state.egress)  # before anything is fetched
            arrived = await state.fetcher.fetch(url, path, caller_of(request).name)
        assert arrived
        return Arrival(arrived.checksum, arrived.size_bytes, options, job, url=url)

    state = state_of(request)
    return show(response, await take_in(request, arrive, announced_bytes(request)))


async def uploaded(
    request: Request, path: Path, judge: Judge = once, *, takes_url: bool = False
) -> Upload:
    """The form that this request brings, its file at `path`. Raises as api.uploads.receive does."""
    settings = state_of(request).settings
    return await receive(
        request.stream(),
        request.headers.get("content-type", ""),
        path,
        settings.max_file_size_bytes,
        settings.upload_patience_seconds,
        judge,
        takes_url=takes_url,
    )


def is_without_file(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0]
    return kind.strip().lower() in WITHOUT_FILE


async def named(request: Request) -> dict[str, Any]:
    """The fields of a body that names a `url`. Raises MalformedBody, UploadTooSlow, MissingFile,
    InvalidField."""
    fields = await read_fields(request, state_of(request).settings.upload_patience_seconds)
    if not isinstance(fields.setdefault("url", ""), str):
        raise InvalidField([("url", "must be text")])
    if not fields["url"].strip():
        raise MissingFile(
            "A body of this type names the recording by its address, as `url`. To send a file, use "
            "multipart/form-data."
        )
    return fields
