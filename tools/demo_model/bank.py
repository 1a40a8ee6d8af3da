"""The bank: phrases and noises as raw log-mel spectra, made once, from which windows are built.

`python -m tools.demo_model.bank FOLDER` writes `FOLDER/phrases-NN.pt` and `FOLDER/noises.pt`.
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
from tools.demo_model.vocabulary import SAMPLE_SENTENCE, VOICE_LANGUAGE, VOICES, WORDS

FRAMES_PER_SECOND = 100
NOISE_KINDS = ("white", "pink", "brown", "hum", "clicks", "room")
_PHRASES_PER_FILE = 2000
_LANGUAGE_SHARES = {"en": 0.55, "de": 0.15, "fr": 0.15, "es": 0.15}


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


def make_phrase(seed: int) -> Phrase:
    voice, speech = _speak_random(random.Random(seed), None)
    spans = [(a * FRAMES_PER_SECOND, b * FRAMES_PER_SECOND) for a, b in speech.spans_seconds]
    return Phrase(voice, speech.words, spans, log_mel(speech.samples).half())


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
    records = [(p.voice, p.words, p.spans, p.mel) for p in phrases]
    torch.save(records, folder / f"phrases-{number:02}.pt")
    return sum(phrase.frames for phrase in phrases) / FRAMES_PER_SECOND


def _write_noises(folder: Path, count_per_kind: int) -> None:
    noises = {
        kind: [
            log_mel(make_noise(kind, 32.0, seed), floor=1e-14).half()
            for seed in range(count_per_kind)
        ]
        for kind in NOISE_KINDS
    }
    torch.save(noises, folder / "noises.pt")


def load_phrases(folder: Path) -> list[Phrase]:
    """Every phrase of the bank. Raises FileNotFoundError when there is none."""
    files = sorted(folder.glob("phrases-*.pt"))
    if not files:
        raise FileNotFoundError(f"no bank in {folder}: run python -m tools.demo_model.bank first")
    return [Phrase(*record) for file in files for record in torch.load(file)]


def load_noises(folder: Path) -> dict[str, list[torch.Tensor]]:
    return torch.load(folder / "noises.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=20, help="of 2000 phrases each")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    _write_noises(options.folder, count_per_kind=16)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        work = [(options.folder, number) for number in range(options.files)]
        seconds = sum(pool.starmap(_write_phrases, work, chunksize=1))
    print(f"{seconds / 3600:.1f} h of speech in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
