"""What goes first among one caller's jobs: the oldest, with the head start of its priority."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared import keys
from shared.job_options import JobOptions, Priority
from tests.integration.test_job_store import end_lease, manifest

HOURS_BYTES = 3600 * 32_000  # of plain speech


@pytest.fixture
def submit(store, settings):
    """Submits a file with a priority; returns its manifest."""

    async def submit(content: str, priority: str = "normal", size_bytes: int = 0):
        made = manifest(settings, content, JobOptions(priority=Priority(priority)))
        await store.submit(replace(made, size_bytes=size_bytes))
        return made

    return submit


def order(worker, names: dict[str, str]) -> list[str]:
    """In which order all that waits is claimed. `names`: fingerprint -> what to call it."""
    found = []
    while claim := worker.claim():
        found.append(names.get(claim.fingerprint, ""))
    return found


def names_of(*jobs) -> dict[str, str]:
    return {job.fingerprint: job.checksum for job in jobs}


async def test_high_goes_before_normal_before_low(worker, submit):
    """Of what came at about the same time; and in each of them the oldest goes first."""
    sent = [("a", "low"), ("b", "normal"), ("c", "high"), ("d", "normal"), ("e", "high")]
    jobs = [await submit(content, priority) for content, priority in sent]
    assert order(worker, names_of(*jobs)) == ["c", "e", "b", "d", "a"]


@pytest.mark.parametrize(
    ("waits", "comes", "most"),
    [("low", "normal", 1000), ("normal", "high", 1000), ("low", "high", 2000)],
)
async def test_nothing_starves(worker, submit, waits, comes, most):
    """A priority is worth so many hours of plain speech: what starts later than that passes
    nothing that waits."""
    waiting = await submit("waits", waits)
    found = []
    for n in range(10):
        await submit(f"comes-{n}", comes, 300 * HOURS_BYTES)
        found.append(worker.claim().fingerprint)
    assert found.index(waiting.fingerprint) == most // 300 + 1


async def test_a_place_in_the_queue_says_who_goes_before(store, worker, submit, raw):
    """And the age of the oldest is that of who has waited longest, not of who is next."""
    low, normal, high = [await submit(p, p) for p in ("low", "normal", "high")]
    raw.zincrby(keys.WAITING, -7200 * 1_000_000, low.fingerprint)
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
    """To where the joining one would stand alone. A lower priority changes nothing, and neither
    does who leaves again."""
    first, slow, other = (
        await submit("first", "low"),
        await submit("slow", "low"),
        await submit("o"),
    )
    await submit("slow", "normal")
    await submit("last")
    places = [(await store.read(job.job_id, "")).queue_position for job in (other, slow, first)]
    assert places == [1, 2, 4]
    hurried = await submit("slow", "high")
    await submit("o", "low")
    await store.cancel(hurried.job_id, "")
    assert order(worker, names_of(first, slow, other))[:2] == ["slow", "o"]


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


async def test_what_an_older_version_queued_goes_before_what_is_new(worker, submit, raw):
    """It has a time in the place of a start, and no line."""
    jobs = [await submit("old"), await submit("old-low", "low")]
    for job, head_start_hours in zip(jobs, (0, -12), strict=True):
        record = keys.transcription(job.fingerprint)
        raw.hdel(record, "line", "start")
        place = int(raw.hget(record, "queued_us")) - head_start_hours * 3600 * 1_000_000
        raw.zadd(keys.QUEUE, {job.fingerprint: place})
    raw.hdel(keys.transcription(jobs[0].fingerprint), "priority")
    raw.hdel(keys.COUNTERS, "backlog", *(n for n in raw.hkeys(keys.COUNTERS) if "clock" in n))
    raw.delete(keys.BACKLOGS, keys.WAITING, keys.lines("queue/normal/"), keys.lines("queue/low/"))
    jobs += [await submit("new"), await submit("high", "high"), await submit("new-low", "low")]
    claim = worker.claim()
    assert claim.fingerprint == jobs[3].fingerprint
    old = worker.claim()
    worker.hand_back(old)
    found = order(worker, names_of(*jobs))
    assert found == ["old", "new", "old-low", "new-low"]
