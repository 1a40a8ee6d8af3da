"""The job store's promises, on a real server: what the Lua scripts do, whoever calls them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from pydantic import SecretStr

from api.store import JobStore
from local.ports import free_port
from shared import keys
from shared.broker import QUEUE_NAME, TASK_NAME, celery_app, doorbell
from shared.errors import JobExpired, JobNotFound, StoreFull, StoreUnavailable, UnreadableMedia
from shared.job_options import JobOptions, Priority
from shared.jobs import Claim, JobStatus
from shared.options import TranscriptionOptions, fingerprint
from shared.scripts import source
from shared.settings import Settings
from shared.storage import Manifest, Storage
from worker.store import WorkerStore

TRANSCRIPT = b'{"text":"hello"}'


def manifest(
    settings: Settings, content: str = "a", job: JobOptions | None = None, **options
) -> Manifest:
    chosen = TranscriptionOptions(**options)
    return Manifest(
        job_id=str(uuid4()),
        fingerprint=fingerprint(content, chosen, settings.model_key),
        checksum=content,
        options=chosen.canonical(),
        model=settings.model_key,
        job_options=job.record() if job else {},
    )


def end_lease(raw, claim: Claim) -> None:
    """As if the worker had been silent for the whole lease."""
    raw.zadd(keys.LEASES, {claim.fingerprint: 1})


def complete(worker: WorkerStore, settings: Settings, claim: Claim) -> list[str] | None:
    return worker.complete(claim, TRANSCRIPT, settings.model_key, 1.5)


async def test_a_new_job_is_queued_and_rings_one_bell(store, settings, raw):
    """A submission that nobody made before waits at its place in the queue."""
    first, second = manifest(settings, "a"), manifest(settings, "b")
    assert (await store.submit(first)).outcome == "new"
    assert (await store.submit(second)).outcome == "new"
    job = await store.read(second.job_id, "")
    assert (job.status, job.queue_position, job.progress) == (JobStatus.QUEUED, 2, 0.0)
    assert raw.llen(QUEUE_NAME) == 2


async def test_identical_submissions_share_one_run(store, worker, settings, raw):
    """Jobs that join a transcription in flight cost no bell and no run, and end with it."""
    jobs = [manifest(settings) for _ in range(50)]
    outcomes = [(await store.submit(job)).outcome for job in jobs]
    assert outcomes == ["new"] + ["joined"] * 49
    assert raw.llen(QUEUE_NAME) == 1
    claim = worker.claim()
    assert worker.claim() is None
    late = manifest(settings)
    assert (await store.submit(late)).outcome == "joined"
    ended = complete(worker, settings, claim)
    assert sorted(ended) == sorted(job.job_id for job in [*jobs, late])
    for job in [*jobs, late]:
        read = await store.read(job.job_id, "")
        assert read.status is JobStatus.COMPLETED
        assert await store.transcript(read) == TRANSCRIPT


async def test_ten_thousand_joined_jobs_end_in_one_step(store, worker, settings, raw):
    """A transcription has no limit on how many jobs wait for it."""
    first = manifest(settings)
    await store.submit(first)
    for number in range(10_000):
        raw.sadd(keys.holders(first.fingerprint), str(number))
    assert len(complete(worker, settings, worker.claim())) == 10_001


async def test_a_finished_transcription_answers_the_next_one_at_once(store, worker, settings):
    """The result cache is the finished transcription itself."""
    await store.submit(manifest(settings))
    complete(worker, settings, worker.claim())
    again = manifest(settings)
    assert (await store.submit(again)).outcome == "hit"
    job = await store.read(again.job_id, "")
    assert (job.status, job.progress, job.duration) == (JobStatus.COMPLETED, 1.0, 1.5)
    assert worker.claim() is None


async def test_other_options_or_another_model_are_another_run(store, worker, settings):
    """Whatever may change the text is part of the fingerprint."""
    await store.submit(manifest(settings))
    assert (await store.submit(manifest(settings, language="en"))).outcome == "new"
    other = settings.model_copy(update={"model_size": "tiny"})
    assert (await store.submit(manifest(other))).outcome == "new"
    assert (await store.submit(manifest(settings, "b"))).outcome == "new"


async def test_a_transcript_of_another_model_is_no_hit(store, worker, settings):
    """A worker that ran with other weights than the API expects doesn't poison the cache."""
    await store.submit(manifest(settings))
    assert worker.complete(worker.claim(), TRANSCRIPT, "tiny@latest/default", 1.5)
    assert (await store.submit(manifest(settings))).outcome == "new"


async def test_the_oldest_runs_first_whatever_the_bell_says(store, worker, settings):
    """The claim script decides the order."""
    jobs = [manifest(settings, name) for name in "abc"]
    for job in jobs:
        await store.submit(job)
    assert [worker.claim().fingerprint for _ in jobs] == [job.fingerprint for job in jobs]


async def test_a_claim_whose_lease_ended_can_write_nothing(store, worker, settings, raw):
    """A worker that slept past its lease is refused, even while nobody has taken its place."""
    job = manifest(settings)
    await store.submit(job)
    claim = worker.claim()
    end_lease(raw, claim)
    assert worker.renew(claim, 0.5) == "lost"
    assert complete(worker, settings, claim) is None
    assert worker.fail(claim, UnreadableMedia()) is None
    assert worker.hand_back(claim) == ("lost", [])
    assert (await store.read(job.job_id, "")).status is JobStatus.PROCESSING
    assert not raw.exists(keys.transcript(job.fingerprint))


async def test_an_ended_lease_goes_back_to_its_old_place(store, worker, settings, raw):
    """A job that lost its worker runs before the jobs that came after it."""
    first, second = manifest(settings, "a"), manifest(settings, "b")
    await store.submit(first)
    claim = worker.claim()
    await store.submit(second)
    end_lease(raw, claim)
    assert worker.reap()[:2] == (1, 2)
    assert (await store.read(first.job_id, "")).queue_position == 1
    assert worker.claim().attempt == 2


async def test_the_fencing_token_keeps_a_late_worker_out(store, worker, settings, raw):
    """When a second worker has the claim, the first one's writes are refused for good."""
    job = manifest(settings)
    await store.submit(job)
    late = worker.claim()
    end_lease(raw, late)
    worker.reap()
    current = worker.claim()
    assert worker.renew(late, 0.9) == "lost"
    assert complete(worker, settings, late) is None
    assert worker.renew(current, 0.1) == "ok"
    assert complete(worker, settings, current) == [job.job_id]
    assert complete(worker, settings, current) is None, "a second commit of the same claim"


async def test_a_lost_store_can_not_make_an_old_token_valid_again(store, worker, settings, raw):
    """After Redis was emptied attempts begin at 1 again, but claim ids never repeat."""
    job = manifest(settings)
    await store.submit(job)
    zombie = worker.claim()
    raw.flushall()
    assert worker.resubmit(job) == "new"
    fresh = worker.claim()
    assert fresh.attempt == zombie.attempt == 1
    assert complete(worker, settings, zombie) is None
    assert complete(worker, settings, fresh) == [job.job_id]


async def test_a_file_that_kills_its_workers_is_quarantined(store, worker, settings, raw):
    """After MAX_ATTEMPTS dead workers every job of the file fails with a code and a sentence."""
    jobs = [manifest(settings), manifest(settings)]
    for job in jobs:
        await store.submit(job)
    for _ in range(settings.max_attempts):
        end_lease(raw, worker.claim())
        ended = worker.reap()[2]
    assert sorted(ended) == sorted(job.job_id for job in jobs)
    assert worker.claim() is None
    read = await store.read(jobs[0].job_id, "")
    assert (read.status, read.error_code) == (JobStatus.FAILED, "worker_lost")
    assert read.error_message


async def test_a_hand_back_burns_no_attempt_but_is_limited(store, worker, settings):
    """Rolling restarts don't count against a file; an endless loop of them ends."""
    job = manifest(settings)
    await store.submit(job)
    for _ in range(settings.max_handbacks - 1):
        claim = worker.claim()
        assert claim.attempt == 1
        assert worker.hand_back(claim)[0] == "requeued"
    assert worker.hand_back(worker.claim()) == ("failed", [job.job_id])
    assert (await store.read(job.job_id, "")).error_code == "handed_back_too_often"


async def test_an_engine_failure_is_tried_again_and_then_reported(store, worker, settings):
    """A failure that may pass costs an attempt each time."""
    job = manifest(settings)
    await store.submit(job)
    replies = [worker.retry(worker.claim(), UnreadableMedia())[0] for _ in range(3)]
    assert replies == ["requeued", "requeued", "failed"]
    assert (await store.read(job.job_id, "")).error_code == "unreadable_media"


async def test_cancelling_one_of_two_jobs_leaves_the_other(store, worker, settings):
    """A transcription stops only when nobody wants it any more."""
    one, other = manifest(settings), manifest(settings)
    await store.submit(one)
    await store.submit(other)
    claim = worker.claim()
    assert (await store.cancel(one.job_id, ""))[0] == "cancelled"
    assert worker.renew(claim, 0.1) == "ok"
    assert (await store.cancel(other.job_id, ""))[0] == "cancelled"
    assert worker.renew(claim, 0.2) == "cancelled"
    assert complete(worker, settings, claim) is None
    assert (await store.read(one.job_id, "")).status is JobStatus.CANCELLED


async def test_a_job_is_never_both_cancelled_and_completed(store, worker, settings):
    """A hundred races of a cancel with the end of the work: both callers are told the same end."""
    ends = set()
    for number in range(100):
        job = manifest(settings, f"race {number}")
        await store.submit(job)
        claim = worker.claim()
        finish = asyncio.create_task(asyncio.to_thread(complete, worker, settings, claim))
        if number % 2:
            await asyncio.sleep(0)
        else:
            await store.read(job.job_id, "")  # one round trip later
        cancelled, *_ = await store.cancel(job.job_id, "")
        completed = await finish
        status = (await store.read(job.job_id, "")).status
        if cancelled == "cancelled":
            assert (completed, status) == (None, JobStatus.CANCELLED)
        else:
            assert (cancelled, completed) == ("finished", [job.job_id])
            assert status is JobStatus.COMPLETED
        ends.add(status)
    assert len(ends) == 2, "both won at times"


async def test_a_cancelled_job_in_the_queue_never_runs(store, worker, settings):
    job = manifest(settings)
    await store.submit(job)
    await store.cancel(job.job_id, "")
    assert worker.claim() is None
    assert (await store.submit(manifest(settings))).outcome == "new", "it can be submitted again"


async def test_a_failure_stays_with_the_job_that_had_it(store, worker, settings):
    """A later run of the same file doesn't change what an earlier caller was told."""
    first = manifest(settings)
    await store.submit(first)
    worker.fail(worker.claim(), UnreadableMedia())
    second = manifest(settings)
    assert (await store.submit(second)).outcome == "new"
    complete(worker, settings, worker.claim())
    told = await store.read(first.job_id, "")
    assert (told.status, told.duration) == (JobStatus.FAILED, None)
    assert told.started_at <= told.finished_at
    done = await store.read(second.job_id, "")
    assert (done.status, done.duration) == (JobStatus.COMPLETED, 1.5)


async def test_erasing_takes_the_transcript_with_the_last_job(store, worker, settings, raw):
    """Deleting erases what nobody else holds."""
    one, other = manifest(settings), manifest(settings)
    await store.submit(one)
    assert (await store.erase(one.job_id, ""))[0] == "unfinished"
    complete(worker, settings, worker.claim())
    await store.submit(other)
    assert (await store.erase(one.job_id, ""))[0] == "erased"
    with pytest.raises(JobNotFound):
        await store.read(one.job_id, "")
    assert await store.transcript(await store.read(other.job_id, "")) == TRANSCRIPT
    assert (await store.erase(other.job_id, ""))[0] == "erased"
    assert not raw.exists(keys.transcript(one.fingerprint))
    assert raw.hget(keys.COUNTERS, "transcript_bytes") == "0"
    assert (await store.erase(other.job_id, ""))[0] == "unknown"


async def test_a_job_that_is_only_known_as_expired_holds_no_transcript(
    store, worker, settings, raw
):
    """Else what was erased would be there for the next upload of the file."""
    expired, last = manifest(settings), manifest(settings)
    await store.submit(expired)
    complete(worker, settings, worker.claim())
    assert (await store.submit(last)).outcome == "hit"
    raw.hset(keys.job(expired.job_id), "expires_ms", 1)
    assert (await store.erase(last.job_id, ""))[0] == "erased"
    assert not raw.exists(keys.transcript(last.fingerprint))
    assert (await store.submit(manifest(settings))).outcome == "new"


async def test_a_cancel_whose_answer_is_lost_is_one_cancel(settings, store):
    """The client of Redis sends it again. DELETE would go on and erase what it cancelled itself."""
    job = manifest(settings)
    await store.submit(job)
    async with losing_answers(settings) as (cut_off, lose):
        other = JobStore(cut_off, celery_app(cut_off.redis_url.get_secret_value()))
        await other.cancel(str(uuid4()), "")  # the script is there
        lose.set()
        assert (await other.cancel(job.job_id, ""))[0] == "cancelled"
        assert not lose.is_set(), "the answer was lost"
        await other.close()
    assert (await store.cancel(job.job_id, ""))[0] == "finished", "by another call it is"


@asynccontextmanager
async def losing_answers(settings: Settings) -> AsyncIterator[tuple[Settings, asyncio.Event]]:
    """A way to Redis on which the answer to the next script is lost with its connection, once the
    event is set; which is clear again then."""
    lose = asyncio.Event()
    port = urlsplit(settings.redis_url.get_secret_value()).port

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_redis, to_redis = await asyncio.open_connection("127.0.0.1", port)
        asked = b""

        async def ask() -> None:
            nonlocal asked
            while asked := await reader.read(65536):
                to_redis.write(asked)
            to_redis.close()

        async def answer() -> None:
            while answered := await from_redis.read(65536):
                if lose.is_set() and b"EVALSHA" in asked:
                    lose.clear()
                    break
                writer.write(answered)
            writer.close()

        await asyncio.gather(ask(), answer())

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        yield settings.model_copy(update={"redis_url": SecretStr(url)}), lose


async def test_an_expired_job_is_known_as_expired(store, worker, settings, raw):
    """410 and not 404, for a grace time; and every record of a finished job has a lifetime."""
    job = manifest(settings)
    await store.submit(job)
    complete(worker, settings, worker.claim())
    for key in (keys.job, keys.transcription, keys.holders, keys.transcript):
        name = job.job_id if key is keys.job else job.fingerprint
        assert 0 < raw.pttl(key(name)) <= settings.retention_ms + settings.grace_ms
    raw.hset(keys.job(job.job_id), "expires_ms", 1)
    with pytest.raises(JobExpired):
        await store.read(job.job_id, "")


async def test_unfinished_work_has_no_lifetime(store, worker, settings, raw):
    """However long a queue stands still, what was accepted stays."""
    job = manifest(settings)
    await store.submit(job)
    assert raw.pttl(keys.job(job.job_id)) == raw.pttl(keys.transcription(job.fingerprint)) == -1
    worker.claim()
    assert raw.pttl(keys.job(job.job_id)) == raw.pttl(keys.transcription(job.fingerprint)) == -1


async def test_a_job_keeps_what_it_was_told_to_its_end(store, worker, settings, raw):
    """However its transcription goes, and although it is part of no fingerprint."""
    told = JobOptions(metadata={"order": 17, "name": "Müller\0"}, priority=Priority.HIGH)
    one, other = manifest(settings, job=told), manifest(settings)
    await store.submit(one)
    assert (await store.submit(other)).outcome == "joined"
    for _ in range(2):
        assert (await store.read(one.job_id, "")).options == told
        assert (await store.read(other.job_id, "")).options == JobOptions()
        if claim := worker.claim():
            complete(worker, settings, claim)
    assert (await store.cancel(one.job_id, ""))[1] == JobOptions(), "it had ended"
    assert await store.erase(one.job_id, "") == ("erased", told)


async def test_a_job_that_the_store_has_lost_comes_back_as_it_was(store, worker, settings, raw):
    """From its manifest alone, whatever its age: older ones know nothing of a job's options."""
    told = JobOptions(metadata={"a": [1, None, "ü"]}, priority=Priority.LOW)
    lost, storage = manifest(settings, job=told), Storage(settings.data_dir)
    storage.begin(lost.job_id).write_bytes(b"audio")
    storage.keep(lost)
    assert worker.resubmit(storage.manifest(lost.job_id)) == "new"
    assert (await store.read(lost.job_id, "")).options == told
    path = storage.folder(lost.job_id) / "manifest.json"
    fields = json.loads(path.read_bytes())
    del fields["job_options"]
    path.write_text(json.dumps(fields))
    raw.flushall()
    assert worker.resubmit(storage.manifest(lost.job_id)) == "new"
    assert (await store.read(lost.job_id, "")).options == JobOptions()


async def test_the_transcripts_stay_within_their_budget(store, worker, settings, raw):
    """The oldest go first, and their jobs say so."""
    jobs = [manifest(settings, name) for name in "abc"]
    for number, job in enumerate(jobs):
        await store.submit(job)
        complete(worker, settings, worker.claim())
        raw.zadd(keys.TRANSCRIPTS, {job.fingerprint: 4e12 + number})
    assert worker.evict(10**9) == 0
    assert worker.evict(len(TRANSCRIPT) * 2) == 1
    with pytest.raises(JobExpired):
        await store.read(jobs[0].job_id, "")
    assert (await store.read(jobs[2].job_id, "")).status is JobStatus.COMPLETED
    assert raw.hget(keys.COUNTERS, "transcript_bytes") == str(len(TRANSCRIPT) * 2)


async def test_submitting_the_same_job_id_twice_changes_nothing(store, worker, settings):
    """Manifests can be resubmitted any number of times, by any number of reapers."""
    job = manifest(settings)
    await store.submit(job)
    assert worker.resubmit(job) == "exists"
    complete(worker, settings, worker.claim())
    assert worker.resubmit(job) == "exists"
    assert worker.claim() is None


async def test_the_snapshot_counts_what_happened(store, worker, settings):
    """/stats and the metrics read these."""
    for content in ("a", "a", "b", "c"):
        await store.submit(manifest(settings, content))
    complete(worker, settings, worker.claim())
    worker.fail(worker.claim(), UnreadableMedia())
    worker.report({"id": "worker-1", "slots": 2, "warm": True, "heartbeat_at": 1.0}, 10)
    seen = await store.snapshot()
    assert (seen.queued, seen.processing, seen.warm_workers) == (1, 0, 1)
    assert 0 <= seen.oldest_queued_seconds < 60
    wanted = {"jobs_submitted": 4, "jobs_completed": 2, "jobs_failed": 1, "submit_joined": 1}
    assert wanted.items() <= dict(seen.counters).items()
    worker.retire()
    assert (await store.snapshot()).workers == ()


async def test_the_snapshot_says_how_full_the_server_is(store, raw):
    """For the alert that comes before jobs are refused."""
    assert (await store.snapshot()).memory_max_bytes == 0
    raw.config_set("maxmemory", "300mb")
    try:
        seen = await store.snapshot()
    finally:
        raw.config_set("maxmemory", 0)
    assert seen.memory_max_bytes == 300 * 1024 * 1024
    assert 0 < seen.memory_used_bytes < seen.memory_max_bytes


async def test_scripts_come_back_after_the_server_forgot_them(store, worker, settings, raw):
    """A restarted Redis has no scripts; nobody notices."""
    await store.submit(manifest(settings, "a"))
    raw.script_flush()
    await store.submit(manifest(settings, "b"))
    raw.script_flush()
    assert worker.claim() is not None


async def test_every_script_runs_without_flags_too(settings, raw):
    """Redis 6.2 knows no `#!lua` line; the scripts themselves use nothing newer."""
    for verb in ("reap", "claim", "evict"):
        text = source(verb, has_flags=False)
        assert not text.startswith("#!")
        raw.eval(text, 0, *["1", "2", "3", "4", "5", "6"])


async def test_work_that_is_done_can_be_saved_above_maxmemory(store, worker, settings, raw):
    """A full store refuses new jobs, never the end of a running one."""
    job = manifest(settings)
    await store.submit(job)
    claim = worker.claim()
    before = raw.config_get("maxmemory")["maxmemory"]
    raw.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreFull):
            await store.admit()
        with pytest.raises(StoreUnavailable):
            await store.submit(manifest(settings, "b"))
        assert worker.renew(claim, 0.5) == "ok"
        assert complete(worker, settings, claim) == [job.job_id]
    finally:
        raw.config_set("maxmemory", before)


async def test_a_server_that_can_not_write_still_tells_of_jobs(store, worker, settings, raw):
    """As with a full disk, or above its memory: who polls is not disturbed."""
    job = manifest(settings)
    await store.submit(job)
    for name, value, before in (("min-replicas-to-write", 1, 0), ("maxmemory", 1, 0)):
        raw.config_set(name, value)
        try:
            assert (await store.read(job.job_id, "")).status is JobStatus.QUEUED
            with pytest.raises(StoreUnavailable):
                await store.submit(manifest(settings, "another"))
        finally:
            raw.config_set(name, before)


async def test_a_store_that_is_away_is_an_error_of_ours(settings):
    """No answer, no exception of a library: StoreUnavailable, with a time to come back."""
    away = replace_url(settings, f"redis://127.0.0.1:{free_port()}/0")
    store = JobStore(away, celery_app("redis://127.0.0.1:1/0"))
    for call in (
        store.admit(),
        store.read(str(uuid4()), ""),
        store.snapshot(),
        store.cancel("x", ""),
    ):
        with pytest.raises(StoreUnavailable) as caught:
            await call
        assert caught.value.retry_after_seconds
    await store.close()


def replace_url(settings: Settings, url: str) -> Settings:
    return Settings(_env_file=None, redis_url=url, data_dir=settings.data_dir, model_size="demo")


def test_a_doorbell_looks_like_celerys_own_message(settings, raw):
    """kombu can read what we push, because it is what Celery itself would have pushed."""
    app = celery_app(settings.redis_url.get_secret_value())
    app.send_task(TASK_NAME, args=("hint",), ignore_result=True)
    theirs = json.loads(raw.lpop(QUEUE_NAME))
    ours = json.loads(doorbell(app, "hint"))
    app.close()
    assert shape(ours) == shape(theirs)
    assert ours["body"] == theirs["body"]
    assert ours["properties"]["delivery_info"] == theirs["properties"]["delivery_info"]


def shape(value):
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return type(value).__name__
