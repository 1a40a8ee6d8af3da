"""Captions: whatever is said, nothing of it is lost, and every rule holds in both formats."""

from __future__ import annotations

import html
import re
import time
from datetime import timedelta
from itertools import pairwise

import pytest
import srt
import webvtt
from hypothesis import given
from hypothesis import strategies as st

from api.captions import captions
from api.formats import Writing, render
from shared.schemas import Segment, Transcript, Word
from tests.unit.test_formats import segment, transcript

# No digits: a text of numbers may look like times to a parser (see test_formats).
LETTERS = st.sampled_from("abcé -->&<;.,!?\n\t\u0301\u200d你好\uff0c。😀")
SPACED = st.text(LETTERS, min_size=1, max_size=12).map(lambda text: " " + text)
UNSPACED = st.text(LETTERS, min_size=1, max_size=30)
TIMES = st.floats(0, 3, allow_nan=False).map(lambda seconds: round(seconds, 3))
RULES = st.fixed_dictionaries(
    {},
    optional={
        "max_line_chars": st.integers(10, 60),
        "max_lines": st.integers(1, 4),
        "min_duration": st.floats(0, 5),
    },
)


@st.composite
def spoken(draw) -> Transcript:
    """Segments one after the other, some with words: as a model writes them, but of any text."""
    clock = draw(st.sampled_from([0.0, 59.9, 3599.5, 400_000.0]))
    segments = []
    for number in range(draw(st.integers(0, 4))):
        words = []
        clock += draw(TIMES)
        began = clock
        for text in draw(st.lists(st.one_of(SPACED, UNSPACED), max_size=12)):
            start = clock + draw(TIMES) / 3
            clock = start + draw(TIMES) / 3
            words.append(Word(start=start, end=clock, word=text, probability=0.5))
        text = "".join(word.word for word in words)
        kept = draw(st.sampled_from([words, None, words[1:]]))
        segments.append(segment(number, began, clock, text, kept))
    return transcript(*segments)


def read_srt(said: Transcript, **rules) -> list[tuple[int, int, str]]:
    """(start, end, text) of each caption, times in milliseconds."""
    cues = srt.parse(render(said, Writing(format="srt", **rules)))
    ms = timedelta(milliseconds=1)
    return [(cue.start // ms, cue.end // ms, cue.content) for cue in cues]


def read_vtt(said: Transcript, **rules) -> list[tuple[int, int, str]]:
    text = render(said, Writing(format="vtt", **rules))
    cues = webvtt.from_string(text, strict=True)
    return [
        (c.start_time.in_milliseconds(), c.end_time.in_milliseconds(), html.unescape(c.text))
        for c in cues
    ]


def solid(text: str) -> str:
    return "".join(text.split())


@given(spoken(), RULES)
def test_both_formats_say_the_same_and_all_of_it(said, rules):
    """Equal texts and times, read by independent parsers."""
    read = read_srt(said, **rules)
    assert read == read_vtt(said, **rules)
    assert solid("".join(text for _, _, text in read)) == solid(said.text)


@given(spoken())
def test_without_rules_a_caption_is_a_segment(said):
    segments = [s for s in said.segments if s.text.strip()]
    assert [(start, text) for start, _, text in read_vtt(said)] == [
        (round(s.start * 1000), " ".join(s.text.split())) for s in segments
    ]
    for (_, end, _), s in zip(read_srt(said), segments, strict=True):
        assert end == max(round(s.end * 1000), round(s.start * 1000) + 1)


@given(spoken(), RULES)
def test_lines_are_as_short_and_as_few_as_was_asked(said, rules):
    for _, _, text in read_srt(said, **rules):
        lines = text.split("\n")
        if rules.keys() & {"max_lines", "max_line_chars"}:
            assert max(len(line) for line in lines) <= rules.get("max_line_chars", 42)
            assert len(lines) <= rules.get("max_lines", 2)
        else:
            assert len(lines) == 1
        assert all(line.strip() == line != "" for line in lines)


@given(spoken(), RULES)
def test_captions_stay_their_time_and_never_overlap(said, rules):
    """A caption that has no time of its own is there for a millisecond."""
    read = read_vtt(said, **rules)
    for (start, end, _), (after, _, _) in pairwise([*read, (10**12, 0, "")]):
        assert start < end
        assert end <= max(after, start + 1)
        assert end >= min(after, start + round(rules.get("min_duration", 0) * 1000))


@given(spoken(), RULES)
def test_times_inside_captions_are_those_of_their_words(said, rules):
    """They grow, and lie between those of the caption; without them the text is the same."""
    if not any(s.words is not None for s in said.segments):
        return
    text = render(said, Writing(format="vtt", words=True, **rules))
    cues = webvtt.from_string(text, strict=True).captions
    plain = read_vtt(said, **rules)
    for cue, (start, end, plain_text) in zip(cues, plain, strict=True):
        assert html.unescape(cue.text) == plain_text
        tags = re.findall(r"<(\d+):(\d\d):(\d\d)\.(\d{3})>", cue.raw_text)
        inner = [((int(h) * 60 + int(m)) * 60 + int(s)) * 1000 + int(ms) for h, m, s, ms in tags]
        assert inner == sorted(set(inner))
        assert all(start < time < end for time in inner)


@given(st.lists(st.tuples(TIMES, TIMES), max_size=12), RULES)
def test_times_that_make_no_sense_still_give_captions_in_order(times, rules):
    """Segments and words that run backwards, or out of each other."""
    words = [Word(start=a, end=b, word=" several", probability=0) for a, b in times]
    said = transcript(
        segment(0, 2.0, 2.5, " several" * len(words), words),
        segment(1, 1.0, 0.5, " hello"),
    )
    read = read_vtt(said, **rules)
    assert read == sorted(read, key=lambda caption: caption[0])
    assert all(start < end for start, end, _ in read)
    of_first = [(start, end) for start, end, text in read if "several" in text]
    assert all(2000 <= start <= 2500 for start, _ in of_first)
    assert sorted(of_first) == of_first
    assert all(one[1] <= max(other[0], one[0] + 1) for one, other in pairwise(of_first))


@given(st.lists(st.text("abc.,", min_size=1, max_size=10), min_size=1, max_size=30), RULES)
def test_there_are_as_few_captions_as_can_be(words, rules):
    """Filling each to its end gives no fewer."""
    width, most = rules.get("max_line_chars", 42), rules.get("max_lines", 2)
    lines = [[]]
    for word in words:
        if len(" ".join([*lines[-1], word])) > width:
            lines.append([])
        lines[-1].append(word)
    said = transcript(segment(0, 0.0, 30.0, " ".join(words)))
    asked = {"max_line_chars": width, "max_lines": most}
    assert len(read_srt(said, **asked)) == -(-len(lines) // most)


def spread(text: str, pauses: dict[int, float] | None = None) -> Segment:
    """A word every half second, and longer after some of them."""
    words, clock = [], 0.0
    for number, word in enumerate(text.split()):
        words.append(Word(start=clock, end=clock + 0.4, word=" " + word, probability=1))
        clock += 0.5 + (pauses or {}).get(number, 0)
    return segment(0, 0.0, words[-1].end, " " + text, words)


def shown(said: Segment, **rules) -> list[str]:
    return [text for _, _, text in read_srt(transcript(said), **rules)]


def test_captions_end_with_sentences():
    said = "We went home. It was late, and nobody had eaten anything at all since noon."
    assert shown(spread(said), max_line_chars=36, max_lines=2) == [
        "We went home.",
        "It was late, and nobody had eaten\nanything at all since noon.",
    ]


def test_captions_end_at_pauses():
    """Where there is neither a sentence's end nor a comma."""
    said = spread("one two three four five six seven eight nine ten", pauses={2: 1.0})
    assert shown(said, max_line_chars=40, max_lines=1)[0] == "one two three"


def test_captions_are_cut_when_the_word_is_said():
    said = spread("one two three four", pauses={1: 2.0})
    assert read_vtt(transcript(said), max_line_chars=10, max_lines=1) == [
        (0, 900, "one two"),
        (3000, 3900, "three four"),
    ]


def test_without_words_time_is_shared_by_characters():
    said = segment(0, 10.0, 20.0, " aaaa bbbb cccc dddd")
    assert read_vtt(transcript(said), max_line_chars=10, max_lines=1) == [
        (10_000, 14_737, "aaaa bbbb"),
        (15_263, 20_000, "cccc dddd"),
    ]


def test_words_that_do_not_spell_the_text_are_not_believed():
    """faster-whisper leaves out words that it takes for invented."""
    said = spread("one two three four")
    said = said.model_copy(update={"words": said.words[2:]})
    text = render(transcript(said), Writing(format="vtt", words=True))
    assert "<c>one</c> <c>two</c> <c>three</c> <c>four</c>\n" in text


def test_word_times_are_those_of_the_karaoke_style():
    said = spread("one two three")
    text = render(transcript(said), Writing(format="vtt", words=True))
    assert text == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.400\n"
        "<c>one</c> <00:00:00.500><c>two</c> <00:00:01.000><c>three</c>\n"
    )


def test_a_text_without_spaces_is_cut_too():
    """After a comma, and never before an accent; between words where they are known."""
    comma = "我们今天要讨论的是一个非常重要的问题\uff0c"
    stop = "这个问题已经困扰了我们很多年。"
    said = segment(0, 0, 9, comma + stop)
    assert shown(said, max_line_chars=20) == [f"{comma}\n{stop}"]
    assert shown(said, max_line_chars=20, max_lines=1) == [comma, stop]
    assert shown(said, max_line_chars=10)[0] == f"{comma[:10]}\n{comma[10:]}"
    accented = "a" + "e\u0301" * 7
    assert shown(segment(0, 0, 9, accented), max_line_chars=10, max_lines=1) == [
        "a" + "e\u0301" * 3,
        "e\u0301" * 4,
    ]
    parts = ["Donau", "dampf", "schiff", "fahrt"]
    words = [Word(start=n, end=n + 1, word=w, probability=1) for n, w in enumerate(parts)]
    said = segment(0, 0, 4, "".join(parts), words)
    assert read_srt(transcript(said), max_line_chars=12, max_lines=1) == [
        (0, 2000, "Donaudampf"),
        (2000, 4000, "schifffahrt"),
    ]


def test_a_word_in_several_tokens_stays_in_one_line():
    """Whisper tells the times of ` well` and `-known` apart."""
    pieces = [" a", " very", " well", "-known", " man"]
    words = [Word(start=n, end=n + 1, word=w, probability=1) for n, w in enumerate(pieces)]
    said = segment(0, 0, 5, "".join(pieces), words)
    assert shown(said, max_line_chars=12, max_lines=3) == ["a very\nwell-known\nman"]


def test_a_caption_too_short_to_be_read_is_avoided():
    """The sentence ends after half a second: too soon for a caption of its own."""
    said = spread("No. That is what they told us all along")
    assert shown(said, max_line_chars=36, max_lines=1)[0] == "No."
    assert shown(said, max_line_chars=36, max_lines=1, min_duration=1.5)[0] != "No."


@pytest.mark.parametrize("text", ["a" * 3500, "!" * 3500, "a." * 225, "ab " * 450], ids=len)
def test_the_longest_text_of_a_window_is_cut_in_time(text):
    """A window of 30 s has 448 tokens at most; and recordings have hundreds of windows."""
    began = time.process_time()
    cut = captions([segment(0, 0, 30, text)], max_line_chars=100, max_lines=3)
    assert time.process_time() - began < 0.5
    assert sum(len(p.text) for c in cut for line in c.lines for p in line) == len(solid(text))
