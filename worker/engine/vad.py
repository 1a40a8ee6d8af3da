"""How likely each 32 ms of a recording is speech, by Silero VAD: the very numbers that
faster_whisper.vad.SileroVADModel gives.

Two things differ. The model is cut in two (worker/engine/silero): its encoder looks at each window
by itself and costs most of the time, so threads share a long recording's windows. And what is in
memory at a time is a few blocks, not two more copies of the recording.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

FOLDER = Path(__file__).parent / "silero"
WINDOW = 512  # samples at 16 kHz
CONTEXT = 64  # samples of the window before, which the encoder hears, too
BLOCK = 500  # windows of a call, 16 s: what the encoder makes of them stays in a core's cache
STATE = (1, 1, 128)  # of the LSTM
NICER_BY = 5  # a third of the share that another thread gets of a core

Audio = NDArray[np.float32]  # 16 kHz, mono


class VoiceDetector:
    """Owns the model and the threads. Safe to call from several threads."""

    def __init__(self, threads: int = 1):
        self._encoder, self._lstm = _session("encoder"), _session("lstm")
        self._takes = [given.name for given in self._lstm.get_inputs()]
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "voice", _give_way) if threads > 1 else None

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def probabilities(
        self, audio: Audio, checkpoint: Callable[[], None] = lambda: None
    ) -> NDArray[np.float32]:
        """One for each WINDOW samples and for the rest, in [0, 1]; a recording of whole windows has
        one more, for silence. Raises what `checkpoint` raises, which is called for each block."""
        hidden = cell = np.zeros(STATE, np.float32)
        found: list[NDArray[np.float32]] = []
        for encoded in self._encoded(audio):
            checkpoint()
            given = dict(zip(self._takes, (encoded, hidden, cell), strict=True))
            block, hidden, cell = self._lstm.run(None, given)
            found.append(block)
        return np.concatenate(found)

    def _encoded(self, audio: Audio) -> Iterator[NDArray[np.float32]]:
        """Block after block. Threads are a little ahead; a short recording needs none."""
        count = len(audio) // WINDOW + 1
        starts = range(0, count, BLOCK)
        if self._pool is None or len(starts) == 1:
            yield from (self._encode(audio, start, count) for start in starts)
            return
        ahead: deque[Future[NDArray[np.float32]]] = deque()
        try:
            for start in starts:
                ahead.append(self._pool.submit(self._encode, audio, start, count))
                if len(ahead) > 2 * self._threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def _encode(self, audio: Audio, start: int, count: int) -> NDArray[np.float32]:
        """Windows from `start` on, each after the end of the one before it; (windows, 1, 128)."""
        size = min(BLOCK, count - start)
        block = np.zeros((size, CONTEXT + WINDOW), np.float32)
        sound = np.zeros(size * WINDOW, np.float32)
        given = audio[start * WINDOW : (start + size) * WINDOW]
        sound[: len(given)] = given
        if start + size == count:
            sound[-CONTEXT:] = 0  # faster-whisper clears them, by a slip that decides what it hears
        block[:, CONTEXT:] = sound.reshape(size, WINDOW)
        block[1:, :CONTEXT] = block[:-1, -CONTEXT:]
        if start:
            block[0, :CONTEXT] = audio[start * WINDOW - CONTEXT : start * WINDOW]
        encoded: NDArray[np.float32] = self._encoder.run(None, {"input": block})[0]
        return encoded


def _give_way() -> None:
    """A thread that prepares a long recording leaves the cores to those that transcribe clips."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICER_BY)


def _session(part: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # it would keep what the largest call needed
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        FOLDER / f"{part}.onnx", providers=["CPUExecutionProvider"], sess_options=options
    )
