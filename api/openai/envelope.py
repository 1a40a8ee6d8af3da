"""Errors as OpenAI's clients read them, for everything below /v1."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from shared.schemas import FieldProblem

PLACE = "/v1"
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_exceeded",
    503: "overloaded",
}
CODES = {  # where OpenAI has a name of its own
    "unauthorized": "invalid_api_key",
    "rate_limited": "rate_limit_exceeded",
    "audio_minutes_used": "insufficient_quota",
}
PARAMS = {  # the field that is wrong, by our code
    "model_not_found": "model",
    "url_not_allowed": "webhook_url",
    "missing_file": "file",
    "empty_file": "file",
    "file_too_large": "file",
    "unsupported_media": "file",
    "unreadable_media": "file",
    "no_audio_stream": "file",
    "truncated_media": "file",
    "audio_too_long": "file",
    "no_audio_samples": "file",
}


class ErrorBody(BaseModel):
    message: str = Field(description="One sentence that says what to do.")
    type: str
    param: str | None = Field(description="The field that is wrong, where it is one.")
    code: str = Field(description="Stable; switch on this.")


class ErrorEnvelope(BaseModel):
    """Every error below /v1."""

    error: ErrorBody


def is_asked(path: str) -> bool:
    return path == PLACE or path.startswith(f"{PLACE}/")


def told(status: int) -> int:
    """OpenAI's own service has no 422; its clients take 400 for a wrong request."""
    return 400 if status == 422 else status


def type_of(status: int) -> str:
    return TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def body_of(
    status: int, code: str, message: str, fields: list[FieldProblem] | None = None
) -> ErrorBody:
    """`status`, `code`: as in api/errors.py."""
    param = fields[0].field if fields else PARAMS.get(code)
    return ErrorBody(
        message=message, type=type_of(told(status)), param=param, code=CODES.get(code, code)
    )


def envelope(
    request: Request,
    status: int,
    code: str,
    message: str,
    fields: list[FieldProblem] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The arguments are those of api.errors.problem."""
    body = ErrorEnvelope(error=body_of(status, code, message, fields))
    answer = JSONResponse(body.model_dump(), status_code=told(status), headers=dict(headers or {}))
    if job_id := getattr(request.state, "job_id", ""):
        answer.headers["X-Job-Id"] = job_id
    return answer
