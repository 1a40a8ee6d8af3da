"""Media file -> audio samples, with limits. The only place that opens what a stranger uploaded.

FFmpeg (through PyAV) is told which containers, protocols and codecs it may use: playlists that name
other files or addresses, and video decoders, are out. The samples equal those of
`faster_whisper.decode_audio`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from numpy.typing import NDArray

from shared.errors import (
    AudioTooLong,
    AudioTooShort,
    NoAudioStream,
    TruncatedMedia,
    UnreadableMedia,
)

SAMPLE_RATE = 16_000
MIN_SAMPLES = SAMPLE_RATE // 100  # one frame of the model's features

CONTAINERS = (
    "wav,w64,mp3,flac,ogg,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,aac,aiff,amr,caf,asf,mpegts,mpeg,"
    "avi,au,ac3,eac3"
)
# Decoders of sound alone: most flaws of FFmpeg are in its video decoders and in rare formats.
_DECODERS = (
    "aac,aac_latm,ac3,adpcm_ima_qt,adpcm_ima_wav,adpcm_ms,alac,amrnb,amrwb,dca,eac3,flac,gsm,"
    "gsm_ms,libopus,libvorbis,mp1,mp1float,mp2,mp2float,mp3,mp3float,opus,vorbis,wmalossless,"
    "wmapro,wmav1,wmav2"
)
CODECS = ",".join(
    sorted(n for n in av.codecs_available if n in _DECODERS.split(",") or n.startswith("pcm_"))
)
# Containers whose header states a length that can be believed; elsewhere FFmpeg estimates it.
STATED_DURATION = {"w64", "mp3", "flac", "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "aiff", "caf"}
MP3_LENGTH_TAGS = (b"Xing", b"Info", b"VBRI")
RIFF_OPEN_SIZE = 0x7FFFF000
HEAD_BYTES = 64 * 1024
TRUNCATED_BELOW = 0.95  # of the stated duration
TRUNCATED_SLACK_SECONDS = 0.5


def decode(
    path: Path, *, max_seconds: float, allow_partial: bool = False
) -> tuple[NDArray[np.float32], bool]:
    """The first audio stream as mono samples in [-1, 1] at 16 kHz, and whether the file ends early.

    Raises FileNotFoundError, UnreadableMedia, NoAudioStream, AudioTooLong, AudioTooShort, and
    TruncatedMedia unless `allow_partial`.
    """
    try:
        with _open(path) as container:
            if not container.streams.audio:
                raise NoAudioStream
            _check_stream(container)
            blocks = list(_samples(container, max_seconds))
            stated = _stated_seconds(container, path)
    except FileNotFoundError:
        raise
    except FFmpegError as exc:
        raise UnreadableMedia from exc
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.int16)
    seconds = len(samples) / SAMPLE_RATE
    is_partial = stated is not None and seconds < stated * TRUNCATED_BELOW - TRUNCATED_SLACK_SECONDS
    if is_partial and not allow_partial:
        raise TruncatedMedia(
            f"The file ends early: {seconds:.1f} of the {stated:.1f} seconds that its header "
            "promises could be decoded. Upload the whole file, or send allow_partial=true."
        )
    if len(samples) < MIN_SAMPLES:
        raise AudioTooShort
    return samples.astype(np.float32) / 32768.0, is_partial


def _open(path: Path) -> InputContainer:
    return av.open(
        str(path),
        mode="r",
        metadata_errors="ignore",
        timeout=10,
        options={
            "format_whitelist": CONTAINERS,
            "codec_whitelist": CODECS,
            "protocol_whitelist": "file",
            "enable_drefs": "0",
            "probesize": "5000000",
            "analyzeduration": "10000000",
            "max_streams": "64",
        },
    )


def _check_stream(container: InputContainer) -> None:
    context = container.streams.audio[0].codec_context
    if not 4_000 <= context.sample_rate <= 384_000 or not 1 <= context.channels <= 32:
        raise UnreadableMedia(
            f"The file claims {context.sample_rate} samples a second in {context.channels} "
            "channels, which no recording has."
        )


def _samples(container: InputContainer, max_seconds: float) -> Iterator[NDArray[np.int16]]:
    resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
    left = int(max_seconds * SAMPLE_RATE)
    for frame in _with_end(_frames(container)):
        for resampled in resampler.resample(frame):
            block: NDArray[np.int16] = (
                resampled.to_ndarray().astype(np.int16, copy=False).reshape(-1)
            )
            left -= len(block)
            if left < 0:
                raise AudioTooLong(
                    f"The audio is longer than {max_seconds:.0f} seconds, the most this server "
                    "accepts. Split the recording."
                )
            yield block


def _with_end(frames: Iterator[AudioFrame]) -> Iterator[AudioFrame | None]:
    """The frames, then None, which flushes the resampler."""
    yield from frames
    yield None


def _frames(container: InputContainer) -> Iterator[AudioFrame]:
    """Decoded frames; damaged ones are left out, as players do."""
    frames = container.decode(audio=0)
    while True:
        try:
            frame = next(frames)
        except StopIteration:
            return
        except InvalidDataError:
            continue
        frame.pts = None  # times that jump would make the resampler insert silence
        yield frame


def _stated_seconds(container: InputContainer, path: Path) -> float | None:
    """What the header says of the length; None where it says nothing that can be believed."""
    name = container.format.name
    stream = container.streams.audio[0]
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if name == "wav":
        return _stated_by_riff(head)
    if name == "mp3" and not any(tag in head for tag in MP3_LENGTH_TAGS):
        return None
    if name not in STATED_DURATION:
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _stated_by_riff(head: bytes) -> float | None:
    """A WAV's own statement; FFmpeg quietly replaces it by what the file holds. Programs that write
    to a pipe leave it 0 or at its maximum."""
    place, bytes_per_second = 12, 0
    while place + 8 <= len(head):
        kind, size = head[place : place + 4], int.from_bytes(head[place + 4 : place + 8], "little")
        if kind == b"fmt ":
            bytes_per_second = int.from_bytes(head[place + 16 : place + 20], "little")
        if kind == b"data":
            is_open = size == 0 or size >= RIFF_OPEN_SIZE
            return None if is_open or not bytes_per_second else size / bytes_per_second
        place += 8 + size + size % 2
    return None
