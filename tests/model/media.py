"""Makes media files for tests, with FFmpeg's own encoders through PyAV."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import av
import numpy as np

CODECS = {
    "wav": "pcm_s16le",
    "flac": "flac",
    "mp3": "libmp3lame",
    "m4a": "aac",
    "mp4": "aac",
    "ogg": "libopus",
    "webm": "libopus",
    "aiff": "pcm_s16be",
}


def tone(seconds: float, rate: int = 16_000) -> np.ndarray:
    """A gliding tone, 16 bit."""
    time = np.arange(int(seconds * rate)) / rate
    return (np.sin(2 * np.pi * (200 + 100 * time) * time) * 12_000).astype(np.int16)


def samples_of(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16)


def encode(path: Path, samples: np.ndarray, rate: int = 16_000) -> Path:
    """Writes `samples` in the format that the name's suffix says."""
    with av.open(str(path), "w") as container:
        out_rate = 48_000 if "opus" in CODECS[path.suffix[1:]] else rate
        stream = container.add_stream(CODECS[path.suffix[1:]], rate=out_rate, layout="mono")
        stream.bit_rate = 96_000  # where the format is a lossy one
        resampler = av.AudioResampler(
            format=stream.format.name, layout="mono", rate=out_rate, frame_size=stream.frame_size
        )
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate = rate
        for ready in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(ready))
        container.mux(stream.encode(None))
    return path


def video(path: Path, sound: np.ndarray | None = None) -> Path:
    """A second of video, with the sound (16 kHz) or without any."""
    with av.open(str(path), "w") as container:
        voice = None if sound is None else container.add_stream("aac", rate=16_000, layout="mono")
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(10):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if voice is not None:
            frame = av.AudioFrame.from_ndarray(sound.reshape(1, -1), format="s16", layout="mono")
            frame.sample_rate = 16_000
            resampler = av.AudioResampler(
                format=voice.format.name, layout="mono", rate=16_000, frame_size=voice.frame_size
            )
            for ready in [*resampler.resample(frame), *resampler.resample(None)]:
                container.mux(voice.encode(ready))
            container.mux(voice.encode(None))
    return path


def wav_header(rate: int, channels: int, size: int) -> bytes:
    """A WAV header that claims what it is told to."""
    block = channels * 2
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        (36 + size) & 0xFFFFFFFF,
        b"WAVE",
        b"fmt ",
        16,
        1,
        channels & 0xFFFF,
        rate,
        (rate * block) & 0xFFFFFFFF,
        block & 0xFFFF,
        16,
        b"data",
        size & 0xFFFFFFFF,
    )
