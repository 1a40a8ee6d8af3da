"""The job store's promises for long recordings, which run in parts."""

from __future__ import annotations

import pytest
import pytest_asyncio

from shared import keys
from shared.errors import TimeLimit
from shared.jobs import Claim, JobStatus
from tests.integration.test_job_store import manifest

SHARES = [0.5, 0.25, 0.25]


@pytest_asyncio.fixture
async def job_id(store, worker, settings) -> str:
    """A job whose recording was split in three."""
    job = manifest(settings)
    await store.submit(job)
    assert worker.split(worker.claim(), '{"a":1}', SHARES) == "ok"
    return job.job_id


def end_lease(raw, claim: Claim) -> None:
    raw.zadd(keys.LEASES, {claim.unit: 1})


def traces(raw) -> list[str]:
    """All keys and members that a part leaves."""
    found = [key for key in raw.keys("*") if "#" in key]
    return (
        found
        + raw.zrange(keys.PARTS, 0, -1)
        + [u for u in raw.zrange(keys.LEASES, 0, -1) if "#" in u]
    )


async def test_parts_run_once_each_and_the_last_one_calls_for_the_join(
    store, worker, settings, raw, job_id
):
    claims = [worker.claim() for _ in SHARES]
    assert [claim.part for claim in claims] == [0, 1, 2]
    assert {claim.plan for claim in claims} == {'{"a":1}'}
    assert worker.claim() is None
    for claim in (claims[2], claims[0]):
        assert worker.finish_part(claim, f"result {claim.part}") == "ok"
        assert worker.claim() is None
    job = await store.read(job_id, "")
    assert (job.status, job.progress, job.attempts) == (JobStatus.PROCESSING, 0.75, 1)
    assert worker.finish_part(claims[1], "result 1") == "ok"
    join = worker.claim()
    assert (join.part, join.is_join, join.attempt) == (None, True, 1)
    assert worker.part_results(join) == ["result 0", "result 1", "result 2"]
    assert worker.renew(join, 0.0) == "ok"
    assert (await store.read(job_id, "")).progress == 1.0, "a heartbeat of the join undoes nothing"
    assert (await store.read(job_id, "")).status is JobStatus.PROCESSING
    assert worker.complete(join, b"{}", settings.model_key, 1.0) == [job_id]
    assert (await store.read(job_id, "")).status is JobStatus.COMPLETED
    assert traces(raw) == []


async def test_a_short_recording_goes_before_parts_and_parts_do_not_starve(
    store, worker, settings, job_id
):
    for n in range(6):
        await store.submit(manifest(settings, f"short {n}"))
    order = [worker.claim().part for _ in range(9)]
    assert order[:4].count(None) == 3
    assert order[4:8].count(None) == 3
    assert [number for number in order if number is not None] == [0, 1, 2]


async def test_a_worker_may_leave_parts_to_others(store, worker, settings, job_id):
    short = manifest(settings, "short")
    await store.submit(short)
    assert worker.claim(takes_parts=False).fingerprint == short.fingerprint
    assert worker.claim(takes_parts=False) is None
    assert worker.claim().part == 0


async def test_progress_is_the_sum_of_the_parts(store, worker, job_id):
    first, second = worker.claim(), worker.claim()
    assert worker.renew(first, 0.5) == worker.renew(second, 0.5) == "ok"
    assert (await store.read(job_id, "")).progress == pytest.approx(0.375)
    assert worker.hand_back(second)[0] == "requeued"
    assert (await store.read(job_id, "")).progress == pytest.approx(0.25)


async def test_a_lost_part_is_repeated_alone(store, worker, raw, job_id):
    claims = [worker.claim() for _ in SHARES]
    worker.finish_part(claims[0], "kept")
    end_lease(raw, claims[1])
    assert worker.reap()[0] == 1
    again = worker.claim()
    assert (again.part, again.attempt) == (1, 2)
    assert worker.finish_part(claims[1], "late") == "lost"
    worker.finish_part(claims[2], "two")
    worker.finish_part(again, "one")
    assert worker.part_results(worker.claim()) == ["kept", "one", "two"]
    assert (await store.read(job_id, "")).status is JobStatus.PROCESSING


async def test_a_lost_join_is_repeated_and_the_parts_are_not(store, worker, raw, job_id):
    for claim in [worker.claim() for _ in SHARES]:
        worker.finish_part(claim, "x")
    end_lease(raw, worker.claim())
    worker.reap()
    join = worker.claim()
    assert (join.is_join, join.attempt) == (True, 2)
    assert (await store.read(job_id, "")).progress == 1.0


async def test_a_part_that_kills_its_workers_ends_the_job(store, worker, settings, raw, job_id):
    running = worker.claim()
    for _ in range(settings.max_attempts):
        end_lease(raw, worker.claim())
        ended = worker.reap()[2]
    assert ended == [job_id]
    job = await store.read(job_id, "")
    assert (job.status, job.error_code) == (JobStatus.FAILED, "worker_lost")
    assert worker.renew(running, 0.5) == "lost"
    assert worker.claim() is None
    assert traces(raw) == []


async def test_cancelling_stops_all_parts(store, worker, raw, job_id):
    running = worker.claim()
    assert (await store.cancel(job_id, ""))[0] == "cancelled"
    assert worker.renew(running, 0.5) == "cancelled"
    assert worker.finish_part(running, "late") == "lost"
    assert worker.claim() is None
    assert traces(raw) == []


async def test_a_recording_whose_part_is_gone_is_planned_anew(store, worker, settings, raw, job_id):
    running, broken = worker.claim(), worker.claim()
    assert worker.replan(broken) == ("requeued", [])
    assert worker.renew(running, 0.5) == "lost"
    assert traces(raw) == []
    claim = worker.claim()
    assert (claim.part, claim.is_join, claim.attempt) == (None, False, 1)
    for _ in range(settings.max_handbacks - 2):
        worker.split(claim, "{}", SHARES)
        assert worker.replan(worker.claim())[0] == "requeued"
        claim = worker.claim()
    worker.split(claim, "{}", SHARES)
    assert worker.replan(worker.claim()) == ("failed", [job_id])


async def test_a_part_that_fails_takes_its_recording_with_it(store, worker, raw, job_id):
    part, other = worker.claim(), worker.claim()
    assert worker.fail(part, TimeLimit()) == [job_id]
    job = await store.read(job_id, "")
    assert (job.status, job.error_code) == ("failed", "time_limit")
    assert worker.renew(other, 0.5) == "lost"
    assert worker.finish_part(other, "{}") == "lost"
    assert traces(raw) == []


async def test_a_late_planner_changes_nothing(store, worker, settings, raw):
    await store.submit(manifest(settings))
    late = worker.claim()
    end_lease(raw, late)
    worker.reap()
    assert worker.split(late, "{}", SHARES) == "lost"
    assert traces(raw) == []
    fresh = worker.claim()
    assert worker.split(fresh, "{}", SHARES) == "ok"
    assert worker.split(fresh, "{}", SHARES) == "lost"


async def test_parts_that_wait_are_missed_by_the_bells(store, worker, job_id):
    """Whoever reaps rings for them, too."""
    assert worker.reap()[1] == len(SHARES)
