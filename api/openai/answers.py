"""A transcript as OpenAI's endpoints answer it."""

from __future__ import annotations

import asyncio
from math import ceil
from typing import Any

from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from api.dependencies import State
from api.formats import MEDIA_TYPES, Format, render, verbose
from api.openai.fields import Asked
from shared.errors import JobCancelled, failure_of
from shared.jobs import Job, JobStatus
from shared.schemas import DurationUsage, Segment, Transcript, TranscriptWarning, VerboseWord


class Language(BaseModel):
    code: str


class Transcription(BaseModel):
    """response_format json."""

    text: str
    languages: list[Language] = Field(description="Empty where nothing was said.")
    usage: DurationUsage
    warnings: list[TranscriptWarning] | None = Field(None, description="Where there are some.")


class VerboseTranscription(BaseModel):
    """response_format verbose_json; api.formats.verbose, but for what was not asked for."""

    model_config = ConfigDict(extra="allow")

    task: str
    language: str = Field(description="Name, as `english`.")
    duration: float
    text: str
    segments: list[Segment] | None = Field(None, description="Where they were asked for.")
    words: list[VerboseWord] | None = Field(None, description="Where they were asked for.")
    usage: DurationUsage


ANSWER = Transcription | VerboseTranscription
TEXTS = (Format.TEXT, Format.SRT, Format.VTT)
CONTENT: dict[str, Any] = {
    **{MEDIA_TYPES[name].partition(";")[0]: {"schema": {"type": "string"}} for name in TEXTS},
    "text/event-stream": {},  # OpenAPI has no words for events
}


async def transcript_of(state: State, job: Job) -> Transcript:
    """Of a job that has ended. Raises what it failed with, JobCancelled, JobExpired,
    StoreUnavailable."""
    if job.status is JobStatus.FAILED:
        raise failure_of(job.error_code, job.error_message)
    if job.status is JobStatus.CANCELLED:
        raise JobCancelled
    stored = await state.store.transcript(job)
    return await asyncio.to_thread(Transcript.model_validate_json, stored)


def answer(asked: Asked, transcript: Transcript) -> Response:
    kind = asked.writing.format
    if kind is Format.JSON:
        body = plain(transcript)
    elif kind is Format.VERBOSE_JSON:
        body = detailed(asked, transcript)
    elif kind is Format.TEXT:  # in one line, as OpenAI has it
        body = transcript.text + "\n"
    else:
        body = render(transcript, asked.writing)
    return Response(body, media_type=MEDIA_TYPES[kind])


def plain(transcript: Transcript) -> str:
    return Transcription(
        text=transcript.text,
        languages=languages(transcript),
        usage=DurationUsage(seconds=ceil(transcript.duration)),
        warnings=transcript.warnings or None,
    ).model_dump_json(exclude_none=True)


def detailed(asked: Asked, transcript: Transcript) -> str:
    """A translation is English, whatever was spoken."""
    made = verbose(transcript)
    if asked.options.task == "translate":
        made.language = "english"
    left_out = set() if asked.has_segments else {"segments"}
    if not asked.has_words:
        left_out.add("words")
    return made.model_dump_json(exclude=left_out, exclude_none=True)


def languages(transcript: Transcript) -> list[Language]:
    return [Language(code=transcript.language)] if transcript.segments else []
