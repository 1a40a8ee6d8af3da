"""Writes the sample recordings, and the truth of what is said in them and when.

`python -m tools.demo_model.samples FOLDER`
"""

import argparse
import json
import wave
from pathlib import Path

import av
import numpy as np

from tools.demo_model.bank import make_noise
from tools.demo_model.evaluate import Recording, held_out, join
from tools.demo_model.speech import SAMPLE_RATE, speak
from tools.demo_model.vocabulary import SAMPLE_SENTENCE, VOICE_LANGUAGE

SENTENCES = {
    "quick-brown-fox.wav": ("en-us", [SAMPLE_SENTENCE]),
    "de.wav": ("de", ["hallo die sonne ist gelb und der himmel ist blau"]),
    "fr.wav": ("fr-fr", ["bonjour le petit chat noir et le grand chien blanc"]),
    "es.wav": ("es", ["hola amigo hoy comer pan queso y leche"]),
    "two-sentences.wav": (
        "en-us",
        [
            "the service is open today",
            "please send your audio file and wait",
            "thank you and goodbye",
        ],
    ),
}
NO_SPEECH = {
    "silence.wav": np.zeros(3 * SAMPLE_RATE, np.float32),
    "noise.wav": make_noise("pink", 3, seed=1) * 0.05,
}


def write_wav(file: Path, samples: np.ndarray) -> None:
    with wave.open(str(file), "wb") as output:
        output.setnchannels(1)
        output.setsampwidth(2)
        output.setframerate(SAMPLE_RATE)
        output.writeframes(np.round(samples * 32767).astype("<i2").tobytes())


def write_ogg(file: Path, samples: np.ndarray, bits_per_second: int = 32000) -> None:
    with av.open(str(file), "w", format="ogg") as output:
        stream = output.add_stream("libopus", rate=SAMPLE_RATE, layout="mono")
        stream.bit_rate = bits_per_second
        data = np.round(samples * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(data, format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def truth(recording: Recording) -> dict[str, object]:
    """What was said and when, in the words of the service's results."""
    return {
        "text": recording.text,
        "language": recording.language,
        "segments": [
            {"start": round(start, 2), "end": round(end, 2), "text": text}
            for text, start, end in recording.phrases
        ],
        "words": [
            {"start": round(start, 2), "end": round(end, 2), "word": word}
            for word, start, end in recording.words
        ],
    }


def record(voice: str, phrases: list[str], pause_seconds: float) -> Recording:
    speeches = [speak(phrase, voice, 160) for phrase in phrases]
    gaps = [0.1, *[pause_seconds] * (len(phrases) - 1), 0.3]
    return join(VOICE_LANGUAGE[voice], speeches, gaps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    truths: dict[str, object] = {}
    for name, (voice, phrases) in SENTENCES.items():
        recording = record(voice, phrases, pause_seconds=0.8)
        write_wav(folder / name, recording.samples)
        truths[name] = truth(recording)
    long = held_out("long sample", "en", 120.0, (4, 9))
    write_ogg(folder / "long.ogg", long.samples)
    truths["long.ogg"] = truth(long)
    for name, samples in NO_SPEECH.items():
        write_wav(folder / name, samples)
        truths[name] = {"text": "", "language": None, "segments": [], "words": []}
    lines = json.dumps(truths, ensure_ascii=False, indent=1)
    (folder / "transcripts.json").write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
