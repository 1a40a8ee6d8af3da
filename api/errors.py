"""The one table from error to HTTP status, and the handlers that write application/problem+json;
below /v1 OpenAI's envelope (api/openai/envelope.py)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from api.openai import envelope
from shared import errors
from shared.schemas import FieldProblem, Problem

log = logging.getLogger(__name__)

# The first class that matches wins, so a subclass stands before its parent.
STATUS: dict[type[errors.ServiceError], int] = {
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.InvalidField: 422,
    errors.MalformedUpload: 400,
    errors.MalformedBody: 400,
    errors.MissingFile: 422,
    errors.EmptyFile: 422,
    errors.FileTooLarge: 413,
    errors.NotAudio: 415,
    errors.UploadTooSlow: 408,
    errors.BatchTooLarge: 413,
    errors.IdempotencyConflict: 409,
    errors.DigestUnknown: 404,
    errors.ListingOff: 403,
    errors.BatchNotFound: 404,
    errors.JobEndedAlready: 409,
    errors.JobNotFailed: 409,
    errors.RetryInVain: 409,
    errors.UploadGone: 410,
    errors.UrlNotAllowed: 422,
    errors.UrlUnreachable: 424,
    errors.UrlStatus: 424,
    errors.UrlTooSlow: 424,
    errors.JobNotFound: 404,
    errors.ModelNotFound: 404,
    errors.JobExpired: 410,
    errors.WebhookNotFound: 404,
    errors.ResultNotReady: 409,
    errors.JobCancelled: 409,
    errors.JobFailed: 422,
    errors.RequestError: 400,
    errors.StoreUnavailable: 503,
    errors.LimitReached: 429,
    errors.StorageFull: 507,
    errors.Unavailable: 503,
    errors.MediaError: 422,
    errors.ServiceError: 500,
}
# OpenAI's clients send again what is answered by 409 or 5xx, unless they are told not to.
IN_VAIN = (errors.TranscriptionError, errors.JobCancelled, errors.IdempotencyConflict)
DEFAULT_RETRY_AFTER_SECONDS = 5
PROBLEM_TYPE = "application/problem+json"


def status_of(error: errors.ServiceError) -> int:
    return next(status for kind, status in STATUS.items() if isinstance(error, kind))


def answers(*kinds: type[errors.ServiceError]) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of an endpoint that can end with these."""
    texts: dict[int, list[str]] = {}
    for kind in kinds:
        text = f"`{kind.code}`: {' '.join((kind.__doc__ or '').split())}"
        texts.setdefault(status_of(kind.__new__(kind)), []).append(text)
    return {
        status: {"model": Problem, "description": "\n\n".join(texts[status])}
        for status in sorted(texts)
    }


def problem(
    request: Request,
    status: int,
    code: str,
    detail: str,
    fields: list[FieldProblem] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An RFC 9457 answer. `detail` is one sentence for people, `code` is for programs."""
    if envelope.is_asked(request.scope["path"]):
        return envelope.envelope(request, status, code, detail, fields, headers)
    body = Problem(
        type=f"/docs/errors#{code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        request_id=getattr(request.state, "request_id", ""),
        errors=fields or [],
    )
    return JSONResponse(
        body.model_dump(mode="json", exclude_defaults=not fields),
        status_code=status,
        media_type=PROBLEM_TYPE,
        headers=dict(headers or {}),
    )


async def service_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, errors.ServiceError)
    status = status_of(exc)
    headers = {}
    if isinstance(exc, errors.Unavailable | errors.ResultNotReady):
        headers["Retry-After"] = str(exc.retry_after_seconds or DEFAULT_RETRY_AFTER_SECONDS)
    if isinstance(exc, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(exc, IN_VAIN):
        headers["X-Should-Retry"] = "false"
    fields = None
    if isinstance(exc, errors.InvalidField):
        fields = [FieldProblem(field=field, message=text) for field, text in exc.errors]
    return problem(request, status, exc.code, exc.message, fields, headers)


async def http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    details = {
        404: "There is nothing at this address; the endpoints are listed at /docs.",
        405: "This address does not take that method; the endpoints are listed at /docs.",
    }
    detail = details.get(exc.status_code, str(exc.detail))
    code = codes.get(exc.status_code, "http_error")
    return problem(request, exc.status_code, code, detail, None, exc.headers)


async def invalid_parameters(request: Request, exc: Exception) -> Response:
    """Query and path parameters; never echoes what was sent."""
    assert isinstance(exc, RequestValidationError)
    fields = [
        FieldProblem(field=str(error["loc"][-1])[:64], message=parameter_message(error))
        for error in exc.errors()
    ]
    detail = "; ".join(f"{field.field}: {field.message}" for field in fields)
    return problem(request, 422, errors.InvalidField.code, detail, fields)


def parameter_message(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "is not a parameter of this endpoint; its parameters are listed at /docs"
    return str(error["msg"]).removeprefix("Value error, ")


async def unexpected(request: Request, exc: Exception) -> Response:
    log.error("unexpected error", exc_info=exc, extra={"action": "unexpected_error"})
    detail = "An error on our side; the log has its details under this request_id."
    return problem(request, 500, "internal_error", detail)


def install(app: FastAPI) -> None:
    app.add_exception_handler(errors.ServiceError, service_error)
    app.add_exception_handler(HTTPException, http_exception)
    app.add_exception_handler(RequestValidationError, invalid_parameters)
