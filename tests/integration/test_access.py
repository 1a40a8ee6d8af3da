"""What an API key may use, on a real server: limits hold to the number whoever counts, and a job is
there for its owner alone."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from datetime import UTC, datetime
from uuid import uuid4

import pytest
import pytest_asyncio
import redis

from api.key_store import ApiKey, KeyStore, Scope, make
from api.store import Limits, connect
from shared import keys
from shared.errors import AudioMinutesUsed, JobNotFound, TooManyJobs
from shared.jobs import JobStatus
from shared.settings import Settings
from shared.storage import Manifest
from tests.conftest import wait_until
from worker.store import WorkerStore

TRANSCRIPT = b'{"text":"hello"}'
PLAIN_MINUTE = 60 * 32_000  # bytes of a minute of plain speech
DAY_MS = 86_400_000


def manifest(owner: str, content: str = "", size_bytes: int = 1000) -> Manifest:
    content = content or str(uuid4())
    return Manifest(str(uuid4()), f"fp-{content}", content, "{}", "demo", size_bytes, owner)


def key_of(name: str = "app", *scopes: Scope, **limits: int) -> tuple[ApiKey, str]:
    return make(name, frozenset(scopes or (Scope.SUBMIT, Scope.READ)), Limits(**limits))


@pytest_asyncio.fixture
async def ring(settings: Settings, raw: redis.Redis):
    """The keys, as an API process has them."""
    store = KeyStore(connect(settings))
    yield store
    await store.close()


def run(worker: WorkerStore, seconds: float) -> None:
    claim = worker.claim()
    assert claim
    assert worker.complete(claim, TRANSCRIPT, "demo", seconds) is not None


def unfinished(raw: redis.Redis, name: str = "app") -> tuple[int, int]:
    """(jobs, milliseconds of audio that are held for them)"""
    return raw.hlen(keys.unfinished(name)), int(raw.get(keys.held(name)) or 0)


# --- Keys -----------------------------------------------------------------------------------------


async def test_a_key_opens_until_it_is_revoked_and_only_whole(ring, settings):
    """Another process believes what it saw for a second at most."""
    key, text = key_of("app", Scope.ADMIN, requests=5, period_ms=1000, jobs=2, audio_minutes=9)
    await ring.add(key)
    assert await ring.holder(text) == key
    assert await ring.all() == [key]
    _, other_text = key_of("app")
    assert await ring.holder(other_text) is None, "it was never added"
    wrong = text[:-1] + ("A" if text[-1] != "A" else "B")
    mixed = text[:16] + other_text[16:]
    for shown in (
        "",
        "x",
        wrong,
        mixed,
        text[:-1],
        text + "A",
        f" {text}",
        f"{text}\n",
        key.digest,
    ):
        assert await ring.holder(shown) is None, shown

    elsewhere = KeyStore(connect(settings))
    assert await elsewhere.revoke(key.key_id) == key
    assert await elsewhere.revoke(key.key_id) is None
    assert await elsewhere.holder(text) is None
    await elsewhere.close()
    began = time.monotonic()
    while await ring.holder(text) is not None:
        assert time.monotonic() - began < 20
        await asyncio.sleep(0.05)
    assert await ring.all() == []


async def test_redis_never_holds_a_key(ring, raw):
    """Whoever reads all of Redis can't use what is there as a key."""
    key, text = key_of()
    await ring.add(key)
    everything = " ".join(
        str(raw.hgetall(name) if raw.type(name) == "hash" else raw.smembers(name))
        for name in raw.keys("*")
    )
    assert key.key_id in everything
    assert text not in everything
    assert text.split("_", 2)[2] not in everything
    assert await ring.holder(key.digest) is None


# --- Requests -------------------------------------------------------------------------------------


def ask_often(url: str, times: int, allowed: multiprocessing.SimpleQueue) -> None:
    """One API process among several, with its own connections."""

    async def ask() -> int:
        ring = KeyStore(connect(Settings(_env_file=None, redis_url=url)))
        key, _ = key_of(requests=100, period_ms=DAY_MS)
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ring.meter(key, submits=False)) for _ in range(times)]
        await ring.close()
        return sum(task.result()[0] == "none" for task in asked)

    allowed.put(asyncio.run(ask()))


async def test_four_processes_allow_exactly_as_many_requests_as_one(settings, raw):
    """4 times 400 requests at once, of which 100 are allowed: not 99, not 101."""
    context = multiprocessing.get_context("spawn")
    allowed = context.SimpleQueue()
    url = settings.redis_url.get_secret_value()
    processes = [context.Process(target=ask_often, args=(url, 400, allowed)) for _ in range(4)]
    for process in processes:
        process.start()
    await asyncio.to_thread(lambda: [process.join(60) for process in processes])
    assert sum(allowed.get() for _ in processes) == 100
    assert raw.exists(keys.rate("app"))


async def test_a_request_after_the_time_that_was_told_is_allowed_and_not_before(ring, raw):
    """`raw` bends time: what is stored is moved back by what passed."""
    key, _ = key_of(requests=10, period_ms=3_600_000)
    for _ in range(10):
        assert await ring.meter(key, submits=False) == ("none", None)
    limit, seconds = await ring.meter(key, submits=False)
    assert limit == "rate"
    assert 355 <= seconds <= 360

    def pass_time(seconds: float) -> None:
        raw.incrby(keys.rate("app"), -int(seconds * 1e6))

    pass_time(seconds - 10)
    assert (await ring.meter(key, submits=False))[0] == "rate"
    pass_time(10)
    assert (await ring.meter(key, submits=False))[0] == "none"
    assert (await ring.meter(key, submits=False))[0] == "rate", "one came free, not more"
    pass_time(7200)
    assert [(await ring.meter(key, submits=False))[0] for _ in range(11)] == ["none"] * 10 + [
        "rate"
    ]
    assert 0 < raw.pttl(keys.rate("app")) <= 3_600_000, "it goes by itself"


async def test_a_clock_that_was_set_back_refuses_nobody_for_longer_than_a_period(ring, raw):
    """Nor does another key of the same name that may ask less often."""
    slow, _ = key_of(requests=1, period_ms=86_400_000)
    quick, _ = key_of(requests=100, period_ms=1000)
    assert (await ring.meter(slow, submits=False))[0] == "none"
    limit, seconds = await ring.meter(quick, submits=False)
    assert (limit, seconds <= 1) == ("rate", True)
    raw.set(keys.rate("app"), (int(time.time()) + 3600) * 1_000_000)
    limit, seconds = await ring.meter(quick, submits=False)
    assert (limit, seconds <= 1) == ("rate", True)


async def test_a_refused_request_costs_nothing_and_others_are_not_refused(ring, raw):
    key, _ = key_of(requests=1, period_ms=60_000)
    other, _ = key_of("other", requests=1, period_ms=60_000)
    assert (await ring.meter(key, submits=False))[0] == "none"
    first = (await ring.meter(key, submits=False))[1]
    for _ in range(20):
        assert (await ring.meter(key, submits=False))[1] <= first
    assert (await ring.meter(other, submits=False))[0] == "none"


# --- Jobs -----------------------------------------------------------------------------------------


async def test_as_many_jobs_are_unfinished_as_allowed_however_many_come_at_once(ring, store, raw):
    key, _ = key_of(jobs=3)

    async def submit() -> bool:
        try:
            return bool(await store.submit(manifest("app"), limits=key.limits))
        except TooManyJobs:
            return False

    done = await asyncio.gather(*(submit() for _ in range(30)))
    assert done.count(True) == 3
    assert unfinished(raw)[0] == 3
    assert await ring.meter(key, submits=True) == ("jobs", None), "told before the body, too"
    assert await ring.meter(key, submits=False) == ("none", None), "asking goes on"
    other = await store.submit(manifest("other"), limits=key.limits)
    assert other.outcome == "new"


async def test_whatever_ends_a_job_makes_room_for_the_next(store, worker, raw, settings):
    limits = Limits(jobs=1)

    async def accepted(job: Manifest) -> Manifest:
        assert await store.submit(job, limits=limits)
        with pytest.raises(TooManyJobs):
            await store.submit(manifest("app"), limits=limits)
        return job

    await accepted(manifest("app", "done"))
    run(worker, 1.0)
    job = await accepted(manifest("app"))
    assert (await store.cancel(job.job_id, "app"))[0] == "cancelled"
    await accepted(manifest("app"))
    worker.fail(worker.claim(), AudioMinutesUsed())
    job = await accepted(manifest("app"))
    for _ in range(settings.max_attempts):
        claim = worker.claim()
        raw.zadd(keys.LEASES, {claim.fingerprint: 1})
        worker.reap()
    assert (await store.read(job.job_id, "app")).error_code == "worker_lost"
    assert unfinished(raw) == (0, 0)
    assert not raw.exists(keys.unfinished("app"), keys.held("app"))
    await accepted(manifest("app"))
    hit = await store.submit(manifest("app", "done"), limits=limits)
    assert hit.outcome == "hit", "what is known takes no place"


async def test_a_rebuilt_store_knows_whose_jobs_they_are(store, worker, raw):
    """After FLUSHALL the manifest is all that is left."""
    job = manifest("app", size_bytes=PLAIN_MINUTE)
    await store.submit(job)
    raw.flushall()
    assert worker.resubmit(job) == "new"
    with pytest.raises(JobNotFound):
        await store.read(job.job_id, "other")
    assert (await store.read(job.job_id, "app")).status is JobStatus.QUEUED
    assert unfinished(raw) == (1, 60_000)


# --- Audio ----------------------------------------------------------------------------------------


async def test_minutes_of_audio_are_counted_once_and_held_before_they_are_known(
    ring, store, worker, raw
):
    key, _ = key_of(audio_minutes=10)
    first = manifest("app", "first", 4 * PLAIN_MINUTE)
    await store.submit(first, limits=key.limits)
    await store.submit(manifest("app", "first", 4 * PLAIN_MINUTE), limits=key.limits)
    assert unfinished(raw) == (2, 8 * 60_000)
    await store.submit(manifest("app", "second", 4 * PLAIN_MINUTE), limits=key.limits)
    assert await ring.meter(key, submits=True) == ("audio", None), "12 of 10 are held"
    with pytest.raises(AudioMinutesUsed):
        await store.submit(manifest("app"), limits=key.limits)
    run(worker, 90.0)
    assert int(raw.get(keys.audio_used("app"))) == 90_000, "two jobs, one transcription"
    assert unfinished(raw) == (1, 4 * 60_000)
    run(worker, 600.0)
    hit = await store.submit(manifest("app", "first"), limits=key.limits)
    assert hit.outcome == "hit", "what is known costs nothing"
    assert int(raw.get(keys.audio_used("app"))) == 690_000

    limit, seconds = await ring.meter(key, submits=True)
    now = datetime.now(UTC)
    midnight = 86_400 - (now.hour * 3600 + now.minute * 60 + now.second)
    assert limit == "audio"
    assert abs(seconds - midnight) <= 2
    with pytest.raises(AudioMinutesUsed) as refused:
        await store.submit(manifest("app"), limits=key.limits)
    assert abs(refused.value.retry_after_seconds - midnight) <= 2
    assert abs(raw.ttl(keys.audio_used("app")) - midnight) <= 2

    raw.pexpire(keys.audio_used("app"), 1)  # it is midnight
    wait_until(lambda: not raw.exists(keys.audio_used("app")), 5)
    assert await ring.meter(key, submits=True) == ("none", None)


async def test_a_cancelled_long_recording_is_charged_for_what_could_be_read(store, worker, raw):
    job = manifest("app")
    await store.submit(job)
    worker.split(worker.claim(), '{"duration": 600.0}', [0.25, 0.75])
    worker.finish_part(worker.claim(), '{"segments": []}')
    await store.cancel(job.job_id, "app")
    assert int(raw.get(keys.audio_used("app"))) == 150_000


async def test_who_gives_up_some_of_its_jobs_of_a_recording_pays_for_it_once(store, worker, raw):
    jobs = [manifest("app", "long") for _ in range(3)]
    for job in jobs:
        await store.submit(job)
    worker.split(worker.claim(), '{"duration": 600.0}', [0.5, 0.5])
    worker.finish_part(worker.claim(), '{"segments": []}')
    for job in jobs[:2]:
        await store.cancel(job.job_id, "app")
    worker.finish_part(worker.claim(), '{"segments": []}')
    run(worker, 600.0)
    assert raw.get(keys.audio_used("app")) == "600000"


async def test_what_fails_or_is_cancelled_is_not_charged(store, worker, raw):
    job = manifest("app", size_bytes=PLAIN_MINUTE)
    await store.submit(job)
    await store.cancel(job.job_id, "app")
    await store.submit(manifest("app", size_bytes=PLAIN_MINUTE))
    worker.fail(worker.claim(), AudioMinutesUsed())
    assert not raw.exists(keys.audio_used("app"))
    assert unfinished(raw) == (0, 0)


async def test_each_owner_of_a_shared_transcription_pays_for_it(store, worker, raw):
    for owner in ("app", "other", "app", ""):
        await store.submit(manifest(owner, "same"))
    run(worker, 2.5)
    assert [raw.get(keys.audio_used(name)) for name in ("app", "other")] == ["2500", "2500"]
    assert not raw.exists(keys.audio_used(""))


# --- Owners ---------------------------------------------------------------------------------------


async def test_a_job_of_somebody_else_is_not_there(store, worker):
    job = manifest("app", "a")
    await store.submit(job)
    for name in ("other", "ap", "app2", "*"):
        with pytest.raises(JobNotFound):
            await store.read(job.job_id, name)
        assert (await store.cancel(job.job_id, name))[0] == "unknown"
        assert (await store.erase(job.job_id, name))[0] == "unknown"
    assert (await store.read(job.job_id, "")).status is JobStatus.QUEUED, "an admin sees it"
    run(worker, 1.0)
    assert (await store.erase(job.job_id, "other"))[0] == "unknown"
    assert (await store.cancel(job.job_id, "other"))[0] == "unknown"
    assert (await store.read(job.job_id, "app")).status is JobStatus.COMPLETED
    assert (await store.erase(job.job_id, "app"))[0] == "erased"


async def test_a_job_that_nobody_owns_is_for_those_who_see_all(store):
    """It was submitted before there were keys."""
    job = manifest("")
    await store.submit(job)
    with pytest.raises(JobNotFound):
        await store.read(job.job_id, "app")
    assert await store.read(job.job_id, "")
