"""Media file -> audio samples, with limits. The worker's side: it never looks into what a stranger
uploaded. A child of the decode server (worker/engine/decode_server.py) does, and streams samples
to here; whatever becomes of that child is an answer about the file.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import wave
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import (
    AudioTooLong,
    AudioTooShort,
    DecoderUnavailable,
    MediaError,
    NoAudioStream,
    TruncatedMedia,
    UnreadableMedia,
)
from worker.engine import ffmpeg
from worker.engine.decode_server import REQUEST
from worker.engine.ffmpeg import SAMPLE_BYTES

log = logging.getLogger(__name__)

SAMPLE_RATE = ffmpeg.SAMPLE_RATE
MIN_SAMPLES = SAMPLE_RATE // 100  # one frame of the model's features
TRUNCATED_BELOW = 0.95  # of the stated duration
TRUNCATED_SLACK_SECONDS = 0.5

ROOT = Path(__file__).parents[2]
# What the server may see of the worker's environment: no password, no token.
ENVIRONMENT = ("PATH", "LANG", "LC_", "LD_", "DYLD_", "MALLOC_CONF", "PYTHON")
BLOCK_BYTES = 1024 * 1024
RECORD_BYTES = 4096
TICK_MS = 100  # how late a checkpoint is when no samples come
TRIES = 3  # of a file whose process was killed from outside
REFUSALS = {kind.code: kind for kind in (NoAudioStream, UnreadableMedia)}
MADE_TO_HARM = "It is damaged, or made to do harm. Convert the file, for example to FLAC."


@dataclass(frozen=True)
class Limits:
    """What one file may cost. A recording needs 0.2 s of CPU for a minute, and 150 MiB."""

    cpu_seconds: int = 60
    audio_seconds_per_cpu: int = 50  # so much decoded audio earns one more second of CPU
    memory_bytes: int = 512 * 1024**2  # of addresses
    silent_seconds: float = 120  # without a sample


class DecodeServerLost(Exception):
    """The server was killed again and again: not the file's fault."""


class Decoder:
    """Owns the decode server. Safe to call from several threads; each file has a process of its
    own."""

    def __init__(self, limits: Limits = Limits()):
        self._limits = limits
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def start(self) -> None:
        """Starts the server ahead of the first file, which would start it otherwise."""
        with self._lock:
            self._running()

    def check(self) -> None:
        """Decodes a moment of silence. Raises DecoderUnavailable where no file could be decoded:
        the machine's fault must not be blamed on every upload."""
        if not hasattr(os, "memfd_create"):
            return
        with open(os.memfd_create("silence"), "w+b") as file, wave.open(file, "wb") as silence:
            silence.setparams((1, SAMPLE_BYTES, SAMPLE_RATE, 0, "NONE", ""))
            silence.writeframes(bytes(SAMPLE_RATE))
            file.flush()
            try:
                self.decode(Path(f"/proc/self/fd/{file.fileno()}"), max_seconds=1)
            except MediaError as exc:
                raise DecoderUnavailable(
                    f"Not even silence can be decoded on this machine: {exc.message}"
                ) from exc

    def close(self) -> None:
        """Ends the server, and with it whatever is being decoded."""
        with self._lock:
            if self._server:
                self._server.stop()
                self._server = None

    def decode(
        self,
        path: Path,
        *,
        max_seconds: float,
        allow_partial: bool = False,
        checkpoint: Callable[[], None] = lambda: None,
    ) -> tuple[NDArray[np.float32], bool]:
        """The first audio stream as mono samples in [-1, 1] at 16 kHz, and whether the file ends
        early.

        Raises FileNotFoundError, UnreadableMedia, NoAudioStream, AudioTooLong, AudioTooShort,
        TruncatedMedia unless `allow_partial`, DecodeServerLost, and what `checkpoint` raises, which
        is called at least every 0.1 s.
        """
        exit_code: int | None = None
        for _ in range(TRIES):
            began = time.perf_counter()
            samples, end = self._attempt(path, max_seconds, checkpoint)
            exit_code = end.exit_code
            what: dict[str, Any] = {
                "exit_code": exit_code,
                "seconds": round(time.perf_counter() - began, 3),
                "decoded_seconds": samples.seconds,
                "peak_mib": end.peak_mib,
            }
            if exit_code == 0:
                what |= {"action": "decoded", "found": str(end.found)[:500]}
                log.debug("decoded", extra=what)
                return _judged(samples, end.found, allow_partial)
            log.warning("a decoder died", extra={"action": "decoder_died", **what})
            # Killed from outside: by the kernel, for memory that others took, or by a person.
            if exit_code not in {None, -signal.SIGKILL}:
                break
        if exit_code is None:
            raise DecodeServerLost
        raise UnreadableMedia(_verdict(exit_code))

    def _attempt(
        self, path: Path, max_seconds: float, checkpoint: Callable[[], None]
    ) -> tuple[_Samples, _End]:
        """The samples, and how the child ended."""
        samples = _Samples(max_seconds)
        with ExitStack() as stack:  # leaving it before its end kills the child
            with ExitStack() as sent:
                input_ = os.open(path, os.O_RDONLY)
                sent.callback(os.close, input_)
                pcm, theirs = os.pipe()
                stack.callback(os.close, pcm)
                sent.callback(os.close, theirs)
                record, their_record = socket.socketpair()
                stack.enter_context(record)
                sent.enter_context(their_record)
                with suppress(OSError, AttributeError):  # Linux; less where a user has many pipes
                    fcntl.fcntl(pcm, fcntl.F_SETPIPE_SZ, BLOCK_BYTES)
                server = self._submit(max_seconds, [input_, theirs, their_record.fileno()])
            self._await(pcm, checkpoint)
            while samples.read(pcm):
                self._await(pcm, checkpoint)
            answer = b""
            self._await(record.fileno(), checkpoint)
            while (more := _received(record)) and len(answer) < RECORD_BYTES:
                answer += more
                self._await(record.fileno(), checkpoint)
        end = _parsed(answer)
        if end.exit_code is None and not self._is_lost(server):
            end = _End(1)  # the child cut the line itself
        return samples, end

    def _await(self, descriptor: int, checkpoint: Callable[[], None]) -> None:
        """Returns when there is something to read. Ticks are counted, not time: a machine that
        sleeps is not the file's fault."""
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        checkpoint()
        for _ in range(math.ceil(self._limits.silent_seconds * 1000 / TICK_MS)):
            if poll.poll(TICK_MS):
                return
            checkpoint()
        raise UnreadableMedia(
            f"The decoder stood still for {self._limits.silent_seconds:.0f} seconds on this file. "
            f"{MADE_TO_HARM}"
        )

    def _submit(self, max_seconds: float, descriptors: list[int]) -> _Server:
        limits = self._limits
        most = limits.cpu_seconds + int(max_seconds / limits.audio_seconds_per_cpu) + 5
        request = REQUEST.pack(
            limits.cpu_seconds, most, limits.audio_seconds_per_cpu, limits.memory_bytes
        )
        with self._lock:
            server = self._running()
            with suppress(BrokenPipeError, ConnectionResetError):  # its death is seen as any later
                server.send(request, descriptors)
            return server

    def _running(self) -> _Server:
        if self._server is None:
            self._server = _Server()
            weakref.finalize(self, self._server.stop)
        return self._server

    def _is_lost(self, server: _Server) -> bool:
        if server.is_alive():
            return False
        log.warning("the decode server is lost", extra={"action": "decode_server_lost"})
        with self._lock:
            server.stop()
            if self._server is server:
                self._server = None
        return True


class _Server:
    """The process, and the socket to it, whose end is the process's end."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.engine.decode_server", str(theirs.fileno())],
                cwd=ROOT,
                env={k: v for k, v in os.environ.items() if k.startswith(ENVIRONMENT)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def send(self, request: bytes, descriptors: list[int]) -> None:
        socket.send_fds(self._control, [request], descriptors)

    def is_alive(self) -> bool:
        """Asked after a sign of its death, which comes a moment before the death."""
        return not self._ends_within(1)

    def stop(self) -> None:
        self._control.close()
        if not self._ends_within(2):
            self._process.kill()
            self._process.wait()

    def _ends_within(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)
            return True
        return False


class _Samples:
    """16-bit samples as they come, and then as floats."""

    def __init__(self, max_seconds: float):
        self._max_seconds = max_seconds
        self._left = int(max_seconds * SAMPLE_RATE) * SAMPLE_BYTES
        self._blocks: list[NDArray[np.uint8]] = []
        self._filled = BLOCK_BYTES  # of the last block

    def read(self, descriptor: int) -> bool:
        """Takes what is there; False at the end. Raises AudioTooLong."""
        if self._filled == BLOCK_BYTES:
            self._blocks.append(np.empty(BLOCK_BYTES, np.uint8))
            self._filled = 0
        size = os.readv(descriptor, [self._blocks[-1].data[self._filled :]])
        self._filled += size
        self._left -= size
        if self._left < 0:
            raise AudioTooLong(
                f"The audio is longer than {self._max_seconds:.0f} seconds, the most this server "
                "accepts. Split the recording."
            )
        return size > 0

    def __len__(self) -> int:
        size = len(self._blocks) * BLOCK_BYTES - BLOCK_BYTES + self._filled
        return max(0, size) // SAMPLE_BYTES

    @property
    def seconds(self) -> float:
        return len(self) / SAMPLE_RATE

    def take(self) -> NDArray[np.float32]:
        """All of them; each block is freed as soon as it is converted."""
        floats = np.empty(len(self), np.float32)
        place = 0
        self._blocks.reverse()
        while self._blocks:
            block = self._blocks.pop().view(np.int16)[: len(floats) - place]
            np.multiply(block, np.float32(1 / 32768), out=floats[place : place + len(block)])
            place += len(block)
        return floats


def _received(record: socket.socket) -> bytes:
    try:
        return record.recv(RECORD_BYTES)
    except ConnectionResetError:
        return b""


@dataclass(frozen=True)
class _End:
    """Of a child: its exit code (None if the server is lost), what it found, and the most memory
    that it held."""

    exit_code: int | None
    found: dict[str, Any] = field(default_factory=dict)
    peak_mib: float = 0.0


def _parsed(answer: bytes) -> _End:
    """What the child found, and what the server added. The child may have been taken over, so
    nothing is believed of it but what is checked here."""
    line, _, added = answer.rpartition(b"\n")
    try:
        exit_code, peak_kib = map(int, added.split())
    except ValueError:
        return _End(None)
    peak_mib = round(peak_kib / 1024, 1)
    try:
        found = json.loads(line) if exit_code == 0 else {}
    except (ValueError, RecursionError):
        found = None
    return _End(exit_code, found, peak_mib) if isinstance(found, dict) else _End(1, {}, peak_mib)


def _judged(
    samples: _Samples, found: dict[str, Any], allow_partial: bool
) -> tuple[NDArray[np.float32], bool]:
    if code := found.get("code"):
        kind = REFUSALS.get(code, UnreadableMedia) if isinstance(code, str) else UnreadableMedia
        raise kind(str(found.get("message") or "")[:500] or None)
    stated = found.get("stated_seconds")
    stated = stated if isinstance(stated, float) else 0.0
    is_partial = samples.seconds < stated * TRUNCATED_BELOW - TRUNCATED_SLACK_SECONDS
    if is_partial and not allow_partial:
        raise TruncatedMedia(
            f"The file ends early: {samples.seconds:.1f} of the {stated:.1f} seconds that its "
            "header promises could be decoded. Upload the whole file, or send allow_partial=true."
        )
    if len(samples) < MIN_SAMPLES:
        raise AudioTooShort
    return samples.take(), is_partial


def _verdict(exit_code: int) -> str:
    """A sentence on a child that ended without an answer."""
    if exit_code == -signal.SIGXCPU:
        return f"Decoding the file takes more processor time than a recording needs. {MADE_TO_HARM}"
    what = f"exit code {exit_code}"
    with suppress(ValueError):
        what = signal.Signals(-exit_code).name
    return f"The decoder failed on this file ({what}). {MADE_TO_HARM}"
