"""Rows about long recordings: spread over workers, and beside clips."""

from __future__ import annotations

import time
from pathlib import Path

from bench.pairs import Arm, Measured, Spent, compare, timed
from bench.stage import Client, Stage


def two_workers(stage: Stage, seconds: float = 1800) -> Measured:
    """One recording on one worker, over the same on two, each pinned to a core of its own."""
    assert len(stage.cores) > 1, "needs two cores"
    file = stage.talk(seconds)
    first, second = map(str, stage.cores[:2])
    texts: dict[str, str] = {}
    pinned = {"worker_slots": "1", "worker_cpus": first}

    with stage.service(**pinned) as one, stage.service(**pinned) as two:
        two.service.add_worker({"worker_cpus": second})
        two.service.wait_ready(120)

        def work(name: str, client: Client) -> None:
            job = client.submit(file, language="en", vad_filter="true")
            texts[name] = client.text(job)

        measured = compare(
            timed("1 worker", lambda: work("one", one), one.pids),
            timed("2 workers", lambda: work("two", two), two.pids),
            stage.pairs,
            warm_up=False,  # each turn takes minutes, and the models are warm
        )
    assert texts["one"] == texts["two"], "the texts differ"
    assert texts["one"]
    return measured


def beside_a_long_one(stage: Stage, seconds: float = 7200) -> Measured:
    """What 95 % of clips wait at most, one after another, while a long recording runs, over the
    same without it."""
    clips, long = stage.clips(5, 20), stage.talk(seconds)

    with stage.service() as client:

        def alone() -> Spent:
            return Spent(slowest(client, clips))

        def beside() -> Spent:
            job = client.submit(long, language="en")
            while client.status(job) == "queued":
                time.sleep(0.02)
            waited = slowest(client, clips)
            assert client.status(job) == "processing", "the long recording ended too soon"
            client.cancel(job)
            return Spent(waited)

        return compare(Arm("beside", beside), Arm("alone", alone), stage.pairs)


def slowest(client: Client, clips: list[Path]) -> float:
    """The 95th percentile of the seconds from upload to text."""
    waited = []
    for clip in clips:
        began = time.perf_counter()
        client.transcribe([clip])
        waited.append(time.perf_counter() - began)
    return sorted(waited)[-1 - len(waited) // 20]
