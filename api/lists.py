"""GET /jobs: the jobs of a caller, the newest first, page by page."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api.access import caller_of
from api.dependencies import state_of
from api.errors import answers
from api.status import view
from api.store import JobList
from shared.errors import InvalidField, ListingOff, StoreUnavailable
from shared.jobs import Job, JobStatus
from shared.schemas import JobPage, JobView
from shared.settings import Auth

router = APIRouter(tags=["jobs"])

MOST_JOBS = 100


@router.get(
    "/jobs",
    response_model=JobPage,
    summary="List jobs",
    responses=answers(ListingOff, InvalidField, StoreUnavailable),
)
async def list_jobs(
    request: Request,
    response: Response,
    status: Annotated[JobStatus | None, Query(description="Only jobs of this status.")] = None,
    batch: Annotated[
        str, Query(max_length=64, description="Only jobs of this batch, the last file first.")
    ] = "",
    limit: Annotated[int, Query(ge=1, le=MOST_JOBS, description="Most jobs in the page.")] = 20,
    cursor: Annotated[
        str, Query(pattern="^[0-9]{0,17}$", description="`next_cursor` of the page before.")
    ] = "",
) -> JobPage:
    """A page may hold fewer jobs than asked for, or none, and still not be the last: what counts is
    `next_cursor`. Expired jobs are not listed."""
    state, caller = state_of(request), caller_of(request)
    if not batch and state.settings.auth is Auth.NONE and not state.settings.list_jobs:
        raise ListingOff
    jobs, next_cursor = await state.store.page(
        JobList(caller.name, batch), caller.sees, cursor, status or "", limit
    )
    response.headers["Cache-Control"] = "no-store"
    return JobPage(jobs=await views(request, jobs), next_cursor=next_cursor or None)


async def views(request: Request, jobs: list[Job]) -> list[JobView]:
    is_queued = any(job.queue_position for job in jobs)
    look = await state_of(request).admission.look() if is_queued else None
    return [view(job, look) for job in jobs]
