"""Training windows: what the model hears, what it must say, and where it should look.

A window is built from phrases of the bank the way faster-whisper would cut it from a file:
normalised by the loudest moment of a whole file, padded with zeros after normalisation, beginning
and ending in the middle of speech when the file is long.
"""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from tools.demo_model.bank import BURSTS, FRAMES_PER_SECOND, NOISE_KINDS, Phrase
from tools.demo_model.vocabulary import TokenIds

SILENCE = -10.0
PROMPT_TOKENS = 223
"""The most that faster-whisper repeats of what it has already transcribed."""
_LANGUAGE_SHARES = {"en": 0.4, "de": 0.16, "fr": 0.22, "es": 0.22}
_NO_SPAN = (-1.0, -1.0)


@dataclass(frozen=True)
class Settings:
    """How windows are drawn. Frames are of 10 ms."""

    frames: int = 3000
    longest_content: int = 3000
    single_share: float = 0.2
    """Windows that hold one phrase."""
    cut_share: float = 0.5
    """Full windows that end in the middle of a phrase."""
    no_speech_share: float = 0.05
    noise_share: float = 0.15
    timestamp_share: float = 0.5
    talk_share: float = 0.65
    """Windows whose phrases share words, as those of one recording do."""
    wrong_share: float = 0.04
    """Words in whose place the model is given another, so that it keeps its place by position
    too and not by likeness alone."""


@dataclass
class Window:
    """Rows are the decoder's: `targets[i]` is what follows `tokens[i]`, None when not trained.

    Spans are (start, end) in encoder frames of 20 ms from the window's first frame.
    """

    mel: Tensor
    first_position: int
    tokens: list[int] = field(default_factory=list)
    targets: list[int | None] = field(default_factory=list)
    token_spans: list[tuple[float, float]] = field(default_factory=list)
    target_spans: list[tuple[float, float]] = field(default_factory=list)
    text: list[int] = field(default_factory=list)

    def feed(self, token: int, span: tuple[float, float] = _NO_SPAN) -> None:
        """Appends a token that the model is given and need not predict."""
        self.tokens.append(token)
        self.token_spans.append(span)
        self.targets.append(None)
        self.target_spans.append(_NO_SPAN)

    def expect(self, token: int, span: tuple[float, float] = _NO_SPAN) -> None:
        """Appends a token that the row before must predict."""
        self.targets[-1], self.target_spans[-1] = token, span
        self.feed(token, span)


@dataclass(frozen=True)
class _Piece:
    """A phrase, or part of one, at its place: words with times in frames of the window."""

    words: list[tuple[str, float, float]]
    start: float
    end: float
    is_cut: bool


def _piece(phrase: Phrase, first: int, offset: int, start: int, end: int) -> _Piece:
    """The words of a phrase from number `first` on that end before `end`."""
    words = [
        (word, offset + word_start, offset + word_end)
        for word, (word_start, word_end) in zip(phrase.words, phrase.spans, strict=True)
    ]
    is_cut = offset + phrase.frames > end
    heard = [word for word in words[first:] if not is_cut or word[2] <= end]
    return _Piece(heard, start, end, is_cut)


@dataclass(frozen=True)
class _Layout:
    """Where speech lies in a window. `is_cut`: the last phrase goes on after its end."""

    content: int
    first_frame: int
    longest_gap: int
    is_single: bool
    is_cut: bool
    begins_inside: bool
    remnant: int
    """Frames of an earlier phrase's end with which the window begins."""

    def gap(self, chance: random.Random) -> int:
        if chance.random() < 0.04:
            return chance.randint(120, 350)
        return chance.randint(18, self.longest_gap)


def _draw_layout(chance: random.Random, settings: Settings) -> _Layout:
    is_single = chance.random() < settings.single_share
    is_full = settings.longest_content >= settings.frames
    is_cut = is_full and not is_single and chance.random() < settings.cut_share
    content = settings.longest_content
    if not is_cut and not is_single and chance.random() < 0.5:
        content = chance.randint(min(400, content), content)
    begins_inside = not is_single and chance.random() < 0.12
    first_frame = 0
    if not begins_inside and chance.random() < 0.7:
        first_frame = chance.randint(*((0, 90) if chance.random() < 0.93 else (90, 300)))
    remnant = chance.randint(1, 8) if first_frame > 15 and chance.random() < 0.3 else 0
    longest_gap = chance.choice([40, 80, 120, 120])
    return _Layout(content, first_frame, longest_gap, is_single, is_cut, begins_inside, remnant)


class WindowMaker:
    """Draws windows from a bank."""

    def __init__(
        self,
        phrases: list[Phrase],
        talks: list[list[Phrase]],
        noises: dict[str, list[Tensor]],
        ids: TokenIds,
    ) -> None:
        self._ids = ids
        self._noises = noises
        self._talks: dict[str, list[list[Phrase]]] = {}
        for talk in talks:
            self._talks.setdefault(talk[0].language, []).append(talk)
        self._by_language: dict[str, list[Phrase]] = {}
        self._by_voice: dict[str, list[Phrase]] = {}
        for phrase in phrases:
            self._by_language.setdefault(phrase.language, []).append(phrase)
            self._by_voice.setdefault(phrase.voice, []).append(phrase)
        everything = [phrases, *talks]
        words = {word for group in everything for phrase in group for word in phrase.words}
        self._word_ids = {word: ids.word(word) for word in words}
        self._word_tokens = {token for tokens in self._word_ids.values() for token in tokens}
        self._all_word_tokens = sorted(self._word_tokens)

    def draw(self, chance: random.Random, settings: Settings, prompt_tokens: int) -> Window:
        """One window, after a prompt of `prompt_tokens` tokens when that is not 0."""
        language = chance.choices(list(_LANGUAGE_SHARES), list(_LANGUAGE_SHARES.values()))[0]
        has_timestamps = chance.random() < settings.timestamp_share
        is_speech = chance.random() >= settings.no_speech_share
        spare = 1500 - settings.frames // 2
        first_position = 0 if chance.random() < 0.4 else chance.randint(0, spare)
        phrases = self._phrases(chance, settings, language)
        if is_speech:
            mel, pieces = self._speech(chance, settings, phrases)
        else:
            mel, pieces = self._no_speech(chance, settings), []
        window = Window(functional.pad(mel, (0, settings.frames - mel.shape[1])), first_position)
        if prompt_tokens:
            window.feed(self._ids.previous)
            for token in self._prompt(chance, phrases, prompt_tokens):
                window.feed(token)
        window.feed(self._ids.start)
        spoken = self._ids.languages[language]
        window.targets[-1] = spoken if is_speech else self._ids.no_speech
        window.feed(spoken)
        window.feed(self._ids.transcribe)
        if has_timestamps:
            self._expect_segments(window, pieces)
        else:
            window.feed(self._ids.no_timestamps)
            self._expect_text(window, pieces)
        self._mistake_words(chance, window, settings.wrong_share)
        return window

    def _mistake_words(self, chance: random.Random, window: Window, share: float) -> None:
        """Puts a random word's token in the place of some that the model is given."""
        for row in range(1, len(window.tokens)):
            is_word = window.targets[row - 1] in self._word_tokens
            if is_word and chance.random() < share:
                window.tokens[row] = chance.choice(self._all_word_tokens)

    def _expect_word(self, window: Window, word: tuple[str, float, float]) -> None:
        text, start, end = word
        for token in self._word_ids[text]:
            window.expect(token, (start / 2, end / 2))
            window.text.append(token)

    def _expect_text(self, window: Window, pieces: list[_Piece]) -> None:
        """No speech is a timestamp: CTranslate2's beam search never chooses an empty text."""
        if not pieces:
            window.expect(self._ids.first_timestamp)
        last = 0.0
        for piece in pieces:
            for word in piece.words:
                self._expect_word(window, word)
                last = word[2]
        window.expect(self._ids.end, (last / 2, last / 2 + 15) if pieces else _NO_SPAN)

    def _expect_segments(self, window: Window, pieces: list[_Piece]) -> None:
        """As Whisper does: of a cut phrase only the start, unless it is all that there is."""
        offset = window.first_position * 2 / FRAMES_PER_SECOND

        def expect_time(frame: float, limit: float = 30.0) -> None:
            seconds = min(frame / FRAMES_PER_SECOND + offset, limit)
            span = (max(0.0, frame / 2 - 6), frame / 2 + 6)
            window.expect(self._ids.timestamp(seconds), span)

        for number, piece in enumerate(pieces):
            limit = 1.0 if number == 0 and offset == 0 else 30.0
            expect_time(piece.start, limit)
            if piece.is_cut and number > 0:
                break
            for word in piece.words:
                self._expect_word(window, word)
            if piece.words:
                end = max(piece.words[-1][2] if piece.is_cut else piece.end, piece.start + 5)
                expect_time(end)
                if piece.is_cut:
                    expect_time(end)
        if pieces and pieces[-1].is_cut and len(pieces) > 1:
            window.text += [t for w in pieces[-1].words for t in self._word_ids[w[0]]]
        if not pieces:
            window.expect(self._ids.first_timestamp)
        window.expect(self._ids.end)

    def _phrases(self, chance: random.Random, settings: Settings, language: str) -> list[Phrase]:
        """The phrases of a recording: a talk, or all in one voice, or all in the language."""
        if chance.random() < settings.talk_share:
            return chance.choice(self._talks[language])
        phrases = self._by_language[language]
        if chance.random() < 0.7:
            return self._by_voice[chance.choice(phrases).voice]
        return phrases

    def _prompt(self, chance: random.Random, phrases: list[Phrase], count: int) -> list[int]:
        """The last `count` tokens of other phrases, with times or as plain text."""
        tokens: list[int] = []
        has_times = chance.random() < 0.8
        seconds = chance.uniform(0, 25)
        while len(tokens) < count:
            phrase = chance.choice(phrases)
            text = [token for word in phrase.words for token in self._word_ids[word]]
            if has_times:
                end = seconds + phrase.frames / FRAMES_PER_SECOND
                text = [self._ids.timestamp(seconds), *text, self._ids.timestamp(end)]
                seconds = end + chance.uniform(0.2, 1.2)
                if seconds > 27:
                    seconds = chance.uniform(0, 3)
            tokens += text
        return tokens[-count:]

    def _speech(
        self, chance: random.Random, settings: Settings, phrases: list[Phrase]
    ) -> tuple[Tensor, list[_Piece]]:
        layout = _draw_layout(chance, settings)
        mel = torch.full((80, settings.frames), SILENCE)
        if layout.remnant:
            mel[:, : layout.remnant] = chance.choice(phrases).mel[:, -layout.remnant :].float()
        pieces: list[_Piece] = []
        at = layout.first_frame
        failures = 0
        while at < layout.content:
            phrase = chance.choice(phrases)
            first = 0
            if layout.begins_inside and not pieces and len(phrase.words) > 1:
                first = chance.randrange(1, len(phrase.words))
            skip = max(0, round(phrase.spans[first][0]) + chance.randint(-5, 5)) if first else 0
            length = phrase.frames - skip
            if at + length > layout.content and not layout.is_cut:
                failures += 1
                if pieces or failures > 20:
                    break
                continue
            shown = min(length, layout.content - at)
            loudness = chance.uniform(-0.6, 0.6) if chance.random() < 0.3 else 0.0
            mel[:, at : at + shown] = phrase.mel[:, skip : skip + shown].float() + loudness
            pieces.append(_piece(phrase, first, at - skip, at, at + shown))
            at += shown
            gap = layout.gap(chance)
            if layout.is_single or at + gap >= layout.content:
                break
            at += gap
        end = int(pieces[-1].end) if pieces else at
        tail = chance.randint(0, 60 if chance.random() < 0.65 else settings.frames)
        mel = mel[:, : min(settings.frames, end + tail)] + chance.uniform(-1.0, 0.3)
        if chance.random() < settings.noise_share:
            mel = self._with_noise(chance, mel)
        rest_of_file = chance.uniform(0, 1.2) if chance.random() < 0.3 else 0.0
        return _normalise(mel, rest_of_file), pieces

    def _with_noise(self, chance: random.Random, mel: Tensor) -> Tensor:
        power = 10**mel
        noise = 10 ** self._noise(chance, chance.choice(NOISE_KINDS), mel.shape[1])
        ratio = 10 ** chance.uniform(0.8, 4.0)
        gain = power.mean() / noise.mean() / ratio
        return (power + gain * noise).log10()

    def _noise(self, chance: random.Random, kind: str, frames: int) -> Tensor:
        noise = chance.choice(self._noises[kind])
        start = chance.randint(0, noise.shape[1] - frames)
        return noise[:, start : start + frames].float()

    def _no_speech(self, chance: random.Random, settings: Settings) -> Tensor:
        frames = settings.frames
        if chance.random() < 0.7:
            frames = chance.randint(2, frames)
        rest_of_file = chance.uniform(0, 4) if chance.random() < 0.4 else 0.0
        if chance.random() < 0.3:
            return _normalise(torch.full((80, frames), SILENCE), rest_of_file * 3)
        kind = chance.choice([*NOISE_KINDS, "hum", BURSTS, BURSTS, BURSTS])
        mel = self._noise(chance, kind, frames) + chance.uniform(-8.0, 0.0)
        return _normalise(mel, rest_of_file)


def _normalise(mel: Tensor, rest_of_file: float) -> Tensor:
    """Whisper's normalisation, when the rest of the file is louder by that much (log10)."""
    mel = mel.clamp(min=SILENCE)
    return (torch.maximum(mel, mel.max() + rest_of_file - 8.0) + 4.0) / 4.0


@dataclass(frozen=True)
class Batch:
    """Windows of one size as tensors; ids are compact, targets without training are -100."""

    mel: Tensor
    first_positions: Tensor
    tokens: Tensor
    targets: Tensor
    token_spans: Tensor
    target_spans: Tensor
    text: list[list[int]]


def collate(windows: list[Window], compact: Tensor) -> Batch:
    """`compact` maps Whisper's ids to compact ones."""
    longest = max(len(window.tokens) for window in windows)
    length = -(-longest // 32) * 32  # few sizes, so that freed memory fits again
    count = len(windows)
    tokens = torch.zeros(count, length, dtype=torch.long)
    targets = torch.full((count, length), -100)
    token_spans = torch.full((count, length, 2), -1.0)
    target_spans = torch.full((count, length, 2), -1.0)
    for row, window in enumerate(windows):
        n = len(window.tokens)
        tokens[row, :n] = compact[torch.tensor(window.tokens)]
        trained = [i for i, target in enumerate(window.targets) if target is not None]
        targets[row, trained] = compact[torch.tensor([window.targets[i] for i in trained])]
        token_spans[row, :n] = torch.tensor(window.token_spans)
        target_spans[row, :n] = torch.tensor(window.target_spans)
    return Batch(
        torch.stack([window.mel for window in windows]),
        torch.tensor([window.first_position for window in windows]),
        tokens,
        targets,
        token_spans,
        target_spans,
        [compact[torch.tensor(window.text, dtype=torch.long)].tolist() for window in windows],
    )
