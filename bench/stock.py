"""faster-whisper as its documentation uses it, in a process of its own: `python -m bench.stock`.

Reads JSON lines from stdin and answers each with one: {"do": "transcribe", "files": [...],
"options": {...}} with the texts, {"do": "prepare", "file": ...} with the number of windows.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from faster_whisper import WhisperModel, decode_audio
from faster_whisper.vad import VadOptions, collect_chunks, get_speech_timestamps


def transcribe(model: WhisperModel, order: dict[str, Any]) -> list[str]:
    texts = []
    for file in order["files"]:
        segments, _ = model.transcribe(file, **order["options"])
        texts.append("".join(segment.text for segment in segments).strip())
    return texts


def prepare(model: WhisperModel, order: dict[str, Any]) -> int:
    """What WhisperModel.transcribe does before the model first runs."""
    audio = decode_audio(order["file"])
    stretches = get_speech_timestamps(audio, VadOptions(**order["vad"]))
    chunks, _ = collect_chunks(audio, stretches)
    features = model.feature_extractor(chunks[0])
    return int(features.shape[-1]) // 3000


def main(folder: str) -> None:
    model = WhisperModel(folder, compute_type="int8", cpu_threads=len(os.sched_getaffinity(0)))
    work = {"transcribe": transcribe, "prepare": prepare}
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(work[order["do"]](model, order)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
