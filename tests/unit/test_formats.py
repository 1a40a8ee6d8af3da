"""Formats: independent parsers read back what was written."""

from __future__ import annotations

import io
import json

import pytest
import srt
import webvtt

from api.formats import Format, render, timestamp
from shared.schemas import Segment, Transcript, Word

TRICKY = "fish & chips <b>bold</b> --> end"


def segment(number: int, start: float, end: float, text: str, words=None) -> Segment:
    return Segment(
        id=number,
        start=start,
        end=end,
        text=text,
        avg_logprob=-0.1,
        compression_ratio=1.0,
        no_speech_prob=0.0,
        temperature=0.0,
        words=words,
    )


@pytest.fixture
def stored() -> bytes:
    words = [Word(start=3661.5, end=3662.0, word=" Größe", probability=0.9)]
    transcript = Transcript(
        text="hello",
        language="de",
        language_probability=0.99,
        duration=3700.0,
        duration_after_vad=3600.0,
        segments=[
            segment(0, 0.0, 1.25, " " + TRICKY),
            segment(1, 1.25, 2.0, " "),
            segment(2, 3661.5, 3662.0004, " two\nlines\n\nGröße", words),
        ],
        task="transcribe",
        model="demo",
        processing_seconds=1.0,
    )
    return transcript.model_dump_json().encode()


def body(format: Format, stored: bytes) -> str:
    return bytes(render(format, "id-1", stored, '{"order":17}').body).decode()


def test_srt_is_read_back_by_an_independent_parser(stored):
    """Times past one hour, and texts with blank lines, which would end a cue."""
    cues = list(srt.parse(body(Format.SRT, stored)))
    assert [cue.index for cue in cues] == [1, 2]
    assert cues[0].content == TRICKY
    assert cues[1].content == "two lines Größe"
    assert cues[1].start.total_seconds() == 3661.5


def test_vtt_is_read_back_by_an_independent_parser(stored):
    """`&`, `<` and `-->` are escaped, as W3C WebVTT demands."""
    text = body(Format.VTT, stored)
    cues = list(webvtt.from_buffer(io.StringIO(text)))
    assert len(cues) == 2
    assert cues[1].start == "01:01:01.500"
    assert "fish &amp; chips &lt;b>bold&lt;/b> --&gt; end" in text


def test_tsv_has_whole_milliseconds(stored):
    lines = body(Format.TSV, stored).splitlines()
    assert lines[0] == "start\tend\ttext"
    assert lines[3] == "3661500\t3662000\ttwo lines Größe"


def test_text_is_a_line_for_each_segment(stored):
    assert body(Format.TEXT, stored).splitlines()[0] == TRICKY


def test_json_is_the_stored_transcript_with_what_is_the_jobs_before_it(stored):
    value = json.loads(body(Format.JSON, stored))
    assert value.pop("job_id") == "id-1"
    assert value.pop("status") == "completed"
    assert value.pop("metadata") == {"order": 17}
    assert value == json.loads(stored)


def test_verbose_json_names_the_language_and_lists_the_words(stored):
    value = json.loads(body(Format.VERBOSE_JSON, stored))
    assert value["language"] == "german"
    assert value["words"] == [{"word": "Größe", "start": 3661.5, "end": 3662.0}]
    assert "words" not in value["segments"][0]


def test_a_rounded_timestamp_never_shows_sixty_seconds():
    assert timestamp(59.9996, ",") == "00:01:00,000"
    assert timestamp(360_000.0, ".") == "100:00:00.000"
