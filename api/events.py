"""GET /jobs/{id}/events: a job's life as server-sent events (WHATWG HTML, 9.2).

What a stream has told is in the id of each event, whole; so nothing is kept for a client that is
away, and any replica can go on where another ended.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple, Self

from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.access import audit, caller_of, is_still_admitted
from api.bare import Bare
from api.dependencies import connection_of, state_of
from api.errors import answers
from api.middleware import WAITS
from api.segments import Segments
from api.snapshot import Snapshot
from api.status import JOB_ID, job_id_of, view
from shared.errors import (
    InvalidField,
    JobExpired,
    JobNotFound,
    StoreUnavailable,
    TooManyWaiters,
)
from shared.jobs import Job, JobStatus

router = APIRouter(tags=["jobs"], route_class=Bare)

HEARTBEAT_SECONDS = 15.0
RECONNECT_MS = (1000, 3000)  # spread: when a replica stops all its clients come back
CHUNK_BYTES = 32 * 1024  # of events that are sent together
STALLED_SECONDS = 30.0  # nginx's own figure: a client that takes nothing for so long is let go
MISSING_SECONDS = 60.0  # a job that the store has lost is back within this
BEGINNINGS = {JobStatus.QUEUED: "queued", JobStatus.PROCESSING: "started"}
ENDS = frozenset(status for status in JobStatus if status.is_terminal)
NEW = "new"  # nothing was told of the status yet
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx
)
HEARTBEAT = b":\n\n"


class Mark(NamedTuple):
    """What a stream has told: the id of its last event."""

    status: str = NEW
    run: int = 0  # which one: when it began, in ms
    progress: int = 0  # in 1/10,000
    segments: int = 0

    @property
    def is_the_end(self) -> bool:
        return self.status in ENDS

    def __str__(self) -> str:
        return f"{self.status}-{self.run}-{self.progress}-{self.segments}"

    @classmethod
    def of(cls, text: str) -> Self:
        """'': the beginning. Raises InvalidField."""
        if not text:
            return cls()
        found = re.fullmatch(r"([a-z]{1,16})-([0-9]{1,16})-([0-9]{1,5})-([0-9]{1,9})", text)
        if found is None or found[1] not in {NEW, *JobStatus}:
            raise InvalidField([("Last-Event-ID", "is the id of no event here; leave it out")])
        return cls(found[1], *map(int, found.groups()[1:]))


class Story:
    """What there is to tell of a job after `mark`."""

    def __init__(self, mark: Mark, segments: Segments):
        self.mark = mark
        self._segments = segments

    async def next(self, job: Job, look: Snapshot | None) -> AsyncIterator[bytes]:
        """Events. Raises JobExpired, StoreUnavailable."""
        run = round(job.started_at.timestamp() * 1000) if job.started_at else 0
        if not job.status.is_terminal and (job.status, run) != (self.mark.status, self.mark.run):
            self.mark = Mark(job.status, run, 0, self.mark.segments)
            yield self._event(BEGINNINGS[job.status], view(job, look).model_dump_json())
        async for segment in self._segments.new(job):
            self.mark = self.mark._replace(segments=self._segments.told)
            yield self._event("segment", segment)
        progress = round(job.progress * 10_000)
        if job.status is JobStatus.PROCESSING and progress != self.mark.progress:
            self.mark = self.mark._replace(progress=progress)
            yield self._event("progress", json.dumps({"progress": job.progress}))
        if job.status.is_terminal and job.status != self.mark.status:
            self.mark = Mark(job.status, run, progress, self.mark.segments)
            yield self._event(job.status, view(job).model_dump_json())

    def _event(self, name: str, data: str) -> bytes:
        return f"id: {self.mark}\nevent: {name}\ndata: {data}\n\n".encode()


class EventStream:
    """A response that goes on until the job has ended, the client leaves, or this process is to
    stop. A slow client gets all segments, and of what changes meanwhile the latest only."""

    def __init__(self, request: Request, job: Job, mark: Mark):
        state, sees = state_of(request), caller_of(request).sees
        self._request = request
        self._connection = connection_of(request)
        self._changes = state.hub.watch(job, sees, "events", self._connection)
        self._story = Story(mark, Segments(state.pages, mark.segments))
        self._unsent = bytearray()
        self._beat = 0.0  # when the next heartbeat is due
        self._missing_since: float | None = None

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        """Raises TooManyWaiters before it begins."""
        async with self._changes as changes:
            await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS]})
            self._unsent += b"retry: %d\n\n" % random.randint(*RECONNECT_MS)
            self._beat = time.monotonic() + HEARTBEAT_SECONDS
            try:
                while not changes.is_over:
                    await self._write(send)
                    try:
                        if job := await changes.next(self._beat - time.monotonic()):
                            self._missing_since = None
                            await self._tell(job, send)
                            del job  # it would be kept until there is another
                        elif await self._goes_on():
                            self._unsent += HEARTBEAT
                            self._beat = time.monotonic() + HEARTBEAT_SECONDS
                        else:
                            break
                    except JobNotFound:
                        self._missing_since = time.monotonic()
                    except StoreUnavailable:
                        changes.repeat()
                    except JobExpired:
                        break
                await self._write(send, is_last=True)
            except TimeoutError:  # of a write
                self._connection.abort()

    async def _tell(self, job: Job, send: Send) -> None:
        look = await state_of(self._request).admission.look() if job.queue_position else None
        async for event in self._story.next(job, look):
            self._unsent += event
            if len(self._unsent) >= CHUNK_BYTES:
                await self._write(send)

    async def _goes_on(self) -> bool:
        """Unless the store lost the job and nobody brought it back, or the key was revoked."""
        since = self._missing_since
        if since is not None and time.monotonic() - since > MISSING_SECONDS:
            return False
        return await is_still_admitted(self._request)

    async def _write(self, send: Send, *, is_last: bool = False) -> None:
        """Raises TimeoutError when the client takes nothing."""
        if not self._unsent and not is_last:
            return
        content = bytes(self._unsent)
        self._unsent.clear()
        message = {"type": "http.response.body", "body": content, "more_body": not is_last}
        if not self._connection.is_full:  # it takes no time
            await send(message)
            return
        async with asyncio.timeout(STALLED_SECONDS):
            await send(message)


EVENT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "event": {"enum": [*BEGINNINGS.values(), "segment", "progress", *sorted(ENDS)]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
LAST_EVENT_ID: dict[str, Any] = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "The `id` of the last event that arrived: the stream goes on after it.",
    "schema": {"type": "string"},
}


@router.get(
    "/jobs/{job_id}/events",
    response_model=None,
    response_class=Response,
    summary="Follow a job as server-sent events",
    responses={
        200: {
            "description": (
                "Events until the job has ended: `queued`, `started`, `progress`, `segment`, then "
                "`completed`, `failed` or `cancelled`."
            ),
            "content": {"text/event-stream": {"itemSchema": EVENT}},
        },
        204: {"description": "`Last-Event-ID` was that of the last event: there are no more."},
        **answers(JobNotFound, JobExpired, InvalidField, StoreUnavailable, TooManyWaiters),
    },
    openapi_extra={"parameters": [JOB_ID, LAST_EVENT_ID]},
)
async def events(request: Request) -> ASGIApp:
    """From the present state of the job to its end. With `Last-Event-ID` the stream goes on after
    that event, at any replica, and whatever happened meanwhile."""
    mark = Mark.of(request.headers.get("last-event-id", ""))
    job_id = job_id_of(request.path_params["job_id"])
    job = await state_of(request).store.read(job_id, caller_of(request).sees)
    audit(request, "events_read", job.job_id)
    request.scope["state"][WAITS] = True
    if mark.is_the_end and mark.status == job.status:  # else it was retried since
        return Response(status_code=204)
    return EventStream(request, job, mark)
