"""Formats: independent parsers read back what was written."""

from __future__ import annotations

import html
import json

import pytest
import srt
import webvtt
from openai.types.audio import TranscriptionVerbose
from pydantic import ValidationError

from api.formats import Format, Writing, render, respond, timestamp
from shared.errors import InvalidField
from shared.schemas import Segment, Transcript, Word

TRICKY = "fish & chips <b>bold</b> --> end"


def segment(number: int, start: float, end: float, text: str, words=None) -> Segment:
    return Segment(
        id=number,
        seek=0,
        start=start,
        end=end,
        text=text,
        tokens=[50364, 264, 50514],
        avg_logprob=-0.1,
        compression_ratio=1.0,
        no_speech_prob=0.0,
        temperature=0.0,
        words=words,
    )


def transcript(*segments: Segment, duration: float = 3700.0) -> Transcript:
    return Transcript(
        text="".join(segment.text for segment in segments).strip(),
        language="de",
        language_probability=0.99,
        duration=duration,
        duration_after_vad=duration,
        segments=list(segments),
        task="transcribe",
        model="demo",
        processing_seconds=1.0,
    )


WORDS = [Word(start=3661.5, end=3662.0, word=" Größe", probability=0.9)]
SAID = transcript(
    segment(0, 0.0, 1.25, " " + TRICKY),
    segment(1, 1.25, 2.0, " "),
    segment(2, 3661.5, 3662.0004, " two\nlines\n\nGröße\x00", WORDS),
)


def written(format: str, said: Transcript = SAID, **rules) -> str:
    return render(said, Writing(format=format, **rules))


def test_srt_is_read_back_by_an_independent_parser():
    """Times past one hour, and texts with blank lines, which would end a cue."""
    text = written("srt")
    cues = list(srt.parse(text))
    assert [cue.index for cue in cues] == [1, 2]
    assert cues[0].content == TRICKY
    assert cues[1].content == "two lines Größe"
    assert "01:01:01,500 --> 01:01:02,000" in text


def test_vtt_is_read_back_by_an_independent_parser():
    """`&`, `<` and `-->` are escaped, as W3C WebVTT demands."""
    text = written("vtt")
    cues = webvtt.from_string(text, strict=True).captions
    assert [html.unescape(cue.text) for cue in cues] == [TRICKY, "two lines Größe"]
    assert "fish &amp; chips &lt;b&gt;bold&lt;/b&gt; --&gt; end" in text
    assert "01:01:01.500 --> 01:01:02.000" in text


def test_a_text_that_looks_like_the_times_of_a_caption_stays_a_text():
    """SubRip knows no escapes."""
    said = transcript(segment(0, 0, 2, "00:00:01,000 --> 00:00:02,000"), segment(1, 2, 3, "well"))
    cues = list(srt.parse(written("srt", said)))
    assert [cue.content for cue in cues] == ["00:00:01,000 -> 00:00:02,000", "well"]
    cue, _ = webvtt.from_string(written("vtt", said), strict=True).captions
    assert html.unescape(cue.text) == "00:00:01,000 --> 00:00:02,000"


@pytest.mark.parametrize("silence", [transcript(), transcript(segment(0, 0.0, 1.0, " \n"))])
def test_a_transcript_without_text_is_valid_in_every_format(silence):
    for rules in ({}, {"max_lines": 1, "min_duration": 2}):
        assert list(srt.parse(written("srt", silence, **rules))) == []
        assert webvtt.from_string(written("vtt", silence, **rules), strict=True).captions == []
    assert webvtt.from_string(written("vtt", transcript(), words=True), strict=True).captions == []
    assert written("text", silence).strip() == ""
    assert written("tsv", silence).startswith("start\tend\ttext\n")
    assert json.loads(written("verbose_json", silence))["text"] == ""


def test_tsv_has_whole_milliseconds():
    lines = written("tsv").splitlines()
    assert lines[0] == "start\tend\ttext"
    assert lines[3] == "3661500\t3662000\ttwo lines Größe"


def test_text_is_a_line_for_each_segment():
    assert written("text").splitlines() == [TRICKY, "", "two lines Größe"]


async def test_json_is_the_stored_transcript_with_what_is_the_jobs_before_it():
    stored = SAID.model_dump_json(exclude_none=True)
    answer = await respond(Writing(), "id-1", stored.encode(), '{"order":17}')
    value = json.loads(bytes(answer.body))
    assert value.pop("job_id") == "id-1"
    assert value.pop("status") == "completed"
    assert value.pop("metadata") == {"order": 17}
    assert value == json.loads(stored) == json.loads(written("json"))


async def test_every_other_format_is_answered_as_it_is_written():
    stored = SAID.model_dump_json(exclude_none=True).encode()
    for name in set(Format) - {Format.JSON}:
        answer = await respond(Writing(format=name), "id-1", stored, "{}")
        assert bytes(answer.body).decode() == written(name)
        assert answer.headers["cache-control"] == "no-store"


def test_verbose_json_is_what_openai_s_own_client_expects():
    """Language by name, numbers as such, words in a list of their own, usage in whole seconds."""
    text = written("verbose_json", SAID.model_copy(update={"duration": 3700.2}))
    read = TranscriptionVerbose.model_validate_json(text, strict=True)
    assert (read.language, read.duration) == ("german", 3700.2)
    assert (read.usage.type, read.usage.seconds) == ("duration", 3701)
    assert [(w.word, w.start, w.end) for w in read.words] == [("Größe", 3661.5, 3662.0)]
    first = read.segments[0]
    assert (first.id, first.seek, first.tokens) == (0, 0, [50364, 264, 50514])
    assert first.text == " " + TRICKY
    value = json.loads(text)
    assert value["task"] == "transcribe"
    assert all("words" not in segment for segment in value["segments"])


def test_verbose_json_names_words_only_where_there_are_some():
    said = transcript(segment(0, 0.0, 1.0, " hello"))
    assert "words" not in json.loads(written("verbose_json", said))
    assert json.loads(written("verbose_json", transcript()))["usage"]["seconds"] == 3700


def test_a_transcript_of_an_older_version_can_still_be_written():
    """Stored without tokens, and kept for a day."""
    old = json.loads(SAID.model_dump_json(exclude_none=True))
    for segment in old["segments"]:
        del segment["seek"], segment["tokens"], segment["warnings"]
    said = Transcript.model_validate(old)
    for name in Format:
        assert "two" in written(name, said)


@pytest.mark.parametrize(
    "rules",
    [
        {"max_line_chars": 9},
        {"max_line_chars": 201},
        {"max_lines": 0},
        {"max_lines": 11},
        {"min_duration": -1},
        {"min_duration": 10.5},
        {"min_duration": "nan"},
        {"words": "perhaps"},
        {"max_line_length": 42},
    ],
    ids=str,
)
def test_rules_have_bounds(rules):
    with pytest.raises(ValidationError) as caught:
        Writing(format="vtt", **rules)
    assert [error["loc"] for error in caught.value.errors()] == [tuple(rules)]


@pytest.mark.parametrize("format", sorted(Format))
def test_rules_are_refused_where_they_would_do_nothing(format):
    captions = {"max_line_chars": 42, "max_lines": 2, "min_duration": 1}
    useless = {
        name
        for name, value in {**captions, "words": True}.items()
        if not accepts(format=format, **{name: value})
    }
    expected = {"srt": {"words"}, "vtt": set()}
    assert useless == expected.get(format, {*captions, "words"})
    assert accepts(format=format, words=False, min_duration=0)


def accepts(**query) -> bool:
    try:
        return bool(Writing(**query))
    except ValidationError as exc:
        return "needs format=" not in str(exc)


def test_words_that_are_not_there_are_a_clear_error():
    with pytest.raises(InvalidField) as caught:
        written("vtt", transcript(segment(0, 0.0, 1.0, " hello")), words=True)
    assert caught.value.errors == [
        ("words", "needs a file that was submitted with word_timestamps=true; this one was not")
    ]


def test_a_rounded_timestamp_never_shows_sixty_seconds():
    said = transcript(segment(0, 59.9996, 360_000.0, "hello"))
    assert "00:01:00,000 --> 100:00:00,000" in written("srt", said)
    assert timestamp(3_599_999, ".") == "00:59:59.999"
