"""Lists of jobs: in order, whole, each caller's own, and gone when the jobs are."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from api.store import LOOK_AT_JOBS, JobList
from shared import keys
from shared.errors import UnreadableMedia
from shared.jobs import JobStatus
from tests.integration.test_job_store import TRANSCRIPT, complete, manifest

BATCH = "b7a3f3a2-6b39-4a37-a05c-7d8f0ba5e2f1"


@pytest.fixture
def submit(store, settings):
    """Submits a file; returns its job's id."""

    async def submit(content: str = "a", owner: str = "", **told: str) -> str:
        made = replace(manifest(settings, content), owner=owner, job_options=told)
        await store.submit(made)
        return made.job_id

    return submit


async def all_pages(store, listed: JobList, seen_by="", status="", most=7) -> list[list[str]]:
    """The ids of each page."""
    pages, cursor = [], ""
    while True:
        jobs, cursor = await store.page(listed, seen_by, cursor, status, most)
        pages.append([job.job_id for job in jobs])
        if not cursor:
            return pages


async def test_pages_hold_every_job_once_the_newest_first(store, submit):
    """Whatever comes meanwhile, and whatever the size of a page."""
    ids = [await submit(str(n % 3)) for n in range(20)]
    for most in (1, 7, 20, 50):
        pages = await all_pages(store, JobList(), most=most)
        assert [job_id for page in pages for job_id in page] == ids[::-1]
        assert all(len(page) == most for page in pages[:-1])
        assert pages[-1], "the last page is not an empty one"
    first, cursor = await store.page(JobList(), "", "", "", 5)
    await submit("later")
    second, _ = await store.page(JobList(), "", cursor, "", 5)
    assert [job.job_id for job in first + second] == ids[::-1][:10]


async def test_jobs_of_one_moment_have_a_place_each(store, submit, raw):
    """Also when the clock was set back: a page that ends between them loses none."""
    early = await submit("a")
    raw.zadd(keys.jobs(""), {early: 4e15})
    ids = [early] + [await submit(str(n)) for n in range(5)]
    scores = [raw.zscore(keys.jobs(""), job_id) for job_id in ids]
    assert scores == sorted(set(scores))
    pages = await all_pages(store, JobList(), most=1)
    assert [page[0] for page in pages] == ids[::-1]


async def test_a_list_shows_what_the_status_shows(store, worker, settings, submit):
    await submit("done", metadata='{"n":1}', priority="high")
    complete(worker, settings, worker.claim())
    await submit("broken")
    worker.fail(worker.claim(), UnreadableMedia())
    await submit("runs")
    worker.claim()
    await submit("waits")
    jobs, _ = await store.page(JobList(), "", "", "", 10)
    for job in jobs:
        assert job == await store.read(job.job_id, "")
    assert [job.status for job in jobs] == [
        JobStatus.QUEUED,
        JobStatus.PROCESSING,
        JobStatus.FAILED,
        JobStatus.COMPLETED,
    ]
    assert (jobs[-1].options.metadata, jobs[-1].options.priority) == ({"n": 1}, "high")


@pytest.mark.parametrize("status", list(JobStatus))
async def test_a_status_is_found_however_rare_it_is(store, worker, settings, submit, raw, status):
    """Page by page, each of which looks at so many jobs and no more."""
    common = JobStatus.FAILED if status is JobStatus.CANCELLED else JobStatus.CANCELLED

    async def made(content: str, status: JobStatus) -> str:
        job_id = await submit(content)
        if status is JobStatus.CANCELLED:
            await store.cancel(job_id, "")
        if status in {JobStatus.PROCESSING, JobStatus.COMPLETED, JobStatus.FAILED}:
            claim = worker.claim()
            if status is JobStatus.COMPLETED:
                complete(worker, settings, claim)
            if status is JobStatus.FAILED:
                worker.fail(claim, UnreadableMedia())
        return job_id

    wanted = await made("wanted", status)
    for n in range(2 * LOOK_AT_JOBS):
        await made(str(n), common)
    pages = await all_pages(store, JobList(), status=status)
    assert pages == [[], [], [wanted]]
    assert sum(map(len, await all_pages(store, JobList(), status=common))) == 2 * LOOK_AT_JOBS


async def test_a_caller_s_list_holds_its_own_jobs(store, submit):
    mine, others = await submit(owner="app"), await submit(owner="other")
    assert await all_pages(store, JobList("app"), "app") == [[mine]]
    assert await all_pages(store, JobList("other"), "app") == [[]], "whatever it asks for"
    assert await all_pages(store, JobList("other"), "") == [[others]], "who sees all, sees it"


async def test_a_batch_is_the_list_of_its_jobs(store, submit):
    """In the order of its files, however they were submitted; seen by its owner alone."""
    ids = {n: await submit(str(n), "app", batch=BATCH, batch_number=str(n)) for n in (2, 0, 1)}
    await submit("no member", "app")
    assert await all_pages(store, JobList(batch_id=BATCH), "app", most=2) == [
        [ids[2], ids[1]],
        [ids[0]],
    ]
    assert await store.batch(BATCH) == [ids[0], ids[1], ids[2]]
    assert await all_pages(store, JobList(batch_id=BATCH), "other") == [[]]
    job = await store.read(ids[1], "app")
    assert (job.batch_id, job.batch_number) == (BATCH, 1)


async def test_an_erased_job_is_in_no_list(store, worker, settings, submit, raw):
    """And the list of a batch goes with its last job."""
    one = await submit("one", batch=BATCH, batch_number="0")
    other = await submit("other", batch=BATCH, batch_number="1")
    for job_id in (one, other):
        await store.cancel(job_id, "")
        assert (await store.erase(job_id, ""))[0] == "erased"
        assert job_id not in raw.zrange(keys.jobs(""), 0, -1)
    assert not raw.exists(keys.jobs(""), keys.batch(BATCH), keys.LISTED)


async def test_an_expired_job_is_in_no_list(store, worker, settings, submit, raw):
    """From the moment at which it expires; a reaper takes it out, or the next submission."""
    ids = [await submit(str(n), "app", batch=BATCH, batch_number=str(n)) for n in range(3)]
    for _ in ids:
        complete(worker, settings, worker.claim())
    assert raw.zcard(keys.LISTED) == 3
    now = int(time.time() * 1000)
    for job_id, expires_ms in zip(ids, (now - 2, now - 1, now + 60_000), strict=True):
        raw.hset(keys.job(job_id), "expires_ms", expires_ms)
        raw.zadd(keys.LISTED, {f"{job_id}/{BATCH}/app": expires_ms})
    assert await all_pages(store, JobList("app"), "app") == [[ids[2]]]
    assert raw.zcard(keys.jobs("app")) == 3
    worker.evict(10**9)
    assert raw.zrange(keys.jobs("app"), 0, -1) == raw.zrange(keys.batch(BATCH), 0, -1) == [ids[2]]
    raw.zadd(keys.LISTED, {f"{ids[2]}/{BATCH}/app": 1})
    await submit("next", "other")
    assert not raw.exists(keys.jobs("app"), keys.batch(BATCH), keys.LISTED)


async def test_a_job_whose_transcript_made_room_is_in_no_list(store, worker, settings, submit):
    """It answers 410, as an expired one."""
    await submit("one")
    complete(worker, settings, worker.claim())
    assert worker.evict(len(TRANSCRIPT) - 1) == 1
    assert await all_pages(store, JobList()) == [[]]


async def test_lists_come_back_with_their_jobs(store, worker, settings, raw):
    """After the store was emptied, from the manifests."""
    told = {"batch": BATCH, "batch_number": "1"}
    lost = replace(manifest(settings), owner="app", job_options=told)
    await store.submit(lost)
    raw.flushall()
    assert worker.resubmit(lost) == "new"
    assert await all_pages(store, JobList("app"), "app") == [[lost.job_id]]
    assert await all_pages(store, JobList(batch_id=BATCH), "app") == [[lost.job_id]]


async def test_a_page_costs_the_same_however_many_jobs_there_are(store, submit, raw):
    """Commands that Redis runs for a page, of ten jobs or of ten thousand."""

    async def cost(**asked) -> int:
        before = raw.info("commandstats")
        await store.page(JobList(), "", "", asked.get("status", ""), 10)
        after = raw.info("commandstats")
        return sum(
            after[name]["calls"] - before.get(name, {"calls": 0})["calls"]
            for name in after
            if name not in {"cmdstat_info", "cmdstat_evalsha"}
        )

    for n in range(LOOK_AT_JOBS + 10):
        await submit(str(n % 10))
    few = [await cost(), await cost(status="failed")]
    job_id = (await store.page(JobList(), "", "", "", 1))[0][0].job_id
    record = raw.hgetall(keys.job(job_id))
    pipe = raw.pipeline(transaction=False)
    for n in range(10_000):
        pipe.hset(keys.job(f"job-{n}"), mapping=record)
        pipe.zadd(keys.jobs(""), {f"job-{n}": n})
    pipe.execute()
    assert [await cost(), await cost(status="failed")] == few
    assert max(few) <= 5 * LOOK_AT_JOBS
