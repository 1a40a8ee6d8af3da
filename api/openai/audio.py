"""POST /v1/audio/transcriptions and /v1/audio/translations: a job like any other, whose caller
waits for its transcript."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from api import idempotency
from api.access import caller_of
from api.admission import READ_ANYWAY_BYTES
from api.bare import Bare
from api.dependencies import state_of
from api.errors import answers
from api.intake import REFUSALS, Arrival, announced_bytes, take_in
from api.middleware import WAITS
from api.openai import fields
from api.openai.answers import ANSWER, CONTENT, answer, transcript_of
from api.openai.attendance import (
    RETURN_SECONDS,
    abandon,
    ended,
    is_repeated,
    never_lost,
    timeout_of,
)
from api.openai.fields import Asked
from api.openai.stream import TextStream
from api.transcriptions import uploaded
from api.uploads import Field
from shared.errors import (
    JobCancelled,
    MediaError,
    ModelNotFound,
    StillRunning,
    TooManyWaiters,
    TranscriptionError,
    WaitTooLong,
)
from shared.options import Task
from shared.schemas import JobAccepted

router = APIRouter(tags=["openai"], route_class=Bare)
CLIENT_LEFT = 499  # nginx's word for it; nobody reads it
HEADERS = ("X-Job-Id", "X-Ignored-Fields", "X-Should-Retry")  # of the answers
CLIENTS_HEADERS = (  # of the requests that OpenAI's clients send from browsers
    "OpenAI-Organization",
    "OpenAI-Project",
    "X-Stainless-Arch",
    "X-Stainless-Helper-Method",
    "X-Stainless-Lang",
    "X-Stainless-OS",
    "X-Stainless-Package-Version",
    "X-Stainless-Retry-Count",
    "X-Stainless-Runtime",
    "X-Stainless-Runtime-Version",
    "X-Stainless-Timeout",
)

ENDPOINT: dict[str, Any] = {
    "response_model": None,
    "responses": {
        200: {"model": ANSWER, "content": CONTENT},
        **answers(
            *REFUSALS,
            ModelNotFound,
            MediaError,
            JobCancelled,
            TranscriptionError,
            WaitTooLong,
            TooManyWaiters,
            StillRunning,
        ),
    },
    "openapi_extra": {
        "parameters": [idempotency.PARAMETER],
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": fields.schema()}},
        },
    },
}


@router.post("/v1/audio/transcriptions", summary="Transcribe, and wait for it", **ENDPOINT)
async def transcriptions(request: Request) -> ASGIApp:
    """OpenAI's endpoint. The same file with the same fields is transcribed once, however often it
    is sent, so a client that lost patience may send it again."""
    return await serve(request, "transcribe")


@router.post("/v1/audio/translations", summary="Translate into English, and wait", **ENDPOINT)
async def translations(request: Request) -> ASGIApp:
    """OpenAI's endpoint. Takes the fields of the other one, too."""
    return await serve(request, "translate")


async def serve(request: Request, task: Task) -> ASGIApp:
    began = time.monotonic()
    asked, accepted = await submit(request, task)
    # To send it again takes as long as it took.
    return_seconds = RETURN_SECONDS + 2 * (time.monotonic() - began)
    if asked.job.webhook_url or idempotency.HEADER in request.headers:
        return_seconds = inf  # the job is of use without its caller
    job_id = request.state.job_id = accepted.job_id
    request.scope["state"][WAITS] = True
    headers = {"X-Job-Id": job_id, "Cache-Control": "no-store"}
    if accepted.is_replayed:
        headers[idempotency.REPLAYED] = "true"
    if asked.ignored:
        headers["X-Ignored-Fields"] = shown(asked.ignored)
    state = state_of(request)
    if asked.is_streamed:
        with never_lost():
            job = await state.store.read(job_id, caller_of(request).sees)
        return TextStream(request, job, return_seconds, headers)
    try:
        job = await ended(request, job_id)
    except ClientDisconnect:
        await abandon(request, job_id, return_seconds)
        return Response(status_code=CLIENT_LEFT)
    with never_lost():
        transcript = await transcript_of(state, job)
    response = await asyncio.to_thread(answer, asked, transcript)
    response.headers.update(headers)
    return response


async def submit(request: Request, task: Task) -> tuple[Asked, JobAccepted]:
    """What is asked for, and its job."""
    state = state_of(request)
    settings = state.settings
    patience_seconds = min(timeout_of(request), settings.max_wait_seconds)
    size_bytes = announced_bytes(request)
    late = None
    if not is_repeated(request) and (size_bytes is None or size_bytes > READ_ANYWAY_BYTES):
        late = await state.admission.lateness(caller_of(request).name, patience_seconds)
    judge_fields = fields.judge(settings.model_size)
    asked: list[Asked] = []

    def judge(name: str, before: Sequence[Field]) -> None:
        judge_fields(name, before)
        if name == "file" and late and fields.will_wait(before):
            raise late

    async def upload(path: Path) -> Arrival:
        if state.hub.count >= settings.max_waiters:  # asked again when it begins to wait
            raise TooManyWaiters
        form = await uploaded(request, path, judge)
        it = fields.asked_of(form.sent, task, settings.model_size)
        asked.append(it)
        return Arrival(
            form.checksum,
            form.size_bytes,
            it.options,
            it.job,
            inf if it.is_streamed else patience_seconds,
        )

    accepted = await take_in(request, upload, size_bytes, endpoint="openai")
    return asked[0], accepted


def shown(names: Sequence[str]) -> str:
    """Of any length and letters, in a header."""
    return ", ".join(re.sub(r"[^A-Za-z0-9_.\[\]-]", "?", name[:64]) for name in names[:10])
