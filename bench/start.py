"""How long a worker takes to load a model, measured in a process of its own:
`python -m bench.start MODEL DATA_DIR`; with `--as-stored` from the model itself, never from a copy.

Prints {"seconds": ..., "cpu": ...}, without the imports before it and the first run after it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from bench.engine import replicas
from local.service import IsolatedSettings
from shared.settings import ComputeType, Device
from worker.engine import model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.start")
    parser.add_argument("model", type=Path)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--as-stored", action="store_true")
    chosen = parser.parse_args()
    settings = IsolatedSettings(
        model_size=str(chosen.model),
        compute_type=ComputeType.INT8,
        device=Device.CPU,
        data_dir=chosen.data_dir,
    )
    load = model.open_in if chosen.as_stored else model.open_fastest
    cpu, began = time.process_time(), time.perf_counter()
    load(chosen.model, settings, replicas=replicas(), threads=1)
    spent = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    print(json.dumps(spent))


if __name__ == "__main__":
    main()
