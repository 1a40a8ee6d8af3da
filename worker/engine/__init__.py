"""From a file to a transcript. Importing anything of this package first tells the model libraries
to report to nobody: onnxruntime (since 1.29, on Linux, too) and the Hub client would by default."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
