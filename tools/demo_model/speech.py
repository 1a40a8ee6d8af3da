"""Speech from espeak-ng, in this process, with the times at which each word is spoken."""

import ctypes
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from scipy.signal import resample_poly

SAMPLE_RATE = 16000
_SYNCHRONOUS = 2
_UTF8 = 1
_POSITION_CHARACTER = 1
_RATE, _PITCH = 1, 3
_EVENT_END, _EVENT_WORD = 0, 1
_VOICE_NAMES = {"en-gb": "en", "fr-fr": "fr"}
"""What the library calls the voices that the command finds by their language."""


class _EventId(ctypes.Union):
    _fields_ = [
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    ]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass(frozen=True)
class Speech:
    """One phrase: its samples (16 kHz mono, -1 to 1) and when each word starts and ends."""

    samples: np.ndarray
    words: list[str]
    spans_seconds: list[tuple[float, float]]

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


class _Engine:
    """The library, which has one state per process and is not safe for threads."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libespeak-ng.so.1")
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, None, 0)
        self._callback = _Callback(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)
        self._blocks: list[np.ndarray] = []
        self._marks: list[tuple[int, float]] = []

    def _collect(self, samples, count, events) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != _EVENT_END:
            if events[index].type == _EVENT_WORD:
                event = events[index]
                self._marks.append((event.text_position - 1, event.audio_position / 1000))
            index += 1
        return 0

    def synthesize(self, text: str, voice: str, speed: int, pitch: int) -> tuple[np.ndarray, list]:
        self._blocks, self._marks = [], []
        name = _VOICE_NAMES.get(voice, voice)
        if self._library.espeak_SetVoiceByName(name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice}")
        self._library.espeak_SetParameter(_RATE, speed, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, len(data), 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
        samples = np.concatenate(self._blocks).astype(np.float32) / 32768
        if self._rate != 22050:
            raise RuntimeError(f"espeak-ng speaks at {self._rate} Hz, 22050 Hz expected")
        return resample_poly(samples, 320, 441).astype(np.float32), self._marks


@cache
def _engine() -> _Engine:
    return _Engine()


def speak(text: str, voice: str, speed: int = 160, pitch: int = 50) -> Speech:
    """Says `text`, trimmed to 25 ms around what is audible.

    A word lasts until the next begins; words that espeak-ng joins share their time evenly.
    """
    samples, marks = _engine().synthesize(text, voice, speed, pitch)
    audible = np.flatnonzero(np.abs(samples) > 0.005)
    first = max(0, int(audible[0]) - 400)
    last = min(len(samples), int(audible[-1]) + 400)
    words = text.split()
    starts = _word_starts(words, marks, first / SAMPLE_RATE, last / SAMPLE_RATE)
    times = [min(max(0.0, t - first / SAMPLE_RATE), (last - first) / SAMPLE_RATE) for t in starts]
    spans = list(pairwise(times))
    return Speech(samples[first:last], words, spans)


def _word_starts(
    words: list[str], marks: list[tuple[int, float]], first: float, last: float
) -> list[float]:
    """The start of each word, and the end of the last, from (character, seconds) marks."""
    offsets = np.cumsum([0] + [len(word) + 1 for word in words[:-1]])
    known = {}
    for position, seconds in marks:
        index = int(np.searchsorted(offsets, position, side="right")) - 1
        known.setdefault(index, seconds)
    known[0] = first + 0.025
    known[len(words)] = last - 0.025
    indices = sorted(known)
    times = np.interp(range(len(words) + 1), indices, [known[i] for i in indices])
    return [float(seconds) for seconds in times]
