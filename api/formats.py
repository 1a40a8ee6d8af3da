"""A transcript in the format that a caller asks for."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import Callable
from enum import StrEnum
from math import ceil
from typing import Any

from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from api.captions import Caption, Line, Piece, captions, milliseconds, one_line
from shared.errors import InvalidField
from shared.languages import LANGUAGES
from shared.schemas import DurationUsage, Transcript, VerboseTranscript, VerboseWord

MAX_LINE_CHARS = 42  # where a caller names the number of lines alone; usual for Latin script
MAX_LINES = 2  # the other way round


class Format(StrEnum):
    JSON = "json"
    TEXT = "text"
    SRT = "srt"
    VTT = "vtt"
    TSV = "tsv"
    VERBOSE_JSON = "verbose_json"


MEDIA_TYPES = {
    Format.JSON: "application/json",
    Format.TEXT: "text/plain; charset=utf-8",
    Format.SRT: "application/x-subrip; charset=utf-8",
    Format.VTT: "text/vtt; charset=utf-8",
    Format.TSV: "text/tab-separated-values; charset=utf-8",
    Format.VERBOSE_JSON: "application/json",
}
CONTENT_OF_RESULT: dict[str, Any] = {
    media.partition(";")[0]: {}
    for media in MEDIA_TYPES.values()
    if media != MEDIA_TYPES[Format.JSON]
}


class Writing(BaseModel):
    """How a transcript is to be written: the query of GET /result. All but `format` are rules for
    captions, and refused with formats that have none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Format = Field(Format.JSON, description="How to write it.")
    max_line_chars: int | None = Field(
        None, ge=10, le=200, description="Longer lines of a caption are broken."
    )
    max_lines: int | None = Field(None, ge=1, le=10, description="Longer captions are divided.")
    min_duration: float = Field(
        0.0, ge=0, le=10, description="Seconds that a caption stays, unless the next one begins."
    )
    words: bool = Field(
        False, description="Times of the words inside captions; vtt, of a job with word_timestamps."
    )

    @field_validator("max_line_chars", "max_lines", "min_duration", "words")
    @classmethod
    def _needs_captions(cls, value: Any, info: ValidationInfo) -> Any:
        fitting = [Format.VTT] if info.field_name == "words" else [Format.SRT, Format.VTT]
        if value and info.data.get("format", Format.VTT) not in fitting:
            raise ValueError(f"needs format={' or '.join(fitting)}")
        return value


async def respond(asked: Writing, job_id: str, stored: bytes, metadata: str) -> Response:
    """`stored`: the JSON of a shared.schemas.Transcript. As json it is returned untouched, with the
    job's id, status and metadata (JSON) put before it. Raises as `render` does."""
    if asked.format is Format.JSON:
        head = f'{{"job_id":"{job_id}","status":"completed","metadata":{metadata},'.encode()
        body = head + stored[1:]
    else:  # a recording of hours takes tenths of a second, in which others want to be served
        body = await asyncio.to_thread(
            lambda: render(Transcript.model_validate_json(stored), asked).encode()
        )
    headers = {"Cache-Control": "no-store"}
    return Response(body, media_type=MEDIA_TYPES[asked.format], headers=headers)


def render(transcript: Transcript, asked: Writing) -> str:
    """Raises InvalidField where `words` are asked for that are not there."""
    return WRITERS[asked.format](transcript, asked)


def json(transcript: Transcript, _: Writing) -> str:
    return transcript.model_dump_json(exclude_none=True)


def text(transcript: Transcript, _: Writing) -> str:
    """One line for each segment."""
    return "".join(one_line(segment.text) + "\n" for segment in transcript.segments)


def tsv(transcript: Transcript, _: Writing) -> str:
    """start, end (integer milliseconds) and text, as OpenAI Whisper's own writer does it."""
    rows = (
        f"{milliseconds(s.start)}\t{milliseconds(s.end)}\t{one_line(s.text)}\n"
        for s in transcript.segments
    )
    return "start\tend\ttext\n" + "".join(rows)


def verbose_json(transcript: Transcript, _: Writing) -> str:
    return verbose(transcript).model_dump_json(exclude_none=True)


def verbose(transcript: Transcript) -> VerboseTranscript:
    """The shape of OpenAI's verbose_json, and what else there is."""
    words = [
        VerboseWord(**word.model_dump(exclude={"word"}), word=word.word.strip())
        for segment in transcript.segments
        for word in segment.words or []
    ]
    has_words = any(segment.words is not None for segment in transcript.segments)
    return VerboseTranscript(
        **transcript.model_dump(exclude={"language", "segments"}),
        language=LANGUAGES.get(transcript.language, transcript.language),
        segments=[segment.model_copy(update={"words": None}) for segment in transcript.segments],
        words=words if has_words else None,
        usage=DurationUsage(seconds=ceil(transcript.duration)),
    )


def srt(transcript: Transcript, asked: Writing) -> str:
    """SubRip. Numbers count from 1; a blank line inside a text would end its caption."""
    return "\n".join(
        f"{number}\n{span(caption, ',')}\n{srt_text(caption)}\n"
        for number, caption in enumerate(shown(transcript, asked), 1)
    )


def srt_text(caption: Caption) -> str:
    """SubRip escapes nothing; but a line that looks like the times of a caption would be some."""
    lines = (spell(line, lambda piece: piece.text) for line in caption.lines)
    return "\n".join(TIMES.sub(r"\1->\2", line) for line in lines)


TIMES = re.compile(r"(\d[:.,]\d+\s*)-->(\s*\d+[:.,]\d)")


def vtt(transcript: Transcript, asked: Writing) -> str:
    """WebVTT (W3C). In a caption `&`, `<` and `-->` are escaped."""
    segments = transcript.segments
    if asked.words and segments and all(segment.words is None for segment in segments):
        raise InvalidField([("words", NO_WORDS)])
    cues = (
        f"{span(caption, '.')}\n{vtt_text(caption, has_times=asked.words)}\n"
        for caption in shown(transcript, asked)
    )
    return "WEBVTT\n\n" + "\n".join(cues)


NO_WORDS = "needs a file that was submitted with word_timestamps=true; this one was not"


def vtt_text(caption: Caption, *, has_times: bool) -> str:
    """With its time before each word but the first. Times inside a caption must grow, and lie
    between its own. Style sheets (`::cue(:past)`) reach only what is an element, as `<c>` is."""
    latest = caption.start_ms

    def write(piece: Piece) -> str:
        nonlocal latest
        said, start = html.escape(piece.text, quote=False), milliseconds(piece.start)
        if not has_times:
            return said
        if not (piece.is_told and latest < start < caption.end_ms):
            return f"<c>{said}</c>"
        latest = start
        return f"<{timestamp(start, '.')}><c>{said}</c>"

    return "\n".join(spell(line, write) for line in caption.lines)


WRITERS: dict[Format, Callable[[Transcript, Writing], str]] = {
    Format.JSON: json,
    Format.TEXT: text,
    Format.SRT: srt,
    Format.VTT: vtt,
    Format.TSV: tsv,
    Format.VERBOSE_JSON: verbose_json,
}


def shown(transcript: Transcript, asked: Writing) -> list[Caption]:
    is_limited = asked.max_line_chars or asked.max_lines
    return captions(
        transcript.segments,
        max_line_chars=(asked.max_line_chars or MAX_LINE_CHARS) if is_limited else None,
        max_lines=asked.max_lines or MAX_LINES,
        min_duration=asked.min_duration,
    )


def spell(line: Line, write: Callable[[Piece], str]) -> str:
    return "".join(
        (" " if number and piece.is_spaced else "") + write(piece)
        for number, piece in enumerate(line)
    )


def span(caption: Caption, mark: str) -> str:
    return f"{timestamp(caption.start_ms, mark)} --> {timestamp(caption.end_ms, mark)}"


def timestamp(ms: int, mark: str) -> str:
    """3661500 -> 01:01:01.500 (hours may have more than two digits)."""
    rest, millis = divmod(ms, 1000)
    minutes, secs = divmod(rest, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{secs:02}{mark}{millis:03}"
