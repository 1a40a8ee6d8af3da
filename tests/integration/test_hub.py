"""Waiting in one process: who waits hears of every change, at a cost that many can share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry
from redis.asyncio.connection import AbstractConnection
from uvicorn.protocols.http.flow_control import FlowControl

from api import hub as hub_module
from api import notices
from api.hub import Hub
from api.notices import lone_connection
from api.protocol import Connection
from api.store import JobStore
from shared import keys
from shared.errors import JobNotFound, StoreUnavailable, TooManyWaiters
from shared.jobs import Job, JobStatus
from shared.metrics import ApiMetrics
from shared.settings import Settings
from tests.integration.test_job_store import complete, end_lease, manifest

SOON = 8.0  # before a connection over which nothing comes is given up, which would help, too


@pytest.fixture
def metrics() -> ApiMetrics:
    return ApiMetrics(CollectorRegistry())


@pytest_asyncio.fixture
async def hub(store: JobStore, settings: Settings, metrics: ApiMetrics):
    hub = Hub(store, lambda: lone_connection(settings), settings.max_waiters, metrics.waiters)
    hub.start()
    yield hub
    await hub.close()


def connection() -> Connection:
    transport = asyncio.Transport()
    return Connection(transport, FlowControl(transport))


def watch(hub: Hub, job: Job, client: Connection | None = None, **how: bool):
    return hub.watch(job, "", "events", client or connection(), **how)


async def submitted(store: JobStore, settings: Settings, content: str = "a") -> Job:
    job = manifest(settings, content)
    await store.submit(job)
    return await store.read(job.job_id, "")


async def soon(so: Callable[[], bool], what: str = "") -> None:
    deadline = time.monotonic() + SOON
    while not so():
        assert time.monotonic() < deadline, f"not soon: {what}"
        await asyncio.sleep(0.01)


def reads(raw) -> int:
    """How many scripts Redis has run. Those that it had to be given first do not count twice."""
    asked = raw.info("commandstats").get("cmdstat_evalsha", {"calls": 0, "failed_calls": 0})
    return asked["calls"] - asked["failed_calls"]


async def quiet(raw) -> int:
    """Waits until no script was run for a while; returns how many were until then."""
    count, looks = reads(raw), 0
    while looks < 15:
        await asyncio.sleep(0.01)
        looks += 1
        if reads(raw) != count:
            count, looks = reads(raw), 0
    return count


def subscribers(raw, job: Job) -> int:
    return raw.pubsub_numsub(keys.changes(job.fingerprint))[0][1]


async def test_who_watches_sees_the_job_as_it_is_and_every_change(hub, store, worker, settings):
    """Until its end; then there is no more."""
    job = await submitted(store, settings)
    seen = []
    async with asyncio.timeout(SOON), watch(hub, job) as changes:
        async for now in changes:
            seen.append((now.status, now.progress))
            if now.status is JobStatus.QUEUED:
                claim = worker.claim()
            elif now.progress == 0:
                worker.renew(claim, 0.5)
            elif now.progress == 0.5:
                complete(worker, settings, claim)
        assert changes.is_over
        assert await changes.next() is None
    assert seen == [("queued", 0), ("processing", 0), ("processing", 0.5), ("completed", 1)]


async def test_an_end_between_the_read_and_the_listening_is_seen(hub, store, worker, settings):
    """Nobody hears the notice of it: what counts is the read that follows the listening."""
    job = await submitted(store, settings)
    claim = worker.claim()
    async with asyncio.timeout(SOON), watch(hub, job) as changes:
        complete(worker, settings, claim)  # the loop had no chance to subscribe
        assert (await changes.next()).status is JobStatus.COMPLETED


async def test_an_end_while_a_channel_is_left_and_taken_again_is_seen(
    hub, store, worker, settings, raw
):
    """Clients come and go; the channel of a transcription with them."""
    for number in range(40):
        job = await submitted(store, settings, f"file {number}")
        claim = worker.claim()
        for turn in range(number % 5):
            async with watch(hub, job):
                await asyncio.sleep(0.002 * turn)
        async with asyncio.timeout(SOON), watch(hub, job) as changes:
            await asyncio.sleep(0.001 * (number % 7))
            complete(worker, settings, claim)
            assert [now.status async for now in changes][-1] is JobStatus.COMPLETED


async def test_a_wait_that_ends_late_gives_what_is_then(hub, store, worker, settings):
    job = await submitted(store, settings)
    worker.claim()
    began = time.monotonic()
    now = await hub.until_ended(job.job_id, "", "status", connection(), 0.3)
    assert 0.3 <= time.monotonic() - began < SOON
    assert now.status is JobStatus.PROCESSING


async def test_a_wait_for_an_end_ends_with_it(hub, store, worker, settings):
    job = await submitted(store, settings)
    wait = asyncio.create_task(hub.until_ended(job.job_id, "", "status", connection(), 60))
    await soon(lambda: hub.count == 1)
    complete(worker, settings, worker.claim())
    assert (await asyncio.wait_for(wait, SOON)).status is JobStatus.COMPLETED
    again = await hub.until_ended(job.job_id, "", "status", connection(), 60)
    assert again.status is JobStatus.COMPLETED, "it does not wait for what has been"


async def test_a_thousand_who_wait_for_one_job_share_its_reads(hub, store, worker, settings, raw):
    """One channel, and a read or so for every hundred."""
    job = await submitted(store, settings)
    claim = worker.claim()
    waits = [
        asyncio.create_task(hub.until_ended(job.job_id, "", "status", connection(), 60))
        for _ in range(1000)
    ]
    await soon(lambda: hub.count == 1000)
    await soon(lambda: subscribers(raw, job) == 1)
    before = await quiet(raw)
    complete(worker, settings, claim)
    ended = await asyncio.wait_for(asyncio.gather(*waits), SOON)
    assert {now.status for now in ended} == {JobStatus.COMPLETED}
    assert subscribers(raw, job) == 1
    assert reads(raw) - before <= 1 + 1000 / hub_module.SLICE + 5


async def test_a_thousand_who_wait_for_a_job_each_share_round_trips(
    hub, store, worker, settings, raw
):
    jobs = [await submitted(store, settings, str(number)) for number in range(1000)]
    claims = [worker.claim() for _ in jobs]
    waits = [
        asyncio.create_task(hub.until_ended(job.job_id, "", "status", connection(), 60))
        for job in jobs
    ]
    await soon(lambda: hub.count == 1000)
    await soon(lambda: len(raw.pubsub_channels(keys.changes("*"))) == 1000)
    before = await quiet(raw)
    for claim in claims:  # the loop stands still meanwhile, as a busy one would
        complete(worker, settings, claim)
    ended = await asyncio.wait_for(asyncio.gather(*waits), SOON)
    assert [now.job_id for now in ended] == [job.job_id for job in jobs]
    assert {now.status for now in ended} == {JobStatus.COMPLETED}
    assert reads(raw) - before <= 1000 + 200, "the commits, and few more"


async def test_progress_wakes_nobody_who_waits_for_an_end(hub, store, worker, settings, raw):
    job = await submitted(store, settings)
    claim = worker.claim()
    wait = asyncio.create_task(hub.until_ended(job.job_id, "", "status", connection(), 60))
    async with asyncio.timeout(SOON), watch(hub, job) as changes:
        assert await changes.next()
        before = await quiet(raw)
        worker.renew(claim, 0.5)
        assert (await changes.next()).progress == 0.5, "that one was woken"
        assert reads(raw) - before == 2, "the renewal, and one read"
    complete(worker, settings, claim)
    assert (await asyncio.wait_for(wait, SOON)).status is JobStatus.COMPLETED


async def test_much_progress_is_told_seldom_and_the_latest_is(hub, store, worker, settings):
    """A recording on many workers makes it ten times a second, and thousands may watch."""
    job = await submitted(store, settings)
    claim = worker.claim()
    seen = []
    async with asyncio.timeout(SOON), watch(hub, job) as changes:
        began = time.monotonic()
        for number in range(1, 101):
            await asyncio.to_thread(worker.renew, claim, number / 100)
            await asyncio.sleep(0.005)
        while not seen or seen[-1] != 1.0:
            seen.append((await changes.next()).progress)
        most = (time.monotonic() - began) / hub_module.MOVED_SECONDS + 2
    assert len(seen) <= most
    assert seen == sorted(seen)


async def test_cancelling_one_of_two_jobs_ends_the_wait_for_that_one(
    hub, store, worker, settings, raw
):
    """The other goes on, and is not even woken."""
    one, other = await submitted(store, settings), await submitted(store, settings)
    assert one.fingerprint == other.fingerprint
    claim = worker.claim()
    waits = [
        asyncio.create_task(hub.until_ended(job.job_id, "", "status", connection(), 60))
        for job in (one, other)
    ]
    await soon(lambda: hub.count == 2)
    await soon(lambda: subscribers(raw, one) == 1)
    await store.cancel(str(uuid4()), "")  # loads the script
    before = await quiet(raw)
    await store.cancel(one.job_id, "")
    assert (await asyncio.wait_for(waits[0], SOON)).status is JobStatus.CANCELLED
    assert not waits[1].done()
    assert reads(raw) - before == 2, "the cancel, and one read"
    complete(worker, settings, claim)
    assert (await asyncio.wait_for(waits[1], SOON)).status is JobStatus.COMPLETED


async def test_who_leaves_is_forgotten_at_once(hub, store, settings, raw, metrics, monkeypatch):
    """Its wait ends, its place is free, and soon nobody listens for it."""
    monkeypatch.setattr(notices, "PING_SECONDS", 0.1)
    job = await submitted(store, settings)
    client = connection()
    async with asyncio.timeout(SOON), watch(hub, job, client) as changes:
        assert await changes.next()
        assert metrics.waiters.labels("events")._value.get() == 1
        waiting = asyncio.create_task(changes.next())
        await asyncio.sleep(0)
        assert client.on_lost
        client.on_lost()
        assert await waiting is None
        assert changes.is_over
    assert client.on_lost is None
    assert hub.count == metrics.waiters.labels("events")._value.get() == 0
    await soon(lambda: subscribers(raw, job) == 0, "the channel is left")


async def test_who_had_left_before_does_not_wait(hub, store, settings):
    job = await submitted(store, settings)
    client = connection()
    client.is_lost = True
    async with asyncio.timeout(SOON), watch(hub, job, client) as changes:
        assert await changes.next() is None


async def test_there_is_a_limit_and_who_leaves_makes_room(store, settings, metrics):
    hub = Hub(store, lambda: lone_connection(settings), 2, metrics.waiters)
    job = await submitted(store, settings)
    async with AsyncExitStack() as inside:
        await inside.enter_async_context(watch(hub, job))
        async with watch(hub, job):
            with pytest.raises(TooManyWaiters) as caught:
                await inside.enter_async_context(watch(hub, job))
            assert caught.value.retry_after_seconds
        await inside.enter_async_context(watch(hub, job))
    assert hub.count == 0


async def test_a_lost_connection_loses_no_end(hub, store, worker, settings, raw):
    """What happened before Redis was heard again is looked up."""
    jobs = [await submitted(store, settings, content) for content in "abc"]
    claims = [worker.claim() for _ in jobs]
    waits = [
        asyncio.create_task(hub.until_ended(job.job_id, "", "status", connection(), 60))
        for job in jobs
    ]
    await soon(lambda: len(raw.pubsub_channels(keys.changes("*"))) == 3)
    raw.client_kill_filter(_type="pubsub")
    for claim in claims:
        complete(worker, settings, claim)
    ended = await asyncio.wait_for(asyncio.gather(*waits), SOON)
    assert {now.status for now in ended} == {JobStatus.COMPLETED}


async def test_a_silent_redis_is_left_for_another_try(
    store, worker, settings, raw, metrics, monkeypatch
):
    """A connection over which nothing comes any more looks like one over which nothing is said."""
    monkeypatch.setattr(notices, "PING_SECONDS", 0.3)
    monkeypatch.setattr(notices, "SILENT_SECONDS", 1.0)
    hub = Hub(store, lambda: lone_connection(settings), 9, metrics.waiters)
    hub.start()
    job = await submitted(store, settings)
    claim = worker.claim()
    try:
        async with asyncio.timeout(SOON), watch(hub, job) as changes:
            assert await changes.next()
            (listener,) = (c for c in raw.client_list() if c["name"] == "whisper-api-notices")
            assert await changes.next(1.5) is None
            assert listener["id"] in {c["id"] for c in raw.client_list()}, "quiet is not silent"
            raw.client_pause(2500)
            complete_later = asyncio.create_task(
                asyncio.to_thread(complete, worker, settings, claim)
            )
            assert [now.status async for now in changes] == [JobStatus.COMPLETED]
            await complete_later
            names = [c["id"] for c in raw.client_list() if c["name"] == "whisper-api-notices"]
            assert listener["id"] not in names
    finally:
        await hub.close()


async def test_coming_and_going_is_no_silence(store, settings, raw, metrics, monkeypatch):
    """Who asks for the same job again and again makes nothing to be said to Redis."""
    monkeypatch.setattr(notices, "PING_SECONDS", 0.3)
    monkeypatch.setattr(notices, "SILENT_SECONDS", 1.0)
    hub = Hub(store, lambda: lone_connection(settings), 9, metrics.waiters)
    hub.start()
    job = await submitted(store, settings)

    def listeners() -> list[str]:
        return [c["id"] for c in raw.client_list() if c["name"] == "whisper-api-notices"]

    try:
        seen, deadline = set(), time.monotonic() + 2
        while time.monotonic() < deadline:
            async with watch(hub, job) as changes:
                assert await changes.next(), "it is heard"
                seen.update(listeners())
                await changes.next(0.02)
        assert len(seen) == 1
    finally:
        await hub.close()


def deaf(connection: AbstractConnection) -> AbstractConnection:
    """Its commands take a while and lose a cancellation meanwhile, as asyncio.wait_for can."""
    send = connection.send_command

    async def sending(*args: Any, **options: Any) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.1)
        await send(*args, **options)

    connection.send_command = sending
    return connection


async def test_a_cancellation_that_is_lost_stops_nothing(
    store, worker, settings, raw, metrics, monkeypatch
):
    """A connection that is gone is given up, and who waits hears on the next; a hub can close."""
    monkeypatch.setattr(notices, "PING_SECONDS", 0.05)

    hub = Hub(store, lambda: deaf(lone_connection(settings)), 9, metrics.waiters)
    hub.start()
    job = await submitted(store, settings)
    claim = worker.claim()
    async with asyncio.timeout(2 * SOON):
        async with watch(hub, job) as changes:
            assert await changes.next()
            raw.client_kill_filter(_type="pubsub")
            complete(worker, settings, claim)
            assert (await changes.next()).status is JobStatus.COMPLETED
        await hub.close()


async def test_a_read_that_fails_is_repeated(hub, store, worker, settings, monkeypatch):
    """An outage may begin between a notice and the read."""
    monkeypatch.setattr(hub_module, "AGAIN_SECONDS", 0.05)
    job = await submitted(store, settings)
    claim = worker.claim()
    read, failures = store.read, [StoreUnavailable(), StoreUnavailable()]

    async def failing(*args: str) -> Job:
        if failures:
            raise failures.pop()
        return await read(*args)

    monkeypatch.setattr(store, "read", failing)
    async with asyncio.timeout(SOON), watch(hub, job) as changes:
        assert (await changes.next()).status is JobStatus.PROCESSING
        assert failures == []
        complete(worker, settings, claim)
        assert (await changes.next()).status is JobStatus.COMPLETED


async def test_a_job_that_was_lost_with_its_redis_is_found_again(hub, store, worker, settings, raw):
    """Its manifest brings it back under the same id."""
    lost = manifest(settings)
    await store.submit(lost)
    job = await store.read(lost.job_id, "")
    async with asyncio.timeout(SOON), watch(hub, job) as changes:
        assert (await changes.next()).status is JobStatus.QUEUED
        raw.flushall()
        raw.publish(keys.changes(job.fingerprint), "moved")
        with pytest.raises(JobNotFound):
            await changes.next()
        assert worker.resubmit(lost) == "new"
        claim = worker.claim()
        assert (await changes.next()).status is JobStatus.PROCESSING
        complete(worker, settings, claim)
        assert (await changes.next()).status is JobStatus.COMPLETED


async def test_a_drain_ends_every_wait(hub, store, worker, settings):
    """With what is known then; whoever comes later does not wait either."""
    job = await submitted(store, settings)
    worker.claim()
    wait = asyncio.create_task(hub.until_ended(job.job_id, "", "status", connection(), 60))
    await soon(lambda: hub.count == 1)
    hub.drain()
    assert (await asyncio.wait_for(wait, SOON)).status is JobStatus.PROCESSING
    late = await asyncio.wait_for(hub.until_ended(job.job_id, "", "status", connection(), 60), SOON)
    assert late.status is JobStatus.PROCESSING


async def test_what_is_given_to_no_use_is_given_again(hub, store, settings, monkeypatch):
    monkeypatch.setattr(hub_module, "AGAIN_SECONDS", 0.05)
    job = await submitted(store, settings)
    async with asyncio.timeout(SOON), watch(hub, job) as changes:
        first = await changes.next()
        assert await changes.next(0.2) is None
        changes.repeat()
        assert await changes.next() == first


# --- Every step of a job's life is told -----------------------------------------------------------


@pytest.fixture
def told(raw):
    """What is told of a transcription from here on: `told(job)`, then `told()`, all since then."""
    channel = raw.pubsub(ignore_subscribe_messages=True)

    def tell(job: Job | None = None) -> list[str]:
        if job is not None:
            channel.subscribe(keys.changes(job.fingerprint))
            channel.get_message(timeout=1)
        found = []
        while message := channel.get_message(timeout=0.05):
            found.append(message["data"])
        return found

    yield tell
    channel.close()


async def test_a_step_is_told_and_a_bare_sign_of_life_is_not(store, worker, settings, told):
    job = await submitted(store, settings)
    told(job)
    claim = worker.claim()
    assert told() == ["moved"]
    worker.renew(claim, 0.0)
    assert told() == []
    worker.renew(claim, 0.25)
    assert told() == ["moved"]
    worker.renew(claim, 0.25)
    assert told() == []
    worker.hand_back(claim)
    assert told() == ["moved"]
    complete(worker, settings, worker.claim())
    assert told() == ["moved", "ended"]


async def test_a_lease_that_ended_is_told_and_so_is_the_last_one(
    store, worker, settings, raw, told
):
    job = await submitted(store, settings)
    for _ in range(settings.max_attempts):
        claim = worker.claim()
        end_lease(raw, claim)
        told(job)
        worker.reap()
    assert told() == ["ended"]


async def test_the_parts_of_a_recording_are_told_of_as_its_own_steps(store, worker, settings, told):
    job = await submitted(store, settings)
    whole = worker.claim()
    told(job)
    worker.split(whole, '{"duration":9}', [0.5, 0.5])
    assert told() == ["moved"]
    parts = [worker.claim(), worker.claim()]
    assert told() == [], "that a part is taken shows nowhere"
    worker.renew(parts[0], 1.0)
    assert told() == ["moved"]
    for part in parts:
        worker.finish_part(part, '{"segments":[]}')
        assert told() == ["moved"], "there is more to read, whatever the progress was"
    join = worker.claim()
    assert told() == ["moved"]
    worker.replan(join)
    assert told() == ["moved"]


async def test_the_end_of_one_job_of_two_is_told_of_that_one(store, worker, settings, told):
    one, other = await submitted(store, settings), await submitted(store, settings)
    told(one)
    await store.cancel(one.job_id, "")
    assert told() == [f"ended {one.job_id}"]
    await store.cancel(other.job_id, "")
    assert told() == ["ended"]


async def test_a_new_job_of_a_known_file_is_told_of_that_job(store, worker, settings, told):
    """Who waits for others has nothing to read."""
    job = await submitted(store, settings)
    told(job)
    joined = await submitted(store, settings)
    assert told() == [f"moved {joined.job_id}"]
    complete(worker, settings, worker.claim())
    told()
    hit = await submitted(store, settings)
    assert told() == [f"ended {hit.job_id}"]
