"""What goes first: the oldest, with the head start of its priority."""

from __future__ import annotations

import pytest

from shared import keys
from shared.job_options import JobOptions, Priority
from tests.integration.test_job_store import end_lease, manifest

HOUR_US = 3600 * 1_000_000


@pytest.fixture
def submit(store, settings):
    """Submits a file with a priority; returns its manifest."""

    async def submit(content: str, priority: str = "normal"):
        made = manifest(settings, content, JobOptions(priority=Priority(priority)))
        await store.submit(made)
        return made

    return submit


def age(raw, job, hours: float) -> None:
    """As if its transcription had been submitted so long ago."""
    fp, us = job.fingerprint, int(hours * HOUR_US)
    raw.hincrby(keys.transcription(fp), "queued_us", -us)
    raw.zincrby(keys.QUEUE, -us, fp)
    raw.zincrby(keys.WAITING, -us, fp)


def order(worker, names: dict[str, str]) -> list[str]:
    """In which order all that waits is claimed. `names`: fingerprint -> what to call it."""
    found = []
    while claim := worker.claim():
        found.append(names[claim.fingerprint])
    return found


def names_of(*jobs) -> dict[str, str]:
    return {job.fingerprint: job.checksum for job in jobs}


async def test_high_goes_before_normal_before_low(worker, submit):
    """Of what came at about the same time; and in each of them the oldest goes first."""
    sent = [("a", "low"), ("b", "normal"), ("c", "high"), ("d", "normal"), ("e", "high")]
    jobs = [await submit(content, priority) for content, priority in sent]
    assert order(worker, names_of(*jobs)) == ["c", "e", "b", "d", "a"]


async def test_nothing_starves(worker, submit, raw):
    """Twelve hours are what a priority is worth: whatever waits longer goes before what is new."""
    jobs = [await submit(*sent) for sent in [("old", "normal"), ("older", "low"), ("new", "high")]]
    age(raw, jobs[0], 12.1)
    age(raw, jobs[1], 24.2)
    assert order(worker, names_of(*jobs)) == ["older", "old", "new"]


async def test_a_place_in_the_queue_says_who_goes_before(store, worker, submit, raw):
    """And the age of the oldest is that of who has waited longest, not of who is next."""
    low, normal, high = [await submit(p, p) for p in ("low", "normal", "high")]
    age(raw, low, 2)
    places = [(await store.read(job.job_id, "")).queue_position for job in (high, normal, low)]
    assert places == [1, 2, 3]
    assert (await store.snapshot()).oldest_queued_seconds == pytest.approx(7200, abs=60)
    assert worker.claim().fingerprint == high.fingerprint
    assert (await store.read(low.job_id, "")).queue_position == 2
    worker.claim()
    worker.claim()
    assert (await store.snapshot()).oldest_queued_seconds == 0
    assert not raw.exists(keys.WAITING)


async def test_a_job_that_joins_lifts_what_it_waits_for(store, worker, submit):
    """A lower priority changes nothing, and neither does who leaves again."""
    slow, other = await submit("slow", "low"), await submit("other")
    assert (await store.read(slow.job_id, "")).queue_position == 2
    await submit("slow", "normal")
    assert (await store.read(slow.job_id, "")).queue_position == 1, "it is the older one"
    hurried = await submit("other", "high")
    await submit("other", "low")
    assert (await store.read(other.job_id, "")).queue_position == 1
    await store.cancel(hurried.job_id, "")
    assert order(worker, names_of(slow, other)) == ["other", "slow"]


async def test_what_is_taken_back_keeps_its_priority(store, worker, submit, raw, settings):
    """After a hand-back, an ended lease, and one that was lifted while it ran."""
    high, normal = await submit("high", "high"), await submit("normal")
    worker.hand_back(worker.claim())
    claim = worker.claim()
    assert claim.fingerprint == high.fingerprint
    end_lease(raw, claim)
    worker.reap()
    assert (await store.read(high.job_id, "")).queue_position == 1
    worker.claim()
    running = worker.claim()
    assert running.fingerprint == normal.fingerprint
    late = await submit("late")
    await submit("normal", "high")
    worker.hand_back(running)
    assert (await store.read(normal.job_id, "")).queue_position == 1
    assert (await store.read(late.job_id, "")).queue_position == 2


async def test_parts_have_the_priority_of_their_recording(worker, submit):
    """Also when it is lifted after it was split."""
    one, other = await submit("one"), await submit("other")
    for _ in range(2):
        assert worker.split(worker.claim(), "{}", [0.5, 0.5]) == "ok"
    await submit("other", "high")
    names = names_of(one, other)
    assert order(worker, names) == ["other", "other", "one", "one"]


async def test_a_long_recording_of_a_higher_priority_goes_before_clips(worker, submit):
    """Every fourth turn is the others', as it is the other way round."""
    long = await submit("long", "high")
    assert worker.split(worker.claim(), "{}", [0.1] * 6) == "ok"
    clips = [await submit(f"clip{n}") for n in range(3)]
    found = order(worker, names_of(long, *clips))
    assert sorted(found[:4]) == ["clip0", "long", "long", "long"]
    assert sorted(found[4:8]) == ["clip1", "long", "long", "long"]


async def test_work_of_before_there_were_priorities_is_normal(store, worker, submit, raw):
    """A record without one, in a queue that was filled by an older version."""
    old, high, low = await submit("old"), await submit("high", "high"), await submit("low", "low")
    raw.hdel(keys.transcription(old.fingerprint), "priority")
    raw.delete(keys.WAITING)
    assert order(worker, names_of(old, high, low)) == ["high", "old", "low"]
