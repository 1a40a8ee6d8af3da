"""Captions: what of a transcript is shown at a time, and in which lines.

Without limits a caption is a segment. With limits a segment is cut into as few captions as hold it,
rather after a sentence or at a pause than elsewhere, and these in lines by the same rules.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, inf
from unicodedata import category

from shared.schemas import Segment, Word

SPACES = r"\s\x00-\x1f\x7f-\x9f"  # control characters have no place in a text, either
GAP = re.compile(f"[{SPACES}]+")
VISIBLE = re.compile(f"[^{SPACES}]+")
JOINER = "\u200d"  # of zero width: makes one letter, or one emoji, of two

SENTENCE_ENDS = frozenset(".?!\u2026\u3002\uff1f\uff01\u061f\u06d4\u0964\u0965")
CLAUSE_ENDS = frozenset(",;:\u060c\u061b\u3001\uff0c\uff1b\uff1a\u2013\u2014")
CLOSING = "\"')]}\u2019\u201d\u00bb\u300d\u300f\uff09"  # may follow these marks
MARKS = SENTENCE_ENDS | CLAUSE_ENDS | frozenset(CLOSING)  # begin no line
PAUSE_SECONDS = 0.3  # between two words: as good a place to cut as the end of a clause, or better


@dataclass(frozen=True, slots=True)
class Piece:
    """What is never cut: a word, or as much of a long one as fits. Times in seconds."""

    text: str
    start: float
    end: float
    is_spaced: bool  # there is a space before it
    may_begin: bool  # a line may begin with it
    is_told: bool  # its start is that of a word, not an estimate


Line = list[Piece]


@dataclass(frozen=True, slots=True)
class Caption:
    start_ms: int
    end_ms: int
    lines: list[Line]


def captions(
    segments: Sequence[Segment],
    *,
    max_line_chars: int | None = None,
    max_lines: int = 1,
    min_duration: float = 0.0,
) -> list[Caption]:
    """In the order of their beginnings, which are never changed. `max_line_chars`: None leaves each
    segment whole. `min_duration`: seconds that each stays, or until the next begins."""
    found: list[Caption] = []
    for segment in segments:
        pieces = list(timed(segment))
        if not pieces:
            continue
        runs = [[pieces]]
        if max_line_chars is not None:
            pieces = breakable(pieces, max_line_chars)
            shown = divide(pieces, max_line_chars, max_lines, min_duration)
            runs = [divide(run, max_line_chars) for run in shown]
        starts = [segment.start, *(lines[0][0].start for lines in runs[1:])]
        ends = [*(lines[-1][-1].end for lines in runs[:-1]), segment.end]
        for start, end, lines in zip(starts, ends, runs, strict=True):
            begin = milliseconds(start)
            found.append(Caption(begin, max(milliseconds(end), begin + 1), lines))
    return lengthened(sorted(found, key=lambda c: c.start_ms), milliseconds(min_duration))


def lengthened(found: list[Caption], least_ms: int) -> list[Caption]:
    """Each stays so long, or until the next begins."""
    made = []
    nexts = [*(caption.start_ms for caption in found[1:]), sys.maxsize]
    for caption, next_ms in zip(found, nexts, strict=False):
        until = min(caption.start_ms + least_ms, next_ms)
        made.append(replace(caption, end_ms=max(caption.end_ms, until)))
    return made


def words_of(segment: Segment) -> list[Word]:
    """Empty unless the words are there, and spell the segment's text."""
    words = segment.words or []
    is_all = one_line("".join(word.word for word in words)) == one_line(segment.text)
    return words if is_all else []


def timed(segment: Segment) -> Iterator[Piece]:
    """The text's words, one after the other in time, within the segment's. Where there are none to
    tell, the time is shared out by characters."""
    words = words_of(segment)
    whole = Word(start=segment.start, end=segment.end, word=segment.text, probability=1)
    latest = max(segment.start, segment.end)
    clock = segment.start
    is_spaced = False
    for word in words or [whole]:
        start = min(max(word.start, clock), latest)
        clock = min(max(word.end, start), latest)
        inner = GAP.sub(" ", word.word).strip()
        place = 0
        is_spaced = is_spaced or bool(GAP.match(word.word))
        for found in VISIBLE.finditer(inner):
            first, place = found.span()
            yield Piece(
                found[0],
                start + (clock - start) * first / len(inner),
                start + (clock - start) * place / len(inner),
                is_spaced=is_spaced or first > 0,
                may_begin=is_spaced or first > 0,
                is_told=bool(words) and not first,
            )
        is_spaced = bool(GAP.search(word.word[-1:])) or (is_spaced and not inner)


def breakable(pieces: Sequence[Piece], width: int) -> list[Piece]:
    """The same, with breaks in what has no space and does not fit in a line: after its phrases, and
    in even parts where these are too long as well."""
    made: list[Piece] = []
    for chunk in between(pieces, lambda _, piece: piece.is_spaced):
        if length(chunk) <= width:
            made += chunk
            continue
        parts = [
            p
            for piece in chunk
            for p in (letters(piece, width) if len(piece.text) > width else [piece])
        ]
        for phrase in between(parts, lambda before, after: reluctance(before, after) < 1):
            made += evenly(phrase, width)
    return made


def between(pieces: Sequence[Piece], is_cut: Callable[[Piece, Piece], bool]) -> list[Line]:
    """The pieces, cut between every two of which that is true."""
    cuts = [n for n, (one, other) in enumerate(pairwise(pieces), 1) if is_cut(one, other)]
    return [list(pieces[start:end]) for start, end in pairwise([0, *cuts, len(pieces)])]


def letters(piece: Piece, width: int) -> Iterator[Piece]:
    """One by one, each with its accents and with what is joined to it."""
    groups: list[str] = []
    for letter in piece.text:
        latest = groups[-1][-1] if groups else ""
        belongs = category(letter).startswith("M") or JOINER in {letter, latest}
        if groups and belongs and len(groups[-1]) < width:
            groups[-1] += letter
        else:
            groups.append(letter)
    pace = (piece.end - piece.start) / len(piece.text)
    place = 0
    for group in groups:
        start, is_first = piece.start + place * pace, not place
        place += len(group)
        yield replace(
            piece,
            text=group,
            start=start,
            end=piece.start + place * pace,
            is_spaced=is_first and piece.is_spaced,
            is_told=is_first and piece.is_told,
        )


def evenly(pieces: Sequence[Piece], width: int) -> Iterator[Piece]:
    """The same, with so many breaks that all parts fit in a line."""
    size = length(pieces)
    share = ceil(size / ceil(size / width))
    filled = share
    for piece in pieces:
        is_full = filled + len(piece.text) > share
        filled = len(piece.text) + (0 if is_full else filled)
        yield replace(piece, may_begin=is_full)


def length(pieces: Sequence[Piece]) -> int:
    """Characters, without spaces between them."""
    return sum(len(piece.text) for piece in pieces)


def divide(
    pieces: Sequence[Piece], width: int, lines: int = 1, min_duration: float = 0.0
) -> list[Line]:
    """Into as few runs as can be, of so many lines each, and of those ways the least bad one: runs
    are even, do not end in the middle of something, and are not too short to be read. No unit may
    be longer than `width`."""
    units = between(pieces, lambda _, piece: piece.may_begin)
    sizes = [length(unit) for unit in units]
    spaces = [int(unit[0].is_spaced) for unit in units]
    times = [*(unit[0].start for unit in units), pieces[-1].end]
    costs = [*(reluctance(one[-1], other[0]) for one, other in pairwise(units)), 0.0]
    # Of the first n units: how many runs, how bad, and where the last of them begins.
    best: list[tuple[float, float, int]] = [(0, 0.0, 0)]
    for end in range(1, len(units) + 1):
        best.append((inf, inf, 0))
        used, line, total = 1, 0, 0
        for start in range(end - 1, -1, -1):
            # Lines are filled from the last one upwards: as few as in the other direction.
            if line and sizes[start] + spaces[start + 1] + line > width:
                used, line = used + 1, 0
            if used > lines:
                break
            line += sizes[start] + (spaces[start + 1] if line else 0)
            total += sizes[start]
            runs, bad, _ = best[start]
            bad += costs[end - 1] + (1 - total / (width * lines)) ** 2
            bad += times[end] - times[start] < min_duration
            best[end] = min(best[end], (runs + 1, bad, start))
    made: list[Line] = []
    end = len(units)
    while end:
        start = best[end][2]
        made.append([piece for unit in units[start:end] for piece in unit])
        end = start
    return made[::-1]


def reluctance(before: Piece, after: Piece) -> float:
    """To cut between the two: from 0, after a sentence, to 1."""
    if not after.is_spaced and after.text[0] in MARKS:
        return 1.0
    mark = before.text.rstrip(CLOSING)[-1:]
    if mark in SENTENCE_ENDS:
        return 0.0
    if after.start - before.end >= PAUSE_SECONDS:
        return 0.25
    return 0.5 if mark in CLAUSE_ENDS else 1.0


def one_line(text: str) -> str:
    return GAP.sub(" ", text).strip()


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
