"""`make chaos`: an hour that is killed at its half and near its end goes on where it was."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shared import keys
from tests.chaos.ledger import Ledger, User, recording
from tests.chaos.report import lines_of
from tests.chaos.world import WORKERS, World

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]

HOUR_SECONDS = 3600
KILLS = (0.5, 0.9)  # progress
MOST_COMPUTE = 1.15  # of a run that nothing interrupts


def test_a_killed_hour_is_resumed_and_not_restarted(tmp_path: Path) -> None:
    """Two workers die: what they did before is not done again, and the text is the same."""
    settings = {"part_seconds": "300", "worker_slots": "1", "max_file_size_mb": "200"}
    with World(tmp_path, settings, uploads_bytes=1 << 30) as world:
        once = recording()
        hour = recording(times=round(HOUR_SECONDS * 32_000 / len(once.wav)) + 1)
        ledger = Ledger()
        user = User(ledger, world.url)
        undisturbed = ledger.begin(hour, vad_filter=True)
        assert user.send(undisturbed), undisturbed.refused
        text = user.follow(undisturbed)
        calm = spent(world.log)

        job = ledger.begin(hour, vad_filter=True)
        assert user.send(job), job.refused
        killed = 0.0
        for share, name in zip(KILLS, WORKERS, strict=False):
            while user._read(f"/status/{job.job_id}")["progress"] < share:
                time.sleep(0.1)
            victim = next((w for w in WORKERS if world.units_of(w)), name)
            killed += sum(under_way(world, unit) for unit in world.units_of(victim))
            world.kill(victim)
            world.revive(victim)
        resumed = user.follow(job)
        user.close()
    compute = spent(world.log) - calm + killed
    print(
        f"\nan hour: {calm:.1f} s of work; killed at 50 % and at 90 %: {compute:.1f} s, "
        f"{compute / calm:.3f} of it"
    )
    assert resumed == text
    assert len(text.split()) > 1000
    assert compute <= MOST_COMPUTE * calm


def spent(log: Path) -> float:
    """Seconds of slots that led to parts."""
    return sum(line["seconds"] for line in lines_of(log) if line["action"] == "part_done")


def under_way(world: World, unit: str) -> float:
    """Seconds since it was begun."""
    began_ms = world.raw.hget(keys.transcription(unit), "started_ms")
    return time.time() - int(began_ms) / 1000
