"""stream=true: the text in server-sent events, each piece as soon as it is there."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from api.access import caller_of, is_still_admitted
from api.dependencies import connection_of, state_of
from api.errors import status_of
from api.events import STALLED_SECONDS
from api.hub import Watch
from api.openai.answers import languages, transcript_of
from api.openai.attendance import LOST, abandon
from api.openai.envelope import body_of
from api.segments import Segments
from shared.errors import (
    JobExpired,
    JobNotFound,
    ServiceError,
    StillRunning,
    StoreUnavailable,
    TranscriptionError,
    Unauthorized,
)
from shared.jobs import Job
from shared.schemas import Transcript

KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients skip
KEEP_ALIVE_SECONDS = 15.0
END = b"data: [DONE]\n\n"


class TextStream:
    """A response that begins at once, and ends with the job or when its caller leaves. An error
    that comes so late is an event, too. `return_seconds`: see abandon."""

    def __init__(
        self, request: Request, job: Job, return_seconds: float, headers: Mapping[str, str]
    ):
        self._request = request
        self._job = job
        self._return_seconds = return_seconds
        self._headers = {
            **headers,
            "Content-Type": "text/event-stream; charset=utf-8",
            "X-Accel-Buffering": "no",
        }

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        """Raises TooManyWaiters before it begins."""
        request, connection = self._request, connection_of(self._request)
        hub, sees = state_of(request).hub, caller_of(request).sees
        is_stalled = False
        async with hub.watch(self._job, sees, "openai", connection) as changes:
            head = Headers(self._headers).raw
            await send({"type": "http.response.start", "status": 200, "headers": head})
            try:
                await write(send, KEEP_ALIVE)
                async for event in self._events(changes):
                    await write(send, event)
            except TimeoutError:
                is_stalled = True
                connection.abort()
        if is_stalled or connection.is_lost:
            await abandon(request, self._job.job_id, self._return_seconds)
        await send({"type": "http.response.body", "body": b""})

    async def _events(self, changes: Watch) -> AsyncIterator[bytes]:
        telling = Telling()
        segments = Segments(state_of(self._request).pages)
        beat = time.monotonic() + KEEP_ALIVE_SECONDS
        try:
            while not changes.is_over:
                job = await changes.next(beat - time.monotonic())
                try:
                    if job is None:
                        if not await is_still_admitted(self._request):
                            raise Unauthorized
                        yield KEEP_ALIVE
                        beat = time.monotonic() + KEEP_ALIVE_SECONDS
                    elif job.status.is_terminal:
                        transcript = await transcript_of(state_of(self._request), job)
                        for event in telling.rest(transcript):
                            yield event
                        yield END
                        return
                    else:
                        async for segment in segments.new(job):
                            for event in telling.more(json.loads(segment)["text"]):
                                yield event
                except StoreUnavailable:
                    changes.repeat()
            if not changes.has_left:
                raise StillRunning
        except (JobNotFound, JobExpired):
            yield failure(StoreUnavailable(LOST))
        except ServiceError as exc:
            yield failure(exc)


async def write(send: Send, content: bytes) -> None:
    """Raises TimeoutError when the client takes nothing."""
    async with asyncio.timeout(STALLED_SECONDS):
        await send({"type": "http.response.body", "body": content, "more_body": True})


def failure(error: ServiceError) -> bytes:
    body = body_of(status_of(error), error.code, error.message)
    return event(type="error", error=body.model_dump())


def event(**body: Any) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


class Telling:
    """What was told of a transcript: more can be said, nothing taken back. All pieces together are
    the transcript's text."""

    def __init__(self) -> None:
        self._told: list[str] = []
        self._held = ""  # spaces, which are told before the next word or not at all
        self._segments = 0

    def more(self, text: str) -> Iterator[bytes]:
        """`text`: the next segment's."""
        self._segments += 1
        text = self._held + text
        said = text.rstrip()
        self._held = text[len(said) :]
        if not self._told:
            said = said.lstrip()
        if said:
            self._told.append(said)
            yield event(type="transcript.text.delta", delta=said)

    def rest(self, transcript: Transcript) -> Iterator[bytes]:
        """What is missing, and the end. Raises TranscriptionError where what was told is not its
        beginning."""
        for segment in transcript.segments[self._segments :]:
            yield from self.more(segment.text)
        if "".join(self._told) != transcript.text:
            raise TranscriptionError(
                "The recording had to be transcribed anew, and its text is not the one that began "
                "here. Send it again."
            )
        spoken = [language.model_dump() for language in languages(transcript)]
        yield event(type="transcript.text.done", text=transcript.text, languages=spoken)
