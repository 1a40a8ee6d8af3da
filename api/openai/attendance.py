"""A caller that waits for its job in the request that made it, and may leave before its end."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fastapi import Request
from starlette.requests import ClientDisconnect

from api.access import caller_of
from api.dependencies import connection_of, state_of
from api.jobs import end
from shared.errors import (
    JobEndedAlready,
    JobExpired,
    JobNotFound,
    StillRunning,
    StoreUnavailable,
)
from shared.jobs import Job

# OpenAI's clients come back after a timeout, at most 8 s later, and send all again.
RETURN_SECONDS = 10.0
TIMEOUTS = ("x-stainless-read-timeout", "x-stainless-timeout")  # of a Python client, of others
LOST = "The job store lost this job. Send it again."
ROUND_SECONDS = 1.0  # between two looks whether this process is to stop


def timeout_of(request: Request) -> float:
    """Seconds after which this client gives up; infinite where it does not say."""
    for name in TIMEOUTS:
        try:
            seconds = float(request.headers.get(name, ""))
        except ValueError:
            continue
        if seconds > 0:
            return seconds
    return math.inf


def is_repeated(request: Request) -> bool:
    """The client has sent this before: its transcription may be under way."""
    return request.headers.get("x-stainless-retry-count", "0") != "0"


async def ended(request: Request, job_id: str) -> Job:
    """The job, when it has ended. Raises ClientDisconnect when its caller leaves before;
    StillRunning when it takes too long, or this process is to stop; TooManyWaiters,
    StoreUnavailable."""
    state, connection = state_of(request), connection_of(request)
    sees = caller_of(request).sees
    seconds = state.settings.max_wait_seconds
    with never_lost():
        job = await state.hub.until_ended(job_id, sees, "openai", connection, seconds)
    if job.status.is_terminal:
        return job
    if connection.is_lost:
        raise ClientDisconnect
    raise StillRunning(retry_after_seconds=1)


@contextmanager
def never_lost() -> Iterator[None]:
    """Whoever waits has sent the job: that it is gone is no mistake of the caller's. Raises
    StoreUnavailable."""
    try:
        yield
    except (JobNotFound, JobExpired) as exc:
        raise StoreUnavailable(LOST) from exc


async def abandon(request: Request, job_id: str, after_seconds: float) -> None:
    """The job's caller has left. Unless the job ends meanwhile, it is cancelled after that time, in
    which the caller may come back: what another job waits for goes on. So does a job whose time is
    infinite, and that of a process which is to stop: its caller may be on the way to another."""
    if after_seconds == math.inf:
        return
    hub, clock = state_of(request).hub, asyncio.get_running_loop().time
    until = clock() + after_seconds
    while (left := until - clock()) > 0:
        if hub.is_draining:
            return
        await asyncio.sleep(min(ROUND_SECONDS, left))
    with suppress(JobEndedAlready, JobNotFound, StoreUnavailable):
        await end(request, job_id, erases=False)
