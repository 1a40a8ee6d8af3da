"""Our engine without the service, in a process of its own: `python -m bench.engine MODEL`.

Reads and answers lines as bench/stock.py does: {"do": "transcribe", "files": [...], "options":
{...}} with the texts, {"do": "prepare", "file": ..., "vad": {...}} with the number of windows.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from local.service import IsolatedSettings
from shared.options import TranscriptionOptions
from shared.settings import ComputeType, Device
from worker.engine import model
from worker.engine.engine import Engine

MAX_SECONDS = 20_000


def transcribe(engine: Engine, order: dict[str, Any]) -> list[str]:
    """A caller and a replica for each core, as many as the service has slots."""
    options = TranscriptionOptions(**order["options"])

    def text(file: str) -> str:
        return engine.transcribe(
            Path(file), options, checkpoint=lambda _: None, stage=lambda *_: None
        ).text

    with ThreadPoolExecutor(replicas()) as callers:
        return list(callers.map(text, order["files"]))


def prepare(engine: Engine, order: dict[str, Any]) -> int:
    """What the engine does before the model hears the last window."""
    options = TranscriptionOptions(vad_parameters=order["vad"])
    recording = engine.prepare(Path(order["file"]), options, lambda _: None, lambda *_: None)
    assert recording.whole
    for window in recording.whole.windows:  # one at a time, as the engine does it
        engine.model.whisper.feature_extractor(window.audio)
    return len(recording.whole.windows)


def replicas() -> int:
    return len(os.sched_getaffinity(0))


def main(folder: str) -> None:
    settings = IsolatedSettings(model_size=folder, compute_type=ComputeType.INT8, device=Device.CPU)
    loaded = model.load(settings, replicas=replicas(), threads=1)
    with closing(
        Engine(
            loaded,
            replicas=replicas(),
            max_audio_seconds=MAX_SECONDS,
            voice_threads=replicas(),
        )
    ) as engine:
        work = {"transcribe": partial(transcribe, engine), "prepare": partial(prepare, engine)}
        for line in sys.stdin:
            order = json.loads(line)
            print(json.dumps(work[order["do"]](order)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
