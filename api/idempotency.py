"""`Idempotency-Key`: a request that is sent again, because its answer was lost, submits nothing
twice.

A key belongs to its caller; of it, and of the request, the store keeps digests. Whether it is known
is decided in shared/lua/submit.lua, in one step with the submission, so that it holds for requests
that arrive at the same time, at whichever API process.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from fastapi import Request

from api.access import caller_of
from shared.errors import InvalidField

HEADER = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"
_KEY = re.compile(r"[\x20-\x7e]{1,255}")

PARAMETER: dict[str, Any] = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "description": "A word of yours for this request, as a UUID. The same request with the same "
    "key, sent again, is answered with the job that the first one made.",
}


def key_of(request: Request) -> str | None:
    """None where none was sent. Raises InvalidField."""
    keys = request.headers.getlist(HEADER)
    if len(keys) > 1:
        raise InvalidField([(HEADER, "was sent twice")])
    if keys and not _KEY.fullmatch(keys[0]):
        raise InvalidField([(HEADER, "must be 1 to 255 printable ASCII characters")])
    return keys[0] if keys else None


def told(request: Request, content: list[Any]) -> dict[str, str]:
    """What a job's record and its manifest keep, so that the store knows the request again: nothing
    without a key. `content`: what makes two requests the same, as JSON has it."""
    key = key_of(request)
    if key is None:
        return {}
    return {
        "idempotency": f"{caller_of(request).name}/{_digest(key)}",
        "request": _digest(json.dumps(content, sort_keys=True)),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
