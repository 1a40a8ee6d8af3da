"""The model libraries report to nobody."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import FOX, ROOT

RUN = """
from pathlib import Path
from worker.engine import model
from worker.engine.engine import Engine
from shared.options import TranscriptionOptions
from shared.settings import Settings
loaded = model.load(Settings(_env_file=None, model_size="demo"))
engine = Engine(loaded, replicas=1, max_audio_seconds=60)
print(engine.transcribe(Path({path!r}), TranscriptionOptions(), print, print).text)
"""


def test_a_transcription_with_vad_leaves_no_trace_of_a_report(tmp_path):
    """onnxruntime's reporter opens a session file in TMPDIR before it sends; it must not start."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    command = [sys.executable, "-c", RUN.format(path=str(FOX))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fox" in done.stdout
    assert list(tmp_path.iterdir()) == []
