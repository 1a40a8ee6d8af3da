"""What our engine does before the model first runs: `python -m bench.engine MODEL`.

Reads and answers lines as bench/stock.py does: {"do": "prepare", "file": ..., "vad": {...}}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from faster_whisper import WhisperModel

from shared.options import TranscriptionOptions
from worker.engine import speech
from worker.engine.decode import Decoder


def main(folder: str) -> None:
    extractor = WhisperModel(folder, compute_type="int8", cpu_threads=1).feature_extractor
    decoder = Decoder()
    for line in sys.stdin:
        order = json.loads(line)
        options = TranscriptionOptions(vad_parameters=order["vad"])
        audio, _ = decoder.decode(
            Path(order["file"]), max_seconds=20_000, allow_partial=False, checkpoint=lambda: None
        )
        windows = speech.windows(audio, speech.find(audio, options))
        for window in windows:  # one at a time, as the engine does it
            extractor(window.audio)
        print(len(windows), flush=True)
    decoder.close()


if __name__ == "__main__":
    main(sys.argv[1])
