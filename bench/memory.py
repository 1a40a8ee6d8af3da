"""Rows about the memory of workers."""

from __future__ import annotations

from bench.pairs import Arm, Measured, Spent, compare, megabytes
from bench.stage import Client, Stage


def slots_against_workers(stage: Stage) -> Measured:
    """One worker with four slots, over four workers with one, each after it has served."""
    files = stage.clips(5, 16)
    model = str(stage.model_of("base"))

    def memory(workers: int, slots: int) -> Spent:
        with stage.service(model_size=model, worker_slots=str(slots)) as client:
            names = ["worker", *(client.service.add_worker() for _ in range(workers - 1))]
            client.service.wait_ready(120)
            client.transcribe(files)
            while not all(client.completed(name) for name in names):
                client.transcribe(files)
            return Spent(sum(megabytes_of(client, name) for name in names))

    return compare(
        Arm("1 worker with 4 slots", lambda: memory(1, 4)),
        Arm("4 workers with 1 slot", lambda: memory(4, 1)),
        stage.pairs,
        unit="MB",
        warm_up=False,
    )


def growth(stage: Stage, early: int = 200, late: int = 2000) -> Measured:
    """The same worker after many jobs, over itself after few."""
    batch = stage.clips(1, 100)
    with stage.service(model_size="demo") as client:

        def after(jobs: int) -> Spent:
            while client.completed("worker") < jobs:
                client.transcribe(batch)
            return Spent(megabytes_of(client, "worker"))

        before, then = after(early), after(late)
    return Measured(f"after {late} jobs", f"after {early}", then, before, 1, "MB")


def megabytes_of(client: Client, worker: str) -> float:
    return megabytes([client.service.popen(worker).pid])
