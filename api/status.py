"""GET /status: how far a job is, at once or as soon as there is something new."""

from __future__ import annotations

import math
import re
from hashlib import blake2b
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from starlette.datastructures import QueryParams

from api.access import caller_of
from api.bare import Bare
from api.dependencies import connection_of, state_of
from api.errors import answers
from api.hub import has_ended
from api.intake import links
from api.middleware import WAITS
from api.snapshot import Snapshot
from shared.errors import (
    InvalidField,
    JobExpired,
    JobNotFound,
    StoreUnavailable,
    TooManyWaiters,
)
from shared.jobs import Job, JobStatus
from shared.schemas import Failure, JobView

router = APIRouter(tags=["jobs"], route_class=Bare)

ANY = "*"
MOST_SECONDS = 60  # that a request may wait; nginx waits longer than this for an answer

JOB_ID: dict[str, Any] = {
    "name": "job_id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "format": "uuid"},
}
WAIT: dict[str, Any] = {
    "name": "wait",
    "in": "query",
    "description": (
        "Seconds. The answer comes when the job has ended; with `If-None-Match`, when the answer "
        "with that `ETag` has become old; at the latest after so long."
    ),
    "schema": {"type": "number", "minimum": 0, "maximum": MOST_SECONDS, "default": 0},
}
IF_NONE_MATCH: dict[str, Any] = {
    "name": "If-None-Match",
    "in": "header",
    "description": "The `ETag` of an earlier answer: 304 while nothing is new.",
    "schema": {"type": "string"},
}


@router.get(
    "/status/{job_id}",
    response_model=JobView,
    summary="Ask how far a job is, or wait for it",
    responses={
        304: {"description": "Nothing is new since the answer with that `ETag`."},
        **answers(JobNotFound, JobExpired, InvalidField, StoreUnavailable, TooManyWaiters),
    },
    openapi_extra={"parameters": [JOB_ID, WAIT, IF_NONE_MATCH]},
)
async def status(request: Request) -> Response:
    """At once; or with `wait` when the job has ended, or when the answer that the client has is
    old. The place in the queue makes an answer old, but ends no wait."""
    state, sees = state_of(request), caller_of(request).sees
    seconds, known = wait_of(request), known_tags(request)
    job_id = job_id_of(request.path_params["job_id"])
    request.scope["state"][WAITS] = seconds > 0
    known_cores = tuple(map(core_of, known))
    job = await state.hub.until(
        lambda job: has_ended(job) or (bool(known) and core(job) not in known_cores),
        job_id,
        sees,
        "status",
        connection_of(request),
        seconds,
        only_end=not known,
    )
    headers = {"Cache-Control": "no-store", "ETag": f'W/"{tag(job)}"'}
    if not job.status.is_terminal:
        headers["Retry-After"] = str(poll_after_seconds(job))
    if tag(job) in known or ANY in known:
        return Response(status_code=304, headers=headers)
    look = await state.admission.look() if job.queue_position else None
    body = view(job, look).model_dump_json()
    return Response(body, media_type="application/json", headers=headers)


def job_id_of(text: str) -> str:
    """The canonical form of an id; whatever is no UUID was never one of ours."""
    try:
        return str(UUID(text))
    except ValueError as exc:
        raise JobNotFound from exc


def wait_of(request: Request) -> float:
    """Seconds. Raises InvalidField."""
    text = QueryParams(request.scope["query_string"]).get("wait", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MOST_SECONDS:
        raise InvalidField([("wait", f"must be a number of seconds from 0 to {MOST_SECONDS}")])
    return seconds


def known_tags(request: Request) -> tuple[str, ...]:
    """Those that the client has an answer with; ANY for whatever there is."""
    given = request.headers.get("if-none-match", "")
    return (ANY,) if given.strip() == ANY else tuple(re.findall(r'"([^"]*)"', given))


def tag(job: Job) -> str:
    """Of the answer that shows this job. Its first half, `core`, is what became of the job itself;
    the place in the queue changes with other jobs, and nobody is woken for that."""
    return f"{core(job)}-{job.queue_position or 0}"


def core(job: Job) -> str:
    return blake2b(repr(job.facts).encode(), digest_size=8).hexdigest()


def core_of(tag: str) -> str:
    return tag.partition("-")[0]


def poll_after_seconds(job: Job) -> int:
    """A polite client asks again after this: soon for the next in line, later for the far back."""
    if job.status is JobStatus.PROCESSING:
        return 1
    return min(30, 1 + (job.queue_position or 1) // 10)


def estimated_wait_seconds(job: Job, look: Snapshot | None) -> float | None:
    """Its share of the whole queue's time, as if all jobs in it were of one size."""
    if look is None or look.wait_seconds is None or not job.queue_position:
        return None
    ahead = (job.queue_position - 1) / max(look.queued, job.queue_position)
    return round(look.wait_seconds * ahead, 1)


def view(job: Job, look: Snapshot | None = None) -> JobView:
    # A job that was answered from the cache, or joined late, did not wait for the whole run.
    began = max(job.started_at, job.submitted_at) if job.started_at else None
    if job.outcome == "hit":
        began = job.finished_at
    ended = job.finished_at
    return JobView(
        job_id=job.job_id,
        status=job.status,
        progress=job.progress,
        queue_position=job.queue_position,
        estimated_wait_seconds=estimated_wait_seconds(job, look),
        batch_id=job.batch_id,
        deduplicated=job.outcome != "new",
        metadata=job.options.metadata,
        priority=job.options.priority,
        attempts=job.attempts,
        duration=job.duration,
        submitted_at=job.submitted_at,
        started_at=began,
        finished_at=ended,
        expires_at=job.expires_at,
        queue_seconds=(began - job.submitted_at).total_seconds() if began else None,
        processing_seconds=(ended - began).total_seconds() if began and ended else None,
        error=Failure(code=job.error_code, message=job.error_message) if job.error_code else None,
        links=links(job.job_id),
    )
