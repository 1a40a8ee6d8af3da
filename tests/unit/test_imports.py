"""Who may import whom, as it is at run time."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT


def test_the_api_runs_without_any_model_library():
    """Its image has none; importing api.app must not ask for one."""
    check = (
        "import sys, api.app; "
        "print(sorted({'faster_whisper', 'ctranslate2', 'av', 'numpy', 'onnxruntime'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
