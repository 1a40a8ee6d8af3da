"""`make hostile`: every file of the corpus through the decoder and the service; prints the table
and writes docs/hostile-media.md. `--fuzz N`: then damaged files, forms and requests, N times as
many as in `make test`, with a seed of the day's own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import av

from local.service import Service
from tests.conftest import ROOT
from tests.hostile import decoded, served
from tests.hostile.canary import Canary
from tests.hostile.corpus import Hostile, corpus
from worker.engine.decode import Decoder

PAGE = ROOT / "docs" / "hostile-media.md"
HEAD = """\
# Hostile media

Files that are made to do harm, what each attacks, and what became of it. `make hostile` makes them
(tests/hostile/corpus.py), sends each through the decoder and through the whole service, and writes
this page; `make test` asserts the same answers. Beside them lie canaries: recordings that the files
name, and a port of this machine that listens on TCP and UDP. A test shows that PyAV without our
options reads the recordings.

*decoder* is the answer of the decoder alone, with the time and the most memory of the process that
decoded the file; *service* is what who uploads it is told. `samples` means that sound was found and
transcribed. Where the decoder stopped reading, its memory is not known (-); its limit is 512 MiB.
Time and memory are those of one machine on one day: {machine}.

{summary}
"""
ROW = "| {name} | {attacks} | {decoder} | {seconds:.2f} | {peak} | {service} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--fuzz", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problems, page = run(Path(folder))
    print(page)
    PAGE.write_text(page)
    for problem in problems:
        print("WRONG:", problem)
    if arguments.fuzz and not problems:
        return fuzz(arguments.fuzz)
    return 1 if problems else 0


def run(folder: Path) -> tuple[list[str], str]:
    """What is wrong, and the page."""
    problems: list[str] = []
    for name in ("canary", "encoded"):
        (folder / name).mkdir()
    with Canary(folder / "canary") as canary:
        files = corpus(canary, folder / "encoded")
        decoder = Decoder()
        decoder.start()
        alone = []
        for hostile in files:
            alone.append(decoded.answer_of(decoder, hostile.content, canary.folder / "upload"))
            found = [decoded.check(hostile, alone[-1]), *canary.touched()]
            problems += [f"{hostile.kind}: {hostile.name}: {why}" for why in found if why]
        decoder.close()
        with Service.in_folder(folder / "service", {"max_audio_seconds": "3600"}) as service:
            service.wait_ready(60)
            whole = served.serve(service, files, 600)
        for hostile, answer in zip(files, whole, strict=True):
            if why := served.check(hostile, answer):
                problems.append(f"{hostile.kind}: {hostile.name}, served: {why}")
        touched = canary.touched()
        problems += [f"served: {touch}" for touch in touched]
    return problems, page_of(files, alone, whole, problems)


def page_of(
    files: list[Hostile],
    alone: list[decoded.Answer],
    whole: list[served.Served],
    problems: list[str],
) -> str:
    peak = max(answer.peak_mib for answer in alone)
    slowest = max(answer.seconds for answer in alone)
    summary = (
        f"{len(files)} files: {len(problems)} with an answer other than expected, a canary that was"
        f" read or reached, or no end. Longest: {slowest:.1f} s; most memory: {peak:.0f} MiB."
    )
    machine = (
        f"{os.cpu_count()} cores, PyAV {version('av')} (libavformat "
        f"{'.'.join(map(str, av.library_versions['libavformat']))}), {time.strftime('%Y-%m-%d')}"
    )
    lines = [HEAD.format(machine=machine, summary=summary)]
    rows = zip(files, alone, whole, strict=True)
    for kind, group in groupby(rows, key=lambda row: row[0].kind):
        lines += [f"## {kind.capitalize()}", ""]
        lines += ["| file | attacks | decoder | seconds | MiB | service |", "|---" * 6 + "|"]
        for hostile, answer, answered in group:
            lines.append(
                ROW.format(
                    name=hostile.name,
                    attacks=hostile.attacks,
                    decoder=answer.code,
                    seconds=answer.seconds,
                    peak=f"{answer.peak_mib:.0f}" if answer.peak_mib else "-",
                    service=answered.code,
                )
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def fuzz(times: int) -> int:
    seed = os.environ.get("FUZZ_SEED", str(int(time.time())))
    print(f"Fuzzing with FUZZ_SEED={seed}")
    suites = ["tests/hostile/test_fuzz.py", "tests/e2e/test_http.py"]
    command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "--timeout=3000", *suites]
    environment = {**os.environ, "FUZZ": str(times), "FUZZ_SEED": seed}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
