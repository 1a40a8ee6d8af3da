"""Measures a model folder through faster-whisper on phrases that training never drew.

`python -m tools.demo_model.evaluate FOLDER` prints the table of worker/demo_model/README.md.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path

import jiwer
import numpy as np
from faster_whisper import BatchedInferencePipeline, WhisperModel
from faster_whisper.transcribe import Segment, TranscriptionInfo

from tools.demo_model.bank import NOISE_KINDS, make_noise, talk_texts
from tools.demo_model.speech import SAMPLE_RATE, Speech, speak
from tools.demo_model.vocabulary import SAMPLE_SENTENCE, VOICES, WORDS

Transcribe = Callable[..., tuple[Iterable[Segment], TranscriptionInfo]]
LANGUAGE_NAMES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish"}


@dataclass(frozen=True)
class Recording:
    """Audio and the truth about it: phrases and words with their start and end in seconds."""

    language: str
    samples: np.ndarray
    phrases: list[tuple[str, float, float]]
    words: list[tuple[str, float, float]]

    @property
    def text(self) -> str:
        return " ".join(text for text, _, _ in self.phrases)

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def join(language: str, speeches: list[Speech], gaps_seconds: list[float]) -> Recording:
    """Speeches with silences before, between and after them, at 16 bits as in a WAV file."""
    blocks, phrases, words, at = [], [], [], 0.0
    for gap, speech in zip(gaps_seconds, [*speeches, None], strict=True):
        blocks.append(np.zeros(int(gap * SAMPLE_RATE), np.float32))
        at += len(blocks[-1]) / SAMPLE_RATE
        if speech is None:
            break
        blocks.append(speech.samples)
        spans = [(at + start, at + end) for start, end in speech.spans_seconds]
        phrases.append((" ".join(speech.words), spans[0][0], spans[-1][1]))
        words += [(w, a, b) for w, (a, b) in zip(speech.words, spans, strict=True)]
        at += speech.seconds
    samples = np.concatenate(blocks) * 0.8
    return Recording(language, np.round(samples * 32768) / np.float32(32768), phrases, words)


def held_out(name: str, language: str, seconds: float, phrase_words: tuple[int, int]) -> Recording:
    """Random phrases with pauses until `seconds` are full; at least one phrase."""
    chance = random.Random(f"held out {name} {language}")
    speeches, gaps, total = [], [chance.uniform(0.0, 0.3)], 0.0
    voice = chance.choice(VOICES[language])
    while not speeches or total < seconds:
        words = [chance.choice(WORDS[language]) for _ in range(chance.randint(*phrase_words))]
        speech = speak(" ".join(words), voice, chance.randint(130, 190))
        if speeches and total + speech.seconds > seconds:
            break
        speeches.append(speech)
        gaps.append(chance.uniform(0.3, 1.2))
        total = sum(gaps) + sum(speech.seconds for speech in speeches)
    gaps[-1] = min(gaps[-1], 0.5)
    return join(language, speeches, gaps)


def held_out_talk(name: str, language: str) -> Recording:
    """Phrases that share and repeat words, with pauses."""
    chance = random.Random(f"held out {name} {language}")
    voice, speed = chance.choice(VOICES[language]), chance.randint(130, 190)
    texts = talk_texts(chance, language)
    gaps = [chance.uniform(0.0, 0.3), *(chance.uniform(0.3, 1.2) for _ in texts[1:]), 0.3]
    return join(language, [speak(" ".join(words), voice, speed) for words in texts], gaps)


@dataclass
class Tally:
    """What one mode made of the recordings of one kind in one language."""

    references: list[str] = field(default_factory=list)
    hypotheses: list[str] = field(default_factory=list)
    languages_right: list[bool] = field(default_factory=list)
    start_errors: list[float] = field(default_factory=list)
    word_errors: list[float] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)

    @property
    def word_error_rate(self) -> float:
        return jiwer.wer(self.references, self.hypotheses)

    def add(self, recording: Recording, segments: list[Segment], language: str) -> None:
        text = " ".join(segment.text.strip() for segment in segments)
        self.references.append(recording.text)
        self.hypotheses.append(text)
        self.languages_right.append(language == recording.language)
        starts = [start for _, start, _ in recording.phrases]
        self.start_errors += [min(abs(s.start - start) for start in starts) for s in segments]
        if text != recording.text:
            self.mistakes.append(f"{recording.text}\n    -> {text}")
        said = [word for segment in segments for word in segment.words or ()]
        heard, spoken = [word.word.strip() for word in said], [w for w, _, _ in recording.words]
        for block in SequenceMatcher(None, spoken, heard, autojunk=False).get_matching_blocks():
            for i in range(block.size):
                truth = recording.words[block.a + i][1]
                self.word_errors.append(abs(said[block.b + i].start - truth))


def modes(model: WhisperModel) -> dict[str, Transcribe]:
    """The ways in which the service calls faster-whisper, with its default options."""
    batched = BatchedInferencePipeline(model)
    return {
        "sequential": model.transcribe,
        "sequential, VAD": lambda audio, **more: model.transcribe(audio, vad_filter=True, **more),
        "batched": lambda audio, **more: batched.transcribe(audio, batch_size=4, **more),
        "batched, timestamps": lambda audio, **more: batched.transcribe(
            audio, **{"batch_size": 4, "without_timestamps": False, **more}
        ),
    }


def measure(
    transcribe: Transcribe, recordings: list[Recording], tally: Tally, **options: object
) -> Tally:
    for recording in recordings:
        segments, info = transcribe(recording.samples, **options)
        tally.add(recording, list(segments), info.language)
    return tally


def quiet_failures(model: WhisperModel) -> list[str]:
    """Silences and noises of which some mode made text."""
    sounds = {"digital silence": np.zeros(5 * SAMPLE_RATE, np.float32)}
    for kind in NOISE_KINDS:
        for number, (seconds, level) in enumerate([(3, 0.1), (12, 0.01), (30, 0.2), (45, 0.05)]):
            noise = make_noise(kind, seconds, seed=90000 + number)
            sounds[f"{kind} {level}"] = np.clip(noise * level, -1, 1)
    failures = []
    for name, samples in sounds.items():
        for mode, transcribe in modes(model).items():
            for language in (None, "en", "de"):
                if mode.startswith("batched") and language is None:
                    continue
                segments, _ = transcribe(samples, language=language)
                text = "".join(segment.text for segment in segments).strip()
                if text:
                    failures.append(f"{name}, {mode}, {language}: {text}")
    return failures


def sample_failures(model: WhisperModel) -> list[str]:
    """Modes that get the sample sentence wrong."""
    speech = speak(SAMPLE_SENTENCE, "en-us", 160)
    recording = join("en", [speech], [0.0, 0.2])
    failures = []
    for mode, transcribe in modes(model).items():
        for options in (
            {},
            {"language": "en"},
            {"without_timestamps": True},
            {"without_timestamps": False},
            {"word_timestamps": True},
            {"beam_size": 1},
            {"initial_prompt": "hello and welcome"},
        ):
            segments, _ = transcribe(recording.samples, **options)
            text = " ".join(segment.text.strip() for segment in segments)
            if text != SAMPLE_SENTENCE:
                failures.append(f"{mode} {options}: {text}")
    return failures


def _times(errors: list[float]) -> str:
    if not errors:
        return "none"
    late = np.mean(np.array(errors) > 0.3)
    return f"{np.mean(errors):.2f} / {np.quantile(errors, 0.95):.2f} / {100 * late:.1f} %"


def report(model: WhisperModel, kinds: dict[str, list[Recording]], shows_mistakes: bool) -> None:
    """Prints one row per kind of recording and mode."""
    print(
        f"| recordings | mode | {' | '.join(LANGUAGE_NAMES.values())} | language right | starts |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for kind, recordings in kinds.items():
        for mode, transcribe in modes(model).items():
            tallies = {
                language: measure(
                    transcribe, [r for r in recordings if r.language == language], Tally()
                )
                for language in WORDS
            }
            rates = " | ".join(f"{100 * t.word_error_rate:.1f} %" for t in tallies.values())
            right = np.mean([ok for t in tallies.values() for ok in t.languages_right])
            starts = _times([e for t in tallies.values() for e in t.start_errors])
            print(f"| {kind} | {mode} | {rates} | {100 * right:.1f} % | {starts} |", flush=True)
            if shows_mistakes:
                for tally in tallies.values():
                    print("\n".join("   " + mistake for mistake in tally.mistakes))


def recordings_by_kind(clips: int, windows: int, files: int) -> dict[str, list[Recording]]:
    """Per language: short clips, full windows, files of 2 to 4 minutes, phrases without a pause,
    talks of ten phrases that share and repeat words."""
    kinds: dict[str, list[Recording]] = {}
    for language in WORDS:
        for kind, count, seconds, words in (
            ("clips of 1-8 s", clips, (1.0, 8.0), (2, 9)),
            ("full 30 s windows", windows, (29.5, 29.5), (2, 12)),
            ("files of 2-4 min", files, (120.0, 240.0), (2, 12)),
            ("15-60 words without a pause", windows, (1.0, 1.0), (15, 60)),
        ):
            for number in range(count):
                length = random.Random(f"{kind} {number}").uniform(*seconds)
                recording = held_out(f"{kind} {number}", language, length, words)
                kinds.setdefault(kind, []).append(recording)
        for number in range(windows):
            recording = held_out_talk(f"talk {number}", language)
            kinds.setdefault("10 phrases that repeat words", []).append(recording)
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=60, help="per language")
    parser.add_argument("--windows", type=int, default=6, help="per language")
    parser.add_argument("--files", type=int, default=2, help="per language")
    parser.add_argument("--compute-type", default="int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mistakes", action="store_true", help="print what was misheard")
    options = parser.parse_args()
    started = time.monotonic()
    model = WhisperModel(
        str(options.folder),
        device="cpu",
        compute_type=options.compute_type,
        cpu_threads=options.threads,
    )
    kinds = recordings_by_kind(options.clips, options.windows, options.files)
    report(model, kinds, options.mistakes)
    for kind in [kind for kind in kinds if kind.startswith(("clips", "full"))]:
        timed = kinds[kind][:: max(1, len(kinds[kind]) // 24)]
        tally = measure(model.transcribe, timed, Tally(), word_timestamps=True)
        print(f"word starts, {kind}: {_times(tally.word_errors)}")
    print("text from silence or noise:", quiet_failures(model) or "none")
    print("sample sentence wrong in:", sample_failures(model) or "no mode")
    size = sum(file.stat().st_size for file in options.folder.iterdir())
    print(f"folder: {size / 1e6:.2f} MB; took {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
