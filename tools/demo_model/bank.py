"""The bank: phrases and noises as raw log-mel spectra, made once, from which windows are built.

`python -m tools.demo_model.bank FOLDER` writes `FOLDER/phrases-NN.pt`, `FOLDER/talks-NN.pt` and
`FOLDER/noises.pt`. A talk is a handful of phrases in one voice that share words, as the sentences
of real recordings do.
"""

import argparse
import multiprocessing
import random
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from faster_whisper.feature_extractor import FeatureExtractor

from tools.demo_model.speech import SAMPLE_RATE, Speech, speak
from tools.demo_model.vocabulary import (
    FUNCTION_WORDS,
    SAMPLE_SENTENCE,
    VOICE_LANGUAGE,
    VOICES,
    WORDS,
)

FRAMES_PER_SECOND = 100
NOISE_KINDS = ("white", "pink", "brown", "hum", "clicks", "room")
BURSTS = "bursts"
_PHRASES_PER_FILE = 2000
_TALKS_PER_FILE = 200
PHRASES_PER_TALK = 10
_LANGUAGE_SHARES = {"en": 0.55, "de": 0.15, "fr": 0.15, "es": 0.15}
_TALK_LANGUAGE_SHARES = {"en": 0.4, "de": 0.18, "fr": 0.21, "es": 0.21}


@dataclass(frozen=True)
class Phrase:
    """Words said in one go. `mel` is log10 power [80, frames]; spans are in frames."""

    voice: str
    words: list[str]
    spans: list[tuple[float, float]]
    mel: torch.Tensor

    @property
    def language(self) -> str:
        return VOICE_LANGUAGE[self.voice]

    @property
    def frames(self) -> int:
        return self.mel.shape[1]


@cache
def _mel_filters() -> torch.Tensor:
    return torch.tensor(FeatureExtractor().mel_filters, dtype=torch.float32)


def log_mel(samples: np.ndarray, floor: float = 1e-10) -> torch.Tensor:
    """Whisper's log10 mel power, before its normalisation, as [80, len // 160]."""
    padded = np.pad(samples, (0, -len(samples) % 160))
    spectrum = torch.stft(
        torch.from_numpy(padded), 400, 160, window=torch.hann_window(400), return_complex=True
    )
    power = spectrum[:, :-1].abs() ** 2
    return (_mel_filters() @ power).clamp(min=floor).log10()


def random_phrase(seed: int | str, language: str | None = None) -> Speech:
    """The phrase of a seed: 1 to 12 random words, one in thirty longer, up to 80."""
    return _speak_random(random.Random(seed), language)[1]


def _speak_random(chance: random.Random, language: str | None) -> tuple[str, Speech]:
    if language is None:
        shares = list(_LANGUAGE_SHARES.values())
        language = chance.choices(list(_LANGUAGE_SHARES), shares)[0]
    count = chance.randint(13, 80) if chance.random() < 1 / 30 else chance.randint(1, 12)
    words = [chance.choice(WORDS[language]) for _ in range(count)]
    if language == "en" and chance.random() < 0.005:
        words = SAMPLE_SENTENCE.split()
    voice = chance.choice(VOICES[language])
    speech = speak(" ".join(words), voice, chance.randint(128, 192), chance.randint(43, 57))
    return voice, speech


def _phrase(voice: str, speech: Speech) -> Phrase:
    spans = [(a * FRAMES_PER_SECOND, b * FRAMES_PER_SECOND) for a, b in speech.spans_seconds]
    return Phrase(voice, speech.words, spans, log_mel(speech.samples).half())


def make_phrase(seed: int) -> Phrase:
    return _phrase(*_speak_random(random.Random(seed), None))


def talk_texts(chance: random.Random, language: str) -> list[list[str]]:
    """Phrases that are hard to keep one's place in: few words that come again and again.

    Some talks mix function words, the commonest most often, with a few others; some say words
    twice in a row, or begin as a phrase before began and go on differently.
    """
    kind = chance.choices(["natural", "few words", "all words"], [0.45, 0.35, 0.2])[0]
    pool = WORDS[language]
    if kind != "all words":
        pool = chance.sample(pool, chance.randint(3 if kind == "few words" else 8, 30))
    common = FUNCTION_WORDS[language]
    weights = [1 / (rank + 1.5) for rank in range(len(common))]
    twice = chance.choice([0.0, 0.05, 0.15])
    texts: list[list[str]] = []
    for _ in range(PHRASES_PER_TALK):
        count = chance.randint(13, 60) if chance.random() < 0.06 else chance.randint(1, 12)
        words: list[str] = []
        if texts and chance.random() < 0.25:
            earlier = chance.choice(texts)
            start = chance.randrange(len(earlier))
            words = earlier[start : start + chance.randint(2, 6)]
        while len(words) < count:
            if words and chance.random() < twice:
                words.append(words[-1])
            elif kind == "natural" and chance.random() < 0.5:
                words.append(chance.choices(common, weights)[0])
            else:
                words.append(chance.choice(pool))
        texts.append(words)
    return texts


def make_talk(number: int) -> list[Phrase]:
    """The talk of that number, in one voice at about one speed."""
    chance = random.Random(f"talk {number}")
    shares = list(_TALK_LANGUAGE_SHARES.values())
    language = chance.choices(list(_TALK_LANGUAGE_SHARES), shares)[0]
    voice = chance.choice(VOICES[language])
    speed, pitch = chance.randint(130, 190), chance.randint(45, 55)
    if chance.random() < 0.5:
        pitch = 50
    return [
        _phrase(voice, speak(" ".join(words), voice, speed + chance.randint(-4, 4), pitch))
        for words in talk_texts(chance, language)
    ]


def make_noise(kind: str, seconds: float, seed: int) -> np.ndarray:
    """Noise of unit RMS (16 kHz mono)."""
    rng = np.random.default_rng(seed)
    count = int(seconds * SAMPLE_RATE)
    time_axis = np.arange(count) / SAMPLE_RATE
    if kind == "hum":
        base = rng.choice([50.0, 60.0, 100.0, 120.0])
        noise = sum(
            rng.uniform(0.1, 1) / k * np.sin(2 * np.pi * (k * base * time_axis + rng.random()))
            for k in range(1, int(rng.integers(2, 9)))
        )
    elif kind == "clicks":
        noise = rng.standard_normal(count) * 1e-4
        for at in rng.integers(0, count - 400, int(seconds * rng.uniform(0.5, 6))):
            decay = np.exp(-np.arange(400) / rng.uniform(5, 80))
            noise[at : at + 400] += decay * rng.standard_normal(400)
    else:
        exponent = {"white": 0.0, "pink": 0.5, "brown": 1.0, "room": rng.uniform(0.2, 1.2)}[kind]
        spectrum = np.fft.rfft(rng.standard_normal(count))
        frequency = np.maximum(np.fft.rfftfreq(count, 1 / SAMPLE_RATE), 20)
        shape = frequency**-exponent
        if kind == "room":
            shape *= 1 + 3 * np.exp(-(((frequency - rng.uniform(80, 3000)) / 200) ** 2))
        noise = np.fft.irfft(spectrum * shape, count)
        if kind == "room":
            noise *= 1 + 0.3 * np.sin(2 * np.pi * rng.uniform(0.05, 0.5) * time_axis)
    return (noise / np.sqrt(np.mean(np.square(noise)))).astype(np.float32)


def _write_phrases(folder: Path, number: int) -> float:
    torch.set_num_threads(1)
    first = number * _PHRASES_PER_FILE
    phrases = [make_phrase(seed) for seed in range(first, first + _PHRASES_PER_FILE)]
    return _write(folder / f"phrases-{number:02}.pt", phrases)


def _write_talks(folder: Path, number: int) -> float:
    torch.set_num_threads(1)
    first = number * _TALKS_PER_FILE
    talks = [make_talk(talk) for talk in range(first, first + _TALKS_PER_FILE)]
    return _write(folder / f"talks-{number:02}.pt", [phrase for talk in talks for phrase in talk])


def _write(file: Path, phrases: list[Phrase]) -> float:
    """Writes phrases; returns how many seconds they last."""
    torch.save([(p.voice, p.words, p.spans, p.mel) for p in phrases], file)
    return sum(phrase.frames for phrase in phrases) / FRAMES_PER_SECOND


def make_bursts(seconds: float, seed: int) -> np.ndarray:
    """Noise that is switched on and off, with the clicks of that."""
    chance = random.Random(f"bursts {seed}")
    noise = make_noise(chance.choice([*NOISE_KINDS, "hum", "hum"]), seconds, seed + 1000)
    at = 0.0
    while at < seconds:
        on = chance.choice([chance.uniform(0.2, 4), chance.uniform(4, seconds)])
        off = chance.choice([chance.uniform(0.1, 2), chance.uniform(0.1, seconds)])
        noise[int((at + on) * SAMPLE_RATE) : int((at + on + off) * SAMPLE_RATE)] = 0
        at += on + off
    return noise


def _write_noises(folder: Path, count_per_kind: int) -> None:
    noises = {
        kind: [
            log_mel(make_noise(kind, 32.0, seed), floor=1e-14).half()
            for seed in range(count_per_kind)
        ]
        for kind in NOISE_KINDS
    }
    noises[BURSTS] = [
        log_mel(make_bursts(32.0, seed), floor=1e-14).half() for seed in range(3 * count_per_kind)
    ]
    torch.save(noises, folder / "noises.pt")


def load_phrases(folder: Path) -> list[Phrase]:
    """Every phrase of the bank. Raises FileNotFoundError when there is none."""
    return _load(folder, "phrases-*.pt")


def load_talks(folder: Path) -> list[list[Phrase]]:
    """Every talk of the bank. Raises FileNotFoundError when there is none."""
    phrases = _load(folder, "talks-*.pt")
    return [phrases[i : i + PHRASES_PER_TALK] for i in range(0, len(phrases), PHRASES_PER_TALK)]


def _load(folder: Path, pattern: str) -> list[Phrase]:
    """The files stay on disk until their phrases are used; processes share what is in memory."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no bank in {folder}: run python -m tools.demo_model.bank first")
    return [Phrase(*record) for file in files for record in torch.load(file, mmap=True)]


def load_noises(folder: Path) -> dict[str, list[torch.Tensor]]:
    return torch.load(folder / "noises.pt", mmap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=20, help="of 2000 phrases each")
    parser.add_argument("--talk-files", type=int, default=12, help="of 200 talks each")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    _write_noises(options.folder, count_per_kind=48)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        work = [(options.folder, number) for number in range(options.files)]
        seconds = sum(pool.starmap(_write_phrases, work, chunksize=1))
        work = [(options.folder, number) for number in range(options.talk_files)]
        seconds += sum(pool.starmap(_write_talks, work, chunksize=1))
    print(f"{seconds / 3600:.1f} h of speech in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
