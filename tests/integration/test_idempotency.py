"""A request with a key enters once: whoever sends it how often, at a time or after a loss."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from api.store import Limits
from shared import keys
from shared.errors import IdempotencyConflict, TooManyJobs
from shared.storage import Manifest, Storage
from tests.integration.test_job_store import complete, manifest
from worker.reaper import Reaper

KEY = "f" * 64


@pytest.fixture
def keyed(settings):
    """A manifest of a request with a key, each time with a new job id."""

    def made(content: str = "a", owner: str = "", key: str = KEY, **told: str) -> Manifest:
        named = {"idempotency": f"{owner}/{key}", "request": content, **told}
        return replace(manifest(settings, content), owner=owner, job_options=named)

    return made


async def test_the_same_request_with_the_same_key_is_the_same_job(store, keyed, raw):
    first = keyed()
    assert (await store.submit(first)).outcome == "new"
    again = await store.submit(keyed())
    assert (again.outcome, again.other) == ("replayed", first.job_id)
    assert raw.zcard(keys.jobs("")) == 1
    assert raw.hget(keys.COUNTERS, "jobs_submitted") == "1"


async def test_duplicates_that_arrive_together_are_one_job(store, keyed, raw):
    """Over all API processes: the script decides."""
    sent = [keyed() for _ in range(50)]
    found = await asyncio.gather(*(store.submit(each) for each in sent))
    new = [job.job_id for job, each in zip(sent, found, strict=True) if each.outcome == "new"]
    assert len(new) == 1
    assert {each.other for each in found if each.outcome == "replayed"} == set(new)
    assert raw.zrange(keys.jobs(""), 0, -1) == new


async def test_the_same_key_for_another_request_is_refused(store, keyed, raw):
    """And leaves nothing."""
    await store.submit(keyed())
    before = set(raw.keys("*"))
    with pytest.raises(IdempotencyConflict):
        await store.submit(keyed("b"))
    assert set(raw.keys("*")) == before


async def test_a_key_belongs_to_its_owner(store, keyed):
    jobs = [keyed(owner=name) for name in ("", "app", "other")]
    for job in jobs:
        assert (await store.submit(job)).outcome != "replayed"
    assert (await store.submit(keyed(owner="app"))).other == jobs[1].job_id


async def test_a_key_that_is_known_comes_before_limits(store, keyed, settings):
    """The job is there: a retry is no new one."""
    limits = Limits(jobs=1)
    first = keyed(owner="app")
    await store.submit(first, limits=limits)
    assert (await store.submit(keyed(owner="app"), limits=limits)).other == first.job_id
    with pytest.raises(TooManyJobs):
        await store.submit(keyed("b", "app", "e" * 64), limits=limits)


async def test_the_answer_is_the_same_job_whatever_became_of_it(store, worker, settings, keyed):
    """A retry never runs anything again."""
    done, cancelled = keyed("done", key="1" * 64), keyed("cancelled", key="2" * 64)
    await store.submit(done)
    complete(worker, settings, worker.claim())
    await store.submit(cancelled)
    await store.cancel(cancelled.job_id, "")
    for job in (done, cancelled):
        content, key = job.checksum, job.job_options["idempotency"].partition("/")[2]
        assert (await store.submit(keyed(content, key=key))).other == job.job_id
    assert worker.claim() is None


async def test_a_key_lives_as_long_as_its_jobs_and_their_results(
    store, worker, settings, keyed, raw
):
    """It has no lifetime while one of them is unfinished."""
    told = {"batch": "b"}
    jobs = [keyed("a", batch_number=str(n), **told) for n in range(3)]
    for job in jobs:
        await store.submit(job)
    key = keys.idempotency(f"/{KEY}")
    await store.cancel(jobs[0].job_id, "")
    assert raw.pttl(key) == -1
    complete(worker, settings, worker.claim())
    assert 0 < raw.pttl(key) <= settings.retention_ms
    assert (await store.submit(keyed("a", batch_number="3", **told))).outcome == "hit"
    assert 0 < raw.pttl(key) <= settings.retention_ms


async def test_an_expired_job_is_no_answer(store, worker, settings, keyed, raw):
    """The request makes a new one; so when its transcript had to make room."""
    first, second, third = keyed(), keyed(), keyed()
    await store.submit(first)
    complete(worker, settings, worker.claim())
    raw.hset(keys.job(first.job_id), "expires_ms", 1)
    assert (await store.submit(second)).outcome == "hit"
    assert (await store.submit(keyed())).other == second.job_id
    worker.evict(0)
    assert (await store.submit(third)).outcome == "new"
    assert (await store.submit(keyed())).other == third.job_id
    await store.erase(first.job_id, "")
    assert (await store.submit(keyed())).other == third.job_id, "its key is another job's by now"


async def test_an_erased_job_takes_its_key_along(store, worker, settings, keyed, raw):
    """Nothing tells any more that there was such a request."""
    job = keyed()
    await store.submit(job)
    await store.cancel(job.job_id, "")
    assert (await store.erase(job.job_id, ""))[0] == "erased"
    assert not raw.exists(keys.idempotency(f"/{KEY}"))
    assert (await store.submit(keyed())).outcome == "new"


async def test_a_batch_that_is_sent_again_submits_what_was_missing(store, keyed, raw):
    """Under the id of the first time; of each file there is one job."""
    told = {"batch": "first"}
    files = [keyed("a", batch_number=str(n), **told) for n in range(2)]
    await store.submit(files[0])
    again = [keyed("a", batch_number=str(n), batch="second") for n in range(2)]
    assert (await store.submit(again[0])).other == files[0].job_id
    assert (await store.submit(again[1])).outcome == "joined"
    assert await store.batch("first") == [files[0].job_id, again[1].job_id]
    assert not raw.exists(keys.batch("second"))


async def test_a_key_survives_the_loss_of_the_store(store, worker, keyed, raw):
    """It is in the manifest."""
    job = keyed()
    await store.submit(job)
    raw.flushall()
    assert worker.resubmit(job) == "new"
    assert (await store.submit(keyed())).other == job.job_id


@pytest.mark.parametrize("content", ["a", "b"])
async def test_an_upload_whose_request_was_answered_by_another_job_goes(
    store, worker, settings, keyed, raw, content, monkeypatch
):
    """An API process died between its manifest and its submission, and the caller sent it again."""
    monkeypatch.setattr("worker.reaper.UNSUBMITTED_SECONDS", -1)
    storage, cleaned = Storage(settings.data_dir), []
    reaper = Reaper(worker, storage, settings, lambda *event: cleaned.append(event))
    kept, orphan = keyed(), keyed(content)
    for job in (kept, orphan):
        storage.begin(job.job_id).write_bytes(b"audio")
        storage.keep(job)
    await store.submit(kept)
    reaper.reconcile_uploads()
    assert list(storage.job_ids()) == [kept.job_id]
    assert cleaned == [("upload", 1)]
    assert raw.zrange(keys.jobs(""), 0, -1) == [kept.job_id]


async def test_no_key_is_no_record(store, settings, raw):
    await store.submit(manifest(settings))
    assert not [key for key in raw.keys("*") if "idempotency" in key]
