"""`python tools/silero/split.py`: cuts Silero VAD, as faster-whisper carries it, in two.

Its first part looks at each window of 32 ms by itself and costs 93 % of the time, so that several
threads can share it; its second is an LSTM, which needs the windows in their order. Weights and
sums stay what they are: the probabilities are the same to the last bit (tests/model/test_vad.py).
Run it again when faster-whisper carries another Silero VAD. Needs the package `onnx` (1.23.2).
"""

from __future__ import annotations

from pathlib import Path

from faster_whisper.utils import get_assets_path
from onnx.utils import extract_model

SOURCE = Path(get_assets_path()) / "silero_vad_v6.onnx"
TARGET = Path(__file__).parents[2] / "worker" / "engine" / "silero"
BETWEEN = "/Transpose_output_0"  # (windows, 1, 128)

extract_model(SOURCE, TARGET / "encoder.onnx", ["input"], [BETWEEN])
extract_model(SOURCE, TARGET / "lstm.onnx", [BETWEEN, "h", "c"], ["speech_probs", "hn", "cn"])
