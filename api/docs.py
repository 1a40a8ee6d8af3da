"""/docs: the endpoints (Swagger UI from our own files) and the meaning of every error code."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from api.access import needed
from api.errors import PROBLEM_TYPE, answers, status_of
from api.openai.envelope import ErrorEnvelope, is_asked, told
from shared import errors
from shared.settings import Auth

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parent / "static"


KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def openapi(app: FastAPI, auth: Auth) -> dict[str, Any]:
    """FastAPI's document, but for errors: they are problems (api/errors.py), in their own type."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    for operation in operations_of(document):
        # FastAPI names this wherever there is a parameter; ours are described where they occur.
        if "HTTPValidationError" in str(operation["responses"].get("422")):
            del operation["responses"]["422"]
        for response in operation["responses"].values():
            if "Problem" in str(response.get("content")):
                response["content"] = {PROBLEM_TYPE: response["content"]["application/json"]}
    if auth is Auth.KEYS:
        demand_keys(document)
    for path, operations in document["paths"].items():
        if is_asked(path):
            for operation in operations.values():
                operation["responses"] = in_envelopes(operation["responses"])
    document["components"]["schemas"] |= definitions(ErrorEnvelope)
    for unused in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(unused, None)
    return document


def operations_of(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def in_envelopes(responses: dict[str, Any]) -> dict[str, Any]:
    """The same, with errors as they are below /v1."""
    made: dict[str, Any] = {}
    for status, response in responses.items():
        if PROBLEM_TYPE not in response.get("content", {}):
            made[status] = response
            continue
        content = {"schema": {"$ref": f"#/components/schemas/{ErrorEnvelope.__name__}"}}
        told_as = made.setdefault(
            str(told(int(status))), {"description": "", "content": {"application/json": content}}
        )
        texts = [told_as["description"], response["description"]]
        told_as["description"] = "\n\n".join(filter(None, texts))
    return made


class WholeFiles(StaticFiles):
    """Never a range of a file: a wrong one would be answered with an error of another shape."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [header for header in scope["headers"] if header[0] != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)


def definitions(model: type[BaseModel]) -> dict[str, Any]:
    """For the document's components: the model's schema and those that it names."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs", {}), model.__name__: schema}


def demand_keys(document: dict[str, Any]) -> None:
    """What every guarded endpoint asks for, and may answer without one."""
    document["components"]["securitySchemes"] = KEY_SCHEMES
    problem = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    refusals = answers(errors.Unauthorized, errors.Forbidden, errors.RateLimited)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if needed(method.upper(), path):
                operation["security"] = [{name: []} for name in KEY_SCHEMES]
                for status, answer in refusals.items():
                    described = {"description": answer["description"], "content": problem}
                    operation["responses"].setdefault(str(status), described)


@router.get("/")
async def home() -> RedirectResponse:
    return RedirectResponse("/docs")


@router.get("/docs")
async def docs() -> HTMLResponse:
    return HTMLResponse(page())


@functools.cache
def page() -> str:
    return (STATIC / "docs.html").read_text()


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
