"""A job that failed on our side can be retried: its upload is kept, and it enters again as if it
had never ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import redis

from api import sender as sending
from api.deliveries import DeliveryStore
from api.retry import manifest_of, settle
from api.store import JobList, JobStore, Limits, Submission, connect
from shared import keys
from shared.errors import (
    EngineFailure,
    HandbackLimit,
    InputMissing,
    JobNotFailed,
    JobNotFound,
    ServiceError,
    TimeLimit,
    TooManyJobs,
    UnreadableMedia,
    UploadGone,
    WorkerLost,
)
from shared.job_options import JobOptions
from shared.jobs import JobStatus
from shared.settings import Settings
from shared.storage import Manifest, Storage
from tests.integration.test_job_store import TRANSCRIPT, complete, end_lease, manifest
from tests.integration.test_webhooks import eventually, senders
from tests.receiver import Receiver, Reply
from worker import reaper as reaping
from worker.reaper import Reaper
from worker.store import WorkerStore


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage(settings.data_dir)


@pytest.fixture
def submit(store: JobStore, storage: Storage, settings: Settings):
    """Uploads a file and submits it; returns its manifest."""

    async def submit(content: str = "a", owner: str = "", **told: str) -> Manifest:
        job = replace(manifest(settings, content), owner=owner, job_options=told, size_bytes=4)
        storage.begin(job.job_id).write_bytes(b"RIFF")
        storage.keep(job)
        await store.submit(job)
        return job

    return submit


@pytest.fixture
def retry(store: JobStore, storage: Storage) -> Callable[..., Awaitable[Submission | None]]:
    """What the endpoint does, without its answers."""

    async def retry(job: Manifest, *limits: object, model: str = "") -> Submission:
        again = manifest_of(storage, await store.read(job.job_id, ""), model or job.model)
        submission = await store.submit(again, *limits, least="failed")
        if submission.outcome != "full":
            settle(storage, again, submission)
        return submission

    return retry


@pytest.fixture
def reaper(
    worker: WorkerStore, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> Reaper:
    """One for which all is settled at once."""
    monkeypatch.setattr(reaping, "DURABLE_SECONDS", 0)
    monkeypatch.setattr(reaping, "UNSUBMITTED_SECONDS", -1)
    monkeypatch.setattr(reaping, "SETTLED_SECONDS", -1)
    return Reaper(worker, storage, settings, lambda *_: None)


def fail(worker: WorkerStore, error: ServiceError | None = None) -> list[str]:
    claim = worker.claim()
    assert claim
    ended = worker.fail(claim, error or WorkerLost())
    assert ended
    return ended


def kill(worker: WorkerStore, raw: redis.Redis, times: int) -> list[str]:
    """So many workers die of it. The jobs that are over then."""
    ended: list[str] = []
    for _ in range(times):
        claim = worker.claim()
        assert claim
        end_lease(raw, claim)
        ended = worker.reap()[2]
    return ended


# --- What becomes of the job ----------------------------------------------------------------------


async def test_ten_dead_jobs_are_done_after_a_retry_each(
    store, worker, settings, raw, submit, retry
):
    """They run anew, each once, and no death is counted any more."""
    jobs = [await submit(str(n)) for n in range(10)]
    ended = [job for _ in jobs for job in kill(worker, raw, settings.max_attempts)]
    assert sorted(ended) == sorted(job.job_id for job in jobs)
    for job in jobs:
        assert (await store.read(job.job_id, "")).error_code == "worker_lost"
        assert (await retry(job)).outcome == "new"
        seen = await store.read(job.job_id, "")
        assert (seen.status, seen.attempts, seen.error_code) == (JobStatus.QUEUED, 0, "")
        assert (seen.finished_at, seen.expires_at) == (None, None)
        assert raw.pttl(keys.job(job.job_id)) == -1, "unfinished work has no lifetime"
    for _ in jobs:
        assert complete(worker, settings, worker.claim())
    for job in jobs:
        seen = await store.read(job.job_id, "")
        assert (seen.status, seen.attempts) == (JobStatus.COMPLETED, 1)
        assert await store.transcript(seen) == TRANSCRIPT
    assert worker.claim() is None


async def test_jobs_that_failed_together_run_once_together(
    store, worker, settings, storage, submit, retry
):
    jobs = [await submit() for _ in range(10)]
    assert len(fail(worker)) == 10
    assert [(await retry(job)).outcome for job in jobs] == ["new"] + ["joined"] * 9
    assert len({storage.audio(job.job_id).stat().st_ino for job in jobs}) == 1, "one copy on disk"
    assert len(complete(worker, settings, worker.claim())) == 10
    assert worker.claim() is None


async def test_others_that_failed_with_it_stay_as_they_are(store, worker, settings, submit, retry):
    first, other = await submit(), await submit()
    fail(worker)
    before = await store.read(other.job_id, "")
    await retry(first)
    complete(worker, settings, worker.claim())
    assert await store.read(other.job_id, "") == before
    assert (await retry(other)).outcome == "hit"


async def test_a_retry_joins_or_hits_what_was_submitted_meanwhile(
    store, worker, settings, storage, submit, retry
):
    first, second = await submit(), await submit()
    fail(worker)
    meanwhile = await submit()
    assert (await retry(first)).outcome == "joined"
    ended = complete(worker, settings, worker.claim())
    assert sorted(ended) == sorted([first.job_id, meanwhile.job_id])
    assert (await retry(second)).outcome == "hit"
    assert (await store.read(second.job_id, "")).status is JobStatus.COMPLETED
    assert not storage.folder(second.job_id).exists(), "its upload is of no use any more"


async def test_a_retry_under_another_model_spoils_no_answer_of_another_job(
    store, worker, settings, submit, retry
):
    """The operator took another model; what one job got of it is the answer to the other, too."""
    first, second = await submit(), await submit()
    fail(worker)
    newer = settings.model_copy(update={"model_size": "tiny"}).model_key
    assert (await retry(first, model=newer)).outcome == "new"
    assert worker.complete(worker.claim(), TRANSCRIPT, newer, 1.5) == [first.job_id]
    assert (await retry(second, model=newer)).outcome == "hit"
    for job in (first, second):
        assert await store.transcript(await store.read(job.job_id, "")) == TRANSCRIPT


async def test_of_retries_that_arrive_together_one_is_taken(store, worker, raw, submit, retry):
    job = await submit()
    fail(worker)
    replies = await asyncio.gather(*(retry(job) for _ in range(20)), return_exceptions=True)
    assert [type(reply) for reply in replies].count(Submission) == 1
    assert [type(reply) for reply in replies].count(JobNotFailed) == 19
    assert raw.hget(keys.COUNTERS, "submit_new") == "2"
    assert worker.claim()
    assert worker.claim() is None


async def test_a_late_retry_of_what_has_failed_again_changes_nothing(
    store, worker, storage, submit, retry
):
    """It was meant for the failure before."""
    job = await submit()
    fail(worker)
    late = manifest_of(storage, await store.read(job.job_id, ""), job.model)
    await retry(job)
    fail(worker)
    with pytest.raises(JobNotFailed):
        await store.submit(late, least="failed")
    assert (await store.read(job.job_id, "")).status is JobStatus.FAILED


async def test_only_a_job_that_failed_and_has_not_expired_is_retried(
    store, worker, settings, raw, submit
):
    def again(job: Manifest) -> Manifest:
        return replace(job, job_options={"retries": "1"})

    expired = await submit("expired")
    fail(worker)
    raw.hset(keys.job(expired.job_id), "expires_ms", 1)
    for job in (expired, manifest(settings, "unknown")):
        with pytest.raises(JobNotFound):
            await store.submit(again(job), least="failed")
    done, cancelled = await submit("done"), await submit("cancelled")
    complete(worker, settings, worker.claim())
    await store.cancel(cancelled.job_id, "")
    runs = await submit("runs")
    worker.claim()
    for job in (done, cancelled, runs, await submit("waits")):
        before = raw.hgetall(keys.job(job.job_id))
        with pytest.raises(JobNotFailed):
            await store.submit(again(job), least="failed")
        assert raw.hgetall(keys.job(job.job_id)) == before


# --- The store's books ----------------------------------------------------------------------------


async def test_it_is_listed_as_long_as_it_is_there(store, worker, settings, raw, submit, retry):
    """The end of its first retention takes it from no list."""
    job, newer = await submit("a", batch="b", batch_number="0"), await submit("b")
    fail(worker)
    assert raw.zcard(keys.LISTED) == 1
    await retry(job)
    assert raw.zcard(keys.LISTED) == 0
    listed, _ = await store.page(JobList(), "", "", "", 10)
    assert [each.job_id for each in listed] == [job.job_id, newer.job_id]
    assert await store.batch("b") == [job.job_id]
    for _ in range(2):
        complete(worker, settings, worker.claim())
    assert raw.zcard(keys.LISTED) == 2


async def test_its_owner_s_books_are_right_again(store, worker, settings, raw, submit, retry):
    """As before its end; a limit that is reached changes nothing."""
    job = await submit("a", owner="app")
    books = raw.hgetall(keys.unfinished("app")), raw.get(keys.held("app"))
    fail(worker)
    other = await submit("b", owner="app")
    before = raw.hgetall(keys.job(job.job_id)), raw.zrange(keys.LISTED, 0, -1)
    with pytest.raises(TooManyJobs):
        await retry(job, None, Limits(jobs=1))
    assert (raw.hgetall(keys.job(job.job_id)), raw.zrange(keys.LISTED, 0, -1)) == before
    assert raw.pttl(keys.job(job.job_id)) > 0
    complete(worker, settings, worker.claim())
    waiting = await submit("c", owner="app")
    assert (await retry(job, 0)).outcome == "full"
    assert raw.hgetall(keys.job(job.job_id)) == before[0]
    await store.cancel(waiting.job_id, "")
    assert (await retry(job, None, Limits(jobs=1))).outcome == "new"
    assert (raw.hgetall(keys.unfinished("app")), raw.get(keys.held("app"))) == books
    await store.cancel(job.job_id, "")
    assert not raw.exists(keys.unfinished("app"), keys.held("app"))
    assert (await store.read(other.job_id, "app")).status is JobStatus.COMPLETED


async def test_its_idempotency_key_lives_on_with_it(store, worker, settings, raw, submit, retry):
    told = {"idempotency": "/" + "f" * 64, "request": "r", "batch_number": "0"}
    key = keys.idempotency(told["idempotency"])
    job = await submit("a", batch="first", **told)
    await submit("b", **{**told, "batch": "second", "batch_number": "1"})
    ended = fail(worker) + fail(worker)
    assert 0 < raw.pttl(key) <= settings.retention_ms
    assert len(ended) == 2
    await retry(job)
    assert raw.pttl(key) == -1
    again = replace(manifest(settings), job_options={**told, "batch": "third"})
    assert (await store.submit(again)).other == job.job_id
    complete(worker, settings, worker.claim())
    assert 0 < raw.pttl(key) <= settings.retention_ms


async def test_it_stays_in_the_batch_that_its_record_names(store, worker, raw, submit, retry):
    """A batch that was sent again keeps its first id, which not every manifest knows."""
    told = {"idempotency": "/" + "f" * 64, "request": "r"}
    await submit("a", batch="first", batch_number="0", **told)
    job = await submit("b", batch="second", batch_number="1", **told)
    fail(worker)
    fail(worker)
    await retry(job)
    assert (await store.read(job.job_id, "")).batch_id == "first"
    assert not raw.exists(keys.batch("second"))


# --- Its upload -----------------------------------------------------------------------------------


def sweep(reaper: Reaper, ended: list[str]) -> None:
    reaper.remove_later(ended)
    reaper.sweep()


@pytest.mark.parametrize("error", [WorkerLost, EngineFailure, TimeLimit, HandbackLimit])
async def test_an_upload_is_kept_for_a_retry_until_its_job_expires(
    worker, raw, storage, submit, reaper, error
):
    """Nobody takes it away before, and nobody submits it."""
    job = await submit()
    sweep(reaper, fail(worker, error()))
    assert storage.audio(job.job_id).exists()
    assert worker.claim() is None
    raw.hset(keys.job(job.job_id), "expires_ms", 1)
    reaper.reconcile_uploads()
    assert not storage.folder(job.job_id).exists()


@pytest.mark.parametrize("error", [UnreadableMedia, InputMissing])
async def test_an_upload_that_would_fail_again_is_not_kept(worker, storage, submit, reaper, error):
    job = await submit()
    sweep(reaper, fail(worker, error()))
    assert not storage.folder(job.job_id).exists()


async def test_an_upload_in_its_retry_is_that_of_an_unfinished_job(
    store, worker, settings, raw, storage, submit, retry, reaper
):
    """It outlives the cleaning that its first end began, and goes with its second one."""
    job = await submit()
    reaper.remove_later(fail(worker))
    await retry(job)
    reaper.sweep()
    assert storage.audio(job.job_id).exists()
    sweep(reaper, complete(worker, settings, worker.claim()))
    assert not storage.folder(job.job_id).exists()
    assert (await store.read(job.job_id, "")).status is JobStatus.COMPLETED


async def test_a_job_whose_upload_is_gone_is_not_retried(worker, storage, submit, retry):
    job = await submit()
    fail(worker)
    storage.remove(job.job_id)
    with pytest.raises(UploadGone):
        await retry(job)


async def test_an_emptied_store_gets_a_retried_job_back_with_its_retries(
    store, worker, raw, submit, retry, reaper
):
    job = await submit()
    fail(worker)
    await retry(job)
    raw.flushall()
    reaper.reconcile_uploads()
    seen = await store.read(job.job_id, "")
    assert (seen.status, seen.retries) == (JobStatus.QUEUED, 1)


# --- Its webhook ----------------------------------------------------------------------------------


async def test_the_webhook_is_told_of_the_next_end_under_another_id(
    store, worker, settings, submit, retry, monkeypatch
):
    """Receivers drop an id that they have seen."""
    monkeypatch.setattr(sending, "POLL_SECONDS", 0.05)
    deliveries = DeliveryStore(settings, connect(settings))
    with Receiver() as receiver:
        job = await submit(**JobOptions(webhook_url=receiver.url()).record())
        async with senders(settings):
            fail(worker)
            await eventually(deliveries, job.job_id, "delivered", 1)
            await retry(job)
            complete(worker, settings, worker.claim())
            seen = await eventually(deliveries, job.job_id, "delivered", 1)
        told = [
            (json.loads(request.body)["type"], request.headers["webhook-id"])
            for request in receiver.received
        ]
    await deliveries.close()
    first = f"msg_{job.job_id.replace('-', '')}"
    assert told == [
        ("transcription.failed", first),
        ("transcription.completed", f"{first}_1"),
    ]
    assert seen.webhook_id == f"{first}_1"


async def test_a_failure_that_could_not_be_told_yet_is_not_told_after_a_retry(
    store, worker, settings, raw, submit, retry, monkeypatch
):
    """It is true no more; the job's next end is."""
    monkeypatch.setattr(sending, "POLL_SECONDS", 0.05)
    slow = settings.model_copy(update={"webhook_retry_seconds": "3600"})
    deliveries = DeliveryStore(settings, connect(settings))
    with Receiver(Reply(500), Reply(200)) as receiver:
        job = await submit(**JobOptions(webhook_url=receiver.url()).record())
        async with senders(slow):
            fail(worker)
            await eventually(deliveries, job.job_id, "pending", 1)
            await retry(job)
            assert not raw.exists(keys.UNDELIVERED, keys.RECEIVERS)
            complete(worker, settings, worker.claim())
            await eventually(deliveries, job.job_id, "delivered", 1)
        types = [json.loads(request.body)["type"] for request in receiver.received]
    await deliveries.close()
    assert types == ["transcription.failed", "transcription.completed"]
