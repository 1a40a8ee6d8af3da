"""A stored transcript in the format that a caller asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from fastapi.responses import Response

from shared.languages import LANGUAGES
from shared.schemas import Segment, Transcript

MILLISECONDS = 1000


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


def render(format: Format, job_id: str, stored: bytes, metadata: str) -> Response:
    """`stored`: the JSON of a shared.schemas.Transcript. As json it is returned untouched, with the
    job's id, status and metadata (JSON) put before it."""
    if format is Format.JSON:
        head = f'{{"job_id":"{job_id}","status":"completed","metadata":{metadata},'.encode()
        body = head + stored[1:]
    else:
        body = WRITERS[format](Transcript.model_validate_json(stored)).encode()
    return Response(body, media_type=MEDIA_TYPES[format], headers={"Cache-Control": "no-store"})


def text(transcript: Transcript) -> str:
    """One line for each segment."""
    return "".join(segment.text.strip() + "\n" for segment in transcript.segments)


def srt(transcript: Transcript) -> str:
    """SubRip. Numbers count from 1; a blank line inside a text would end its cue."""
    cues = (
        f"{number}\n{timestamp(s.start, ',')} --> {timestamp(s.end, ',')}\n{one_line(s.text)}\n"
        for number, s in enumerate(spoken(transcript), 1)
    )
    return "\n".join(cues)


def vtt(transcript: Transcript) -> str:
    """WebVTT (W3C). In cue text `&` and `<` are escaped, and `-->` must not occur."""
    cues = (
        f"{timestamp(s.start, '.')} --> {timestamp(s.end, '.')}\n{escape(one_line(s.text))}\n"
        for s in spoken(transcript)
    )
    return "WEBVTT\n\n" + "\n".join(cues)


def tsv(transcript: Transcript) -> str:
    """start, end (integer milliseconds) and text, as OpenAI Whisper's own writer does it."""
    rows = (
        f"{milliseconds(s.start)}\t{milliseconds(s.end)}\t{one_line(s.text)}\n"
        for s in transcript.segments
    )
    return "start\tend\ttext\n" + "".join(rows)


def verbose_json(transcript: Transcript) -> str:
    """The shape of OpenAI's verbose_json: the language by name, words in a list of their own."""
    value = transcript.model_dump(mode="json", exclude={"segments": {"__all__": {"words"}}})
    value["language"] = LANGUAGES.get(transcript.language, transcript.language)
    if any(segment.words is not None for segment in transcript.segments):
        value["words"] = [
            {"word": word.word.strip(), "start": word.start, "end": word.end}
            for segment in transcript.segments
            for word in segment.words or []
        ]
    return json.dumps(value, ensure_ascii=False)


WRITERS: dict[Format, Callable[[Transcript], str]] = {
    Format.TEXT: text,
    Format.SRT: srt,
    Format.VTT: vtt,
    Format.TSV: tsv,
    Format.VERBOSE_JSON: verbose_json,
}


def spoken(transcript: Transcript) -> list[Segment]:
    """Captions need a text."""
    return [segment for segment in transcript.segments if segment.text.strip()]


def one_line(words: str) -> str:
    return " ".join(words.split())


def escape(words: str) -> str:
    return words.replace("&", "&amp;").replace("<", "&lt;").replace("-->", "--&gt;")


def milliseconds(seconds: float) -> int:
    return round(seconds * MILLISECONDS)


def timestamp(seconds: float, mark: str) -> str:
    """3661.5 -> 01:01:01.500 (hours may have more than two digits)."""
    rest, millis = divmod(milliseconds(seconds), MILLISECONDS)
    minutes, secs = divmod(rest, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{secs:02}{mark}{millis:03}"
