"""What FFmpeg (through PyAV) is told before it looks at a stranger's file, and how sound is got out
of it: the whitelists, the checks, the samples, the length that the header states.

Playlists that name other files or addresses, and video decoders, are out. Runs in the processes of
worker/engine/decode_server.py only; the worker asks it for its version alone. The samples equal
those of `faster_whisper.decode_audio`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import av
from av.audio.frame import AudioFrame
from av.container import InputContainer
from av.error import InvalidDataError

from shared.errors import DecoderUnavailable, NoAudioStream, UnreadableMedia

SAMPLE_RATE = 16_000
SAMPLE_BYTES = 2

# FFmpeg 8.1.1, as it is in PyAV 17.1. Older ones corrupt memory in containers that we accept: MOV
# (CVE-2026-40962, before 8.1) and the IAMF boxes that a MOV may hold (PyAV before 17.1).
OLDEST = {"libavformat": (62, 12, 101), "libavcodec": (62, 28, 101)}

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
CODECS = frozenset(
    n for n in av.codecs_available if n in _DECODERS.split(",") or n.startswith("pcm_")
)
# Containers whose header states a length that can be believed; elsewhere FFmpeg estimates it.
STATED_DURATION = {"w64", "mp3", "flac", "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "aiff", "caf"}
MP3_LENGTH_TAGS = (b"Xing", b"Info", b"VBRI")
RIFF_OPEN_SIZE = 0x7FFFF000
HEAD_BYTES = 64 * 1024


def require_version(found: Mapping[str, tuple[int, ...]] = av.library_versions) -> None:
    """Raises DecoderUnavailable where FFmpeg has flaws that an upload could use."""
    for library, oldest in OLDEST.items():
        if found.get(library, (0,)) < oldest:
            version = ".".join(map(str, found.get(library, (0,))))
            raise DecoderUnavailable(
                f"PyAV {av.__version__} has {library} {version}, with flaws that an upload can "
                f"use; {'.'.join(map(str, oldest))} (FFmpeg 8.1.1) or newer is needed. Install "
                "PyAV 17.1 or newer: pip install -r requirements/worker.txt"
            )


def open_file(descriptor: int) -> InputContainer:
    """Opens the file behind an open descriptor: no name is ever given to FFmpeg."""
    return av.open(
        "fd:",
        mode="r",
        metadata_errors="ignore",
        options={
            "fd": str(descriptor),
            "format_whitelist": CONTAINERS,
            "codec_whitelist": ",".join(sorted(CODECS)),
            "protocol_whitelist": "fd",
            "enable_drefs": "0",
            "probesize": "5000000",
            "analyzeduration": "10000000",
            "max_streams": "64",
        },
    )


def check(container: InputContainer) -> None:
    """Raises NoAudioStream, or UnreadableMedia for a codec or a claim that we don't take."""
    if not container.streams.audio:
        raise NoAudioStream
    context = container.streams.audio[0].codec_context
    if not 4_000 <= context.sample_rate <= 384_000 or not 1 <= context.channels <= 32:
        raise UnreadableMedia(
            f"The file claims {context.sample_rate} samples a second in {context.channels} "
            "channels, which no recording has."
        )
    if context.codec.name not in CODECS:  # the whitelist above is for probing only
        raise UnreadableMedia(
            f"The codec {context.codec.name} is not among those that we decode. Convert the file, "
            "for example to FLAC or MP3."
        )
    context.thread_count = 1  # a child may start none, unless it is root's


def samples(container: InputContainer) -> Iterator[memoryview]:
    """The first audio stream as 16-bit mono samples at 16 kHz, in pieces."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
    for frame in _with_end(_frames(container)):
        for resampled in resampler.resample(frame):
            yield memoryview(resampled.planes[0])[: resampled.samples * SAMPLE_BYTES]


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


def stated_seconds(container: InputContainer, descriptor: int) -> float | None:
    """What the header says of the length; None where it says nothing that can be believed."""
    name = container.format.name
    stream = container.streams.audio[0]
    head = os.pread(descriptor, HEAD_BYTES, 0)
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
