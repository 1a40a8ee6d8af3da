"""`make chaos`: breaks the running service in every way of faults.py, for SECONDS, in an order that
SEED decides, while users send recordings and check each answer against its known text."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from local.processes import CannotRun
from shared import keys
from shared.errors import WorkerLost
from tests.chaos.faults import FAULTS, Chaos, Fault
from tests.chaos.ledger import Crowd, Job, Ledger, User, clips, recording
from tests.chaos.listener import SETTINGS, Listener
from tests.chaos.report import Round, Row, by_kind, rows, table
from tests.chaos.world import LEASE_SECONDS, World
from tests.conftest import wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]

RECOVERY_SECONDS = LEASE_SECONDS + 10
LOST_SECONDS = 90  # after a fault: then a job that is not done is lost
TOLD_SECONDS = 30  # after the last job: a sender's lease and some pauses
SWEPT_SECONDS = 100  # after the last job: then nothing of it is on the disk


def test_nothing_is_lost_wrong_or_written_twice(tmp_path: Path) -> None:
    """Whatever breaks: each accepted upload ends once, with its text, soon after, and its webhook
    is told."""
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(10**6))
    seconds = float(os.environ.get("SECONDS") or 300)
    chosen = os.environ.get("FAULTS", "")
    print(
        f"\nmake chaos SECONDS={seconds:g} SEED={seed}" + (f" FAULTS='{chosen}'" if chosen else "")
    )
    chance = random.Random(seed)
    ledger = Ledger()
    with Listener(ledger, seed) as listener, World(tmp_path, SETTINGS) as world:
        long = recording()
        chaos = Chaos(world, chance, ledger, long, [])
        for what, why in world.missing.items():
            print(f"without {what}: {why}")
        ledger.learn(User(ledger, world.url), [*clips(), long])
        users = [clips()] * 3 + [[long]]
        with Crowd(ledger, world.url, seed, users=users, pause=0.5) as crowd:
            rounds = [Round("calm", time.monotonic(), time.time())]
            until = time.monotonic() + seconds
            for each in in_turn(world, chance, chosen):
                if time.monotonic() > until:
                    break
                rounds.append(play(each, chaos))
            crowd.stop()
            wait_for(ledger.open_jobs())
        with suppress(pytest.fail.Exception):  # the table shows it
            wait_until(lambda: not ledger.untold(), TOLD_SECONDS, "webhooks are told")
        found = rows(rounds, ledger.jobs, world.log, chaos.rollbacks)
        kinds = by_kind(found)
        print("\n" + table(kinds))
        tell(ledger, rounds)
        problems = [*world.violations, *listener.violations]
        problems += [*broken(kinds[-1]), *left_behind(world)]
    print("\n".join(f"BROKEN: {problem}" for problem in problems) or "Every promise was kept.")
    assert not problems


def in_turn(world: World, chance: random.Random, chosen: str) -> Iterator[Fault]:
    """All faults in random order, again and again."""
    able = [each for each in FAULTS if chosen in each.name]
    for each in able:
        if each.needs in world.missing:
            print(f"left out: {each.name} ({world.missing[each.needs]})")
    able = [each for each in able if each.needs not in world.missing]
    while able:
        yield from chance.sample(able, len(able))


def play(each: Fault, chaos: Chaos) -> Round:
    """One fault, and the recovery from it."""
    world, ledger = chaos.world, chaos.ledger
    this = Round(each.name, time.monotonic(), time.time())
    at_first = ledger.open_jobs()
    try:
        this.since = each.inflict(chaos)
    except (AssertionError, pytest.fail.Exception, CannotRun) as exc:
        world.violations.append(f"{each.name}: {exc}")
        this.since = time.monotonic()
    now = time.monotonic()
    sent_in_it = [j for j in ledger.jobs if this.began <= j.accepted_at <= now]
    this.touched = [j for j in {*at_first, *sent_in_it} if not j.is_poison]
    wait_for(this.touched)
    world.dead()
    ends = Counter(job.end or "lost" for job in this.touched)
    print(
        f"{time.strftime('%H:%M:%S')} {each.name}: {dict(ends)}, "
        f"{max(0.0, this.recovery):.1f} s after {this.since - this.began:.1f} s",
        flush=True,
    )
    time.sleep(chaos.chance.uniform(0.2, 1.0))
    return this


def wait_for(jobs: Collection[Job]) -> None:
    deadline = time.monotonic() + LOST_SECONDS
    while any(job.is_open for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.05)


def broken(total: Row) -> list[str]:
    """The promises that the table shows broken."""
    promises = ("wrong", "failed", "lost", "written_twice", "not_told")
    found = [f"{number} {name}" for name in promises if (number := getattr(total, name))]
    if total.recovery > RECOVERY_SECONDS:
        found.append(f"a recovery took {total.recovery:.1f} s, more than {RECOVERY_SECONDS}")
    return found


def tell(ledger: Ledger, rounds: list[Round]) -> None:
    """Every job that did not end right, and why uploads were refused."""
    names = {id(job): each.name for each in rounds for job in each.touched}
    for job in ledger.jobs:
        if job.accepted_at and job.end != "right":
            where = names.get(id(job), "calm")
            print(f"{job.job_id} {job.source.name} ({where}): {job.end or 'lost'} {job.words!r}")
    refused = Counter(job.refused for job in ledger.jobs if job.refused)
    print(f"\nnot accepted: {dict(refused)}")


def left_behind(world: World) -> list[str]:
    """Complete uploads that stay on the disk after their jobs have ended, but for those that are
    kept for a retry."""
    uploads = world.data / "uploads"

    def complete() -> list[str]:
        ids = [path.parent.name for path in uploads.glob("*/manifest.json")]
        codes = {job_id: world.raw.hget(keys.job(job_id), "error_code") for job_id in ids}
        return [job_id for job_id in ids if codes[job_id] != WorkerLost.code]

    try:
        wait_until(lambda: not complete(), SWEPT_SECONDS, "uploads are removed")
    except pytest.fail.Exception:
        return [f"uploads stay on the disk: {complete()}"]
    return []
