"""POST /transcribe/by-digest, HEAD /transcribe: is this file known? Then it need not be sent.

Whoever knows the digest of a file is taken for somebody who has it. What is known is what the same
upload would find: with API keys the caller's own, unless results are shared (SECURITY.md).
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from api import idempotency
from api.access import caller_of
from api.dependencies import state_of
from api.errors import answers
from api.forms import form_schema, options_of, read_fields
from api.intake import Arrival, fingerprint_of, place_for, refusing, show, submit
from shared.errors import (
    AudioMinutesUsed,
    DigestUnknown,
    IdempotencyConflict,
    InvalidField,
    MalformedBody,
    StorageFull,
    StoreFull,
    StoreUnavailable,
    TooManyJobs,
    UploadTooSlow,
    UrlNotAllowed,
)
from shared.schemas import JobAccepted

router = APIRouter(tags=["transcription"])

_HEX = re.compile(r"[0-9a-fA-F]{64}")
_REPR_DIGEST = re.compile(r"(?:^|[,\s])sha-256=:([A-Za-z0-9+/]{43}=):")


def digest_schema() -> dict[str, Any]:
    schema = form_schema()
    del schema["properties"]["file"]
    sha256 = {"type": "string", "pattern": "^[0-9a-fA-F]{64}$", "description": "Of the file, hex."}
    return {
        **schema,
        "required": ["sha256"],
        "properties": {"sha256": sha256, **schema["properties"]},
    }


@router.post(
    "/transcribe/by-digest",
    status_code=202,
    response_model=JobAccepted,
    summary="Submit a recording that the service knows already",
    responses=answers(
        MalformedBody,
        UploadTooSlow,
        InvalidField,
        UrlNotAllowed,
        DigestUnknown,
        IdempotencyConflict,
        StoreUnavailable,
        StoreFull,
        TooManyJobs,
        AudioMinutesUsed,
        StorageFull,
    ),
    openapi_extra={
        "parameters": [idempotency.PARAMETER],
        "requestBody": {
            "required": True,
            "content": {
                kind: {"schema": digest_schema()}
                for kind in ("application/x-www-form-urlencoded", "application/json")
            },
        },
    },
)
async def by_digest(request: Request, response: Response) -> JobAccepted:
    """Answers as if the file had been uploaded, where its transcript is there or under way.
    Otherwise `digest_unknown`: upload it."""
    state = state_of(request)
    with refusing(state):
        fields = await read_fields(request, state.settings.upload_patience_seconds)
        arrival = arrival_of(request, fields)
        told = idempotency.told(request, arrival.content)
        await state.admission.before_body(0, caller_of(request).name)
        async with place_for(state) as place:
            fingerprint = fingerprint_of(arrival, caller_of(request).name, state.settings)
            _, holders = await state.store.known(fingerprint)
            size_bytes = await asyncio.to_thread(state.storage.borrow_audio, holders, place.job_id)
            # A job that joins must have its upload, for when the others leave, or Redis is lost.
            least = "hit" if size_bytes is None else "joined"
            known = replace(arrival, size_bytes=size_bytes or 0)
            return show(response, await submit(request, place, known, told, "by-digest", least))


@router.head("/transcribe", include_in_schema=False)
async def is_known(request: Request) -> Response:
    """200: POST /transcribe/by-digest with the same fields would not ask for the file. 404: it
    would."""
    state = state_of(request)
    arrival = arrival_of(request, request.query_params)
    fingerprint = fingerprint_of(arrival, caller_of(request).name, state.settings)
    outcome, _ = await state.store.known(fingerprint)
    if outcome == "new":
        raise DigestUnknown
    return Response(headers={"Cache-Control": "no-store"})


def arrival_of(request: Request, fields: Mapping[str, Any]) -> Arrival:
    """As if the file had arrived. Raises InvalidField."""
    others = {name: value for name, value in fields.items() if name != "sha256"}
    options, job = options_of(others)
    return Arrival(digest_of(request, fields.get("sha256")), 0, options, job)


def digest_of(request: Request, field: object) -> str:
    """By the field `sha256`, or the header `Repr-Digest` (RFC 9530). Raises InvalidField."""
    found = _REPR_DIGEST.search(request.headers.get("repr-digest", ""))
    in_header = base64.b64decode(found[1]).hex() if found else None
    if field is None and in_header is None:
        raise InvalidField([("sha256", "is missing: the SHA-256 of the file, 64 hex digits")])
    if field is not None and not (isinstance(field, str) and _HEX.fullmatch(field)):
        raise InvalidField([("sha256", "must be 64 hex digits")])
    digest = str(field).lower() if field is not None else in_header
    if in_header not in {None, digest}:
        raise InvalidField([("sha256", "is another digest than that of the header Repr-Digest")])
    return str(digest)
