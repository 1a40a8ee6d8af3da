"""The form of POST /transcribe: which fields it has, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import Request
from pydantic import BaseModel, ValidationError

from api.uploads import paced
from shared.errors import InvalidField, MalformedBody
from shared.job_options import JobOptions
from shared.options import TranscriptionOptions

MAX_BODY_BYTES = 64 * 1024  # without a file
URL_SCHEMA = {
    "type": "string",
    "description": "Address of the recording, instead of the file: it is fetched at once.",
}
Options = TypeVar("Options", bound=BaseModel)


def form_schema() -> dict[str, Any]:
    """The OpenAPI schema of the form: the file, and every option with its limits."""
    schema = TranscriptionOptions.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.get("$defs", {})
    job = JobOptions.model_json_schema()
    properties = {
        "file": {
            "type": "string",
            "format": "binary",
            "description": "The recording: any audio or video file that FFmpeg can read.",
        },
        **schema["properties"],
        **job["properties"],
    }
    properties["vad_parameters"] = {
        "type": "string",
        "description": "JSON object: " + ", ".join(definitions["VadParameters"]["properties"]),
    }
    properties["temperature"] = {
        "type": "string",
        "default": "0.0,0.2,0.4,0.6,0.8,1.0",
        "description": properties["temperature"]["description"],
    }
    properties["metadata"] = {
        "type": "string",
        "description": properties["metadata"]["description"],
    }
    properties["priority"] = {
        **job["$defs"]["Priority"],
        "default": "normal",
        "description": properties["priority"]["description"],
    }
    return {"type": "object", "required": ["file"], "properties": properties}


def body_schemas() -> dict[str, Any]:
    """The same, by content type, where an address may come instead of the file: a form with files
    has either, others the address."""
    form = form_schema()["properties"]
    file = form.pop("file")
    of_json = {
        **TranscriptionOptions.model_json_schema()["properties"],
        **JobOptions.model_json_schema()["properties"],
        **{name: {} for name in ("vad_parameters", "temperature", "priority")},  # as in the form
    }
    schemas: dict[str, dict[str, Any]] = {
        "multipart/form-data": {"properties": {"file": file, "url": URL_SCHEMA, **form}},
        "application/x-www-form-urlencoded": {
            "required": ["url"],
            "properties": {"url": URL_SCHEMA, **form},
        },
        "application/json": {
            "required": ["url"],
            "properties": {"url": URL_SCHEMA, **of_json},
        },
    }
    return {kind: {"schema": {"type": "object", **each}} for kind, each in schemas.items()}


async def read_fields(request: Request, patience_seconds: float) -> dict[str, Any]:
    """The fields of a body without a file: a JSON object, or a simple form. Raises MalformedBody,
    UploadTooSlow."""
    body = bytearray()
    async for chunk in paced(request.stream(), patience_seconds):
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise MalformedBody
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            fields = json.loads(body)
        elif kind == "application/x-www-form-urlencoded":
            pairs = parse_qsl(body.decode(), keep_blank_values=True, errors="strict")
            fields = dict(pairs) if len(dict(pairs)) == len(pairs) else None
        else:
            fields = None
        if isinstance(fields, dict):
            "".join(fields).encode()  # not where a name has half of a surrogate pair
    except (ValueError, RecursionError) as exc:
        raise MalformedBody from exc
    if not isinstance(fields, dict):
        raise MalformedBody
    return fields


def options_of(fields: Mapping[str, Any]) -> tuple[TranscriptionOptions, JobOptions]:
    """What the fields ask for. Raises InvalidField naming every field that is wrong."""
    of_job = {name: value for name, value in fields.items() if name in JobOptions.model_fields}
    others = {name: value for name, value in fields.items() if name not in of_job}
    problems: list[tuple[str, str]] = []
    options = validated(TranscriptionOptions, others, problems)
    job = validated(JobOptions, of_job, problems)
    if options is None or job is None:
        raise InvalidField(problems)
    return options, job


def validated(
    kind: type[Options], fields: Mapping[str, Any], problems: list[tuple[str, str]]
) -> Options | None:
    """None: they are wrong, and `problems` says why."""
    try:
        return kind.model_validate(fields)
    except ValidationError as exc:
        problems += [_field_problem(dict(error)) for error in exc.errors()]
        return None


def _field_problem(error: dict[str, Any]) -> tuple[str, str]:
    field = ".".join(str(part) for part in error["loc"])[:64]
    if error["type"] == "extra_forbidden":
        return field, "is not a field of this endpoint; its fields are listed at /docs"
    return field, str(error["msg"]).removeprefix("Value error, ")
