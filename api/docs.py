"""/docs: the endpoints (Swagger UI from our own files) and the meaning of every error code."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse

from api.errors import status_of
from shared import errors

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parent / "static"


@router.get("/")
async def home() -> RedirectResponse:
    return RedirectResponse("/docs")


@router.get("/docs")
async def docs() -> FileResponse:
    return FileResponse(STATIC / "docs.html")


@router.get("/docs/errors")
async def error_codes() -> HTMLResponse:
    """Where the `type` of every error points to."""
    rows = "".join(
        f'<tr id="{code}"><td><code>{code}</code><td>{status}<td>{escape(text)}'
        for code, status, text in catalogue()
    )
    return HTMLResponse(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Error codes</title>'
        "<h1>Error codes</h1><p>A job that failed shows its code in <code>GET /status</code>; "
        "<code>GET /result</code> answers with it, too.</p>"
        f"<table><tr><th>code<th>HTTP status<th>meaning{rows}</table></html>"
    )


def catalogue() -> list[tuple[str, int, str]]:
    """(code, HTTP status, sentence) of every error that an answer can carry, once each."""
    found = {
        "not_found": (404, "There is nothing at this address."),
        "method_not_allowed": (405, "This address does not take that method."),
        "http_error": (400, "The request is not one that this address takes."),
        "internal_error": (500, "An error on our side; the log has it under the request_id."),
        # nginx's own (deploy/nginx/templates/answers.conf.template)
        "rate_limited": (429, "Too many requests from one address. Try again after Retry-After."),
        "unavailable": (503, "No API replica answered nginx. Try again after Retry-After."),
    }
    for kind in leaves(errors.ServiceError):
        if issubclass(kind, errors.MediaError | errors.TranscriptionError):
            found[kind.code] = status_of(errors.JobFailed(kind.code, "")), sentence(kind)
        elif (
            issubclass(kind, errors.RequestError | errors.Unavailable) and kind != errors.JobFailed
        ):
            found[kind.code] = status_of(kind.__new__(kind)), sentence(kind)
    return sorted((code, status, text) for code, (status, text) in found.items())


def leaves(kind: type[errors.ServiceError]) -> Iterator[type[errors.ServiceError]]:
    """The classes that are raised: those without subclasses."""
    children = kind.__subclasses__()
    if not children:
        yield kind
    for child in children:
        yield from leaves(child)


def sentence(kind: type[errors.ServiceError]) -> str:
    return (kind.__doc__ or "").strip()
