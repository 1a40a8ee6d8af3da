"""`python -m bench [ROW ...]`: measures rows of bench/rows.py, all unless some are named, and puts
them into bench/results.json and the README's table, where they replace those of the same name.

Every row is a ratio of two arms that take turns in one run; times alone say little on a machine
that others use, too. Needs Linux, an otherwise idle machine, and time: all rows take most of an
hour, a2 a minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.pairs import Measured
from bench.rows import ROWS
from bench.stage import Row, Stage

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
NUMBERS = ROOT / "bench" / "results.json"
BEGIN, END = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"


def machine() -> dict[str, Any]:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "ctranslate2": version("ctranslate2"),
        "faster-whisper": version("faster-whisper"),
    }


def table(results: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    lines = [
        f"The demo model widened to the shape of Whisper {results['shape']}, int8; {facts}.",
        "",
        "| row | what | ratio | CPU | goal | met | arms | pairs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        cpu = "" if row["cpu_ratio"] is None else f"{row['cpu_ratio']:.2f}"
        ours = results["machine"]["cpu"]
        other = "" if row.get("machine", ours) == ours else f" (on {row['machine']})"
        lines.append(
            f"| {name} | {row['what']} | {row['ratio']:.2f} | {cpu} "
            f"| {row['goal']} | {'yes' if row['is_met'] else 'no'} "
            f"| {row['first']}: {amount(row['first_value'], row['unit'])}; "
            f"{row['second']}: {amount(row['second_value'], row['unit'])}{other} | {row['pairs']} |"
        )
    return "\n".join(lines) + "\n"


def amount(value: float, unit: str) -> str:
    return f"{value:.2f} {unit}" if unit == "s" else f"{value:.0f} {unit}"


def record(row: Row, measured: Measured) -> dict[str, Any]:
    return {
        "what": row.what,
        "goal": row.goal,
        "is_met": row.is_met(measured.ratio),
        "ratio": measured.ratio,
        "cpu_ratio": measured.cpu_ratio,
        "unit": measured.unit,
        "first": measured.first,
        "first_value": measured.first_spent.value,
        "second": measured.second,
        "second_value": measured.second_spent.value,
        "pairs": measured.pairs,
        "machine": machine()["cpu"],
    }


def main() -> int:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(names)}")
    parser.add_argument("--shape", default="tiny", choices=["tiny", "base", "small", "medium"])
    parser.add_argument("--pairs", type=int, default=5)
    chosen = parser.parse_args()
    if unknown := set(chosen.rows) - set(names):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    results: dict[str, Any] = {"machine": machine(), "shape": chosen.shape, "rows": {}}
    if chosen.rows and NUMBERS.exists():  # rows that another machine measured say so
        results = {**json.loads(NUMBERS.read_text()), "shape": chosen.shape}
    with tempfile.TemporaryDirectory(prefix="whisper-bench-") as folder:
        stage = Stage(Path(folder), chosen.shape, chosen.pairs)
        try:
            for row in ROWS:
                if chosen.rows and row.name not in chosen.rows:
                    continue
                measured = row.measure(stage)
                results["rows"][row.name] = record(row, measured)
                print(f"{row.name}: {measured.ratio:.2f} (goal {row.goal}): {row.what}", flush=True)
        finally:
            stage.close()
    results["rows"] = {name: results["rows"][name] for name in names if name in results["rows"]}
    NUMBERS.write_text(json.dumps(results, indent=2) + "\n")
    README.write_text(shown(README.read_text(), results))
    return 0


def shown(readme: str, results: dict[str, Any]) -> str:
    """The README with these results between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table(results) + END + after


if __name__ == "__main__":
    sys.exit(main())
