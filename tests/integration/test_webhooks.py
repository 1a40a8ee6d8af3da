"""Webhooks on a real store, to real receivers on loopback: told once where it can be helped, again
where it can't, and never lost."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from uuid import uuid4

import pytest
import pytest_asyncio
from openai import OpenAI
from prometheus_client import CollectorRegistry
from standardwebhooks import Webhook

from api import sender as sending
from api.deliveries import DeliveryStore, Outcome
from api.egress import Egress
from api.sender import Sender, retry_after_seconds, verdict
from api.signing import Signer, signer
from api.store import JobStore, connect
from local.ports import free_port
from shared import keys
from shared.destinations import Destinations
from shared.errors import (
    JobNotFound,
    ResultNotReady,
    StoreUnavailable,
    UnreadableMedia,
    WebhookNotFound,
)
from shared.job_options import JobOptions
from shared.metrics import ApiMetrics
from shared.schemas import JobWebhook
from shared.settings import Settings
from shared.storage import Manifest
from tests.receiver import Canary, Receiver, Reply
from worker.store import WorkerStore

TRANSCRIPT = b'{"text":"hello"}'


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Senders look more often than twice a second."""
    monkeypatch.setattr(sending, "POLL_SECONDS", 0.05)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Some tenths of a second for what takes a day."""
    return settings.model_copy(
        update={"webhook_retry_seconds": "0.05,0.1", "webhook_timeout_seconds": 1.0}
    )


@pytest_asyncio.fixture
async def deliveries(settings: Settings):
    store = DeliveryStore(settings, connect(settings))
    yield store
    await store.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def signs(settings: Settings) -> Signer:
    return signer(settings)


@asynccontextmanager
async def senders(settings: Settings, number: int = 1) -> AsyncIterator[list[Sender]]:
    """So many API processes' senders, on the same store."""
    egress = Egress(Destinations("127.0.0.1"))
    stores = [DeliveryStore(settings, connect(settings)) for _ in range(number)]
    made = [
        Sender(settings, store, egress, signer(settings), ApiMetrics(CollectorRegistry()))
        for store in stores
    ]
    for each in made:
        each.start()
    try:
        yield made
    finally:
        for each, store in zip(made, stores, strict=True):
            await each.stop()
            await store.close()
        egress.close()


def manifest(url: str, content: str = "", owner: str = "", **job: object) -> Manifest:
    content = content or str(uuid4())
    options = JobOptions(webhook_url=url, **job).record()
    return Manifest(
        str(uuid4()), f"fp-{content}", content, "{}", "demo", 1000, owner, job_options=options
    )


async def end(store: JobStore, worker: WorkerStore, url: str, owner: str = "") -> str:
    """The id of a job that is completed, and has a webhook to tell."""
    job = manifest(url, owner=owner)
    await store.submit(job)
    complete(worker)
    return job.job_id


def complete(worker: WorkerStore) -> None:
    claim = worker.claim()
    assert claim
    assert worker.complete(claim, TRANSCRIPT, "demo", 1.5) is not None


async def eventually(
    deliveries: DeliveryStore, job_id: str, state: str, attempts: int, within: float = 20
) -> JobWebhook:
    """The delivery once it is in this state after so many attempts."""
    deadline = time.monotonic() + within
    while True:
        seen = await deliveries.read(job_id, "")
        if seen.state == state and len(seen.attempts) >= attempts:
            assert len(seen.attempts) == attempts, seen
            return seen
        assert time.monotonic() < deadline, seen
        await asyncio.sleep(0.02)


async def until(ask, within: float = 20) -> None:
    deadline = time.monotonic() + within
    while not ask():
        assert time.monotonic() < deadline, ask
        await asyncio.sleep(0.02)


# --- What is told ---------------------------------------------------------------------------------


async def test_every_end_of_a_job_is_told_once_signed_and_without_the_transcript(
    store, worker, deliveries, receiver, settings, signs
):
    """completed, failed, cancelled, and a job that was answered from the cache."""
    url, metadata = receiver.url("/hook?token=1"), {"order": 17}
    done, again = (manifest(url, "same", metadata=metadata) for _ in range(2))
    failed, cancelled = manifest(url), manifest(url)
    await store.submit(done)
    complete(worker)
    assert (await store.submit(again)).outcome == "hit"
    await store.submit(failed)
    worker.fail(worker.claim(), UnreadableMedia("It is damaged."))
    await store.submit(cancelled)
    await store.cancel(cancelled.job_id, "")
    async with senders(settings):
        for job in (done, again, failed, cancelled):
            seen = await eventually(deliveries, job.job_id, "delivered", 1)
            assert seen.attempts[0].status_code == 200
            assert (seen.attempts[0].error, seen.next_attempt_at) == (None, None)
    events = {}
    for request in receiver.received:
        Webhook(signs.secret_of("")).verify(request.body, request.headers)
        OpenAI(api_key="-", webhook_secret=signs.secret_of("")).webhooks.verify_signature(
            request.body, request.headers
        )
        assert (request.method, request.path) == ("POST", "/hook?token=1")
        assert request.headers["content-type"] == "application/json"
        assert b"hello" not in request.body
        event = json.loads(request.body)
        events[event["data"]["job_id"]] = event
        seen = await deliveries.read(event["data"]["job_id"], "")
        assert request.headers["webhook-id"] == seen.webhook_id
    assert len(receiver.received) == 4
    for job, status in [
        (done, "completed"),
        (again, "completed"),
        (failed, "failed"),
        (cancelled, "cancelled"),
    ]:
        event = events[job.job_id]
        assert event["type"] == f"transcription.{status}"
        assert event["data"]["status"] == status
        assert event["timestamp"] == event["data"]["finished_at"]
        assert event["data"]["links"]["result"] == f"/result/{job.job_id}"
    assert events[done.job_id]["data"]["metadata"] == metadata
    assert events[done.job_id]["data"]["error"] is None
    assert events[failed.job_id]["data"]["error"] == {
        "code": "unreadable_media",
        "message": "It is damaged.",
    }


async def test_each_owner_verifies_with_a_secret_of_its_own(
    store, worker, deliveries, receiver, settings, signs
):
    job_id = await end(store, worker, receiver.url(), "acme")
    async with senders(settings):
        await eventually(deliveries, job_id, "delivered", 1)
    request = receiver.received[0]
    Webhook(signs.secret_of("acme")).verify(request.body, request.headers)
    with pytest.raises(Exception, match="No matching signature"):
        Webhook(signs.secret_of("")).verify(request.body, request.headers)


async def test_a_job_without_a_webhook_has_no_delivery(store, worker, deliveries, raw):
    job_id = await end(store, worker, "")
    with pytest.raises(WebhookNotFound):
        await deliveries.read(job_id, "")
    assert not raw.exists(keys.UNDELIVERED, keys.RECEIVERS, keys.delivery(job_id))


# --- What an answer does --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error"), [(400, "status"), (401, "status"), (404, "status"), (410, "gone")]
)
async def test_most_of_4xx_ends_it(store, worker, deliveries, settings, status, error):
    with Receiver(Reply(status), Reply(200)) as receiver:
        job_id = await end(store, worker, receiver.url())
        async with senders(settings):
            seen = await eventually(deliveries, job_id, "failed", 1)
        assert (seen.attempts[0].status_code, seen.attempts[0].error) == (status, error)
        assert seen.next_attempt_at is None
        assert len(receiver.received) == 1


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 599, 302, 307])
async def test_what_may_pass_is_tried_again_under_the_same_id_with_the_same_body(
    store, worker, deliveries, settings, signs, status
):
    headers = {"Location": "/elsewhere"} if status < 400 else {}
    with Receiver(Reply(status, headers), Reply(204, body=b"")) as receiver:
        job_id = await end(store, worker, receiver.url())
        async with senders(settings):
            seen = await eventually(deliveries, job_id, "delivered", 2)
        assert [attempt.status_code for attempt in seen.attempts] == [status, 204]
        assert seen.attempts[0].error == ("redirect" if status < 400 else "status")
        first, second = receiver.received
        assert first.path == second.path, "a redirect is not followed"
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
        assert first.body == second.body
        for request in (first, second):
            Webhook(signs.secret_of("")).verify(request.body, request.headers)


async def test_a_receiver_that_is_down_is_told_when_it_is_back(store, worker, deliveries, settings):
    patient = settings.model_copy(update={"webhook_retry_seconds": ",".join(["0.1"] * 20)})
    port = free_port()
    job_id = await end(store, worker, f"http://127.0.0.1:{port}/hook")
    async with senders(patient):
        await eventually_tried(deliveries, job_id, 2)
        with Receiver(port=port) as receiver:
            await until(lambda: receiver.received)
            seen = await deliveries.read(job_id, "")
            while seen.state != "delivered":
                seen = await deliveries.read(job_id, "")
    assert [a.error for a in seen.attempts[:2]] == ["connection", "connection"]
    assert [a.status_code for a in seen.attempts][-1] == 200


async def eventually_tried(deliveries: DeliveryStore, job_id: str, attempts: int) -> JobWebhook:
    deadline = time.monotonic() + 10
    while True:
        seen = await deliveries.read(job_id, "")
        if len([a for a in seen.attempts if a.error != "interrupted"]) >= attempts:
            return seen
        assert time.monotonic() < deadline, seen
        await asyncio.sleep(0.02)


async def test_it_is_given_up_after_the_last_pause(store, worker, deliveries, settings):
    with Receiver(Reply(500)) as receiver:
        job_id = await end(store, worker, receiver.url())
        async with senders(settings) as (one,):
            seen = await eventually(deliveries, job_id, "failed", 3)
        assert [attempt.number for attempt in seen.attempts] == [1, 2, 3]
        assert len(receiver.received) == 3
    counted = one._metrics.webhooks
    assert [counted.labels(r)._value.get() for r in ("delivered", "retried", "failed")] == [0, 2, 1]


async def test_a_redirect_to_an_address_inside_is_not_followed(store, worker, deliveries, settings):
    with Canary() as canary:
        away = Reply(302, {"Location": f"http://127.0.0.1:{canary.port}/"})
        with Receiver(away) as receiver:
            job_id = await end(store, worker, receiver.url())
            async with senders(settings):
                await eventually(deliveries, job_id, "failed", 3)
        assert canary.accepted == 0


async def test_an_address_that_is_not_allowed_any_more_is_not_asked(
    store, worker, deliveries, settings
):
    """What was listed when the job was submitted, or resolved to something else then."""
    with Canary("127.0.0.2") as canary:
        job_id = await end(store, worker, f"http://127.0.0.2:{canary.port}/hook")
        async with senders(settings):
            seen = await eventually(deliveries, job_id, "failed", 3)
        assert {attempt.error for attempt in seen.attempts} == {"not_allowed"}
        assert canary.accepted == 0


async def test_an_answer_without_end_is_not_read_to_its_end(store, worker, deliveries, settings):
    with Receiver(Reply(200, body=b"x" * 50_000_000)) as receiver:
        job_id = await end(store, worker, receiver.url())
        async with senders(settings):
            await eventually(deliveries, job_id, "delivered", 1)
        assert receiver.answered == 0


@pytest.mark.parametrize(
    ("status", "tries", "asked", "state", "least", "most"),
    [
        (200, 1, 0, "delivered", 0, 0),
        (299, 1, 99, "delivered", 0, 0),
        (500, 1, 0, "pending", 4, 6),
        (None, 1, 0, "pending", 4, 6),
        (503, 1, 30, "pending", 30, 30),
        (503, 2, 30, "pending", 80, 120),
        (429, 1, 999_999, "pending", 100, 100),
        (500, 3, 0, "failed", 0, 0),
        (404, 1, 30, "failed", 0, 0),
    ],
)
def test_pauses_grow_vary_and_mind_what_the_receiver_asks_for(
    status, tries, asked, state, least, most
):
    found = [verdict(status, tries, (5.0, 100.0), asked) for _ in range(50)]
    assert {each for each, _ in found} == {state}
    assert all(least <= pause <= most for _, pause in found)
    if least < most:
        assert len({pause for _, pause in found}) > 10


def test_retry_after_is_seconds_or_a_date():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 98 <= retry_after_seconds(later) <= 100
    assert retry_after_seconds("17") == 17
    date = "Mon, 01 Jan 1990 00:00:00 GMT"
    absurd = (
        f"{date[:-3]}+{'9' * 14}",
        date.replace("1990", "9" * 25),
        date.replace("01", "9" * 25),
    )
    for other in ("", "soon", "-3", "1e9", "٣", "²", date, "9" * 400, *absurd):
        assert retry_after_seconds(other) in {0, 9_999_999_999}


def test_by_default_it_is_tried_ten_times_in_about_a_day():
    """And the job's record is there until then, however short results are kept."""
    pauses = sending.parse_pauses(Settings(_env_file=None).webhook_retry_seconds)
    assert len(pauses) + 1 == 10
    assert 20 * 3600 < sum(pauses) < 28 * 3600


async def test_the_record_outlives_the_next_try(store, worker, deliveries, settings, raw):
    short = settings.model_copy(
        update={"result_ttl_seconds": 1, "webhook_retry_seconds": "80000,80000"}
    )
    with Receiver(Reply(500)) as receiver:
        job_id = await end(store, worker, receiver.url())
        raw.pexpire(keys.job(job_id), 60_000)
        async with senders(short):
            seen = await eventually_tried(deliveries, job_id, 1)
    due = (seen.next_attempt_at - datetime.now(UTC)).total_seconds()
    assert 64_000 - 10 < due < 96_000
    for key in (keys.job(job_id), keys.delivery(job_id)):
        assert raw.ttl(key) > due + 3600


# --- Several senders ------------------------------------------------------------------------------


async def test_several_senders_tell_each_webhook_once(store, worker, deliveries, settings):
    """200 jobs, 5 receivers, 3 senders: nothing is told twice, and all is."""
    with ExitStack() as stack:
        receivers = [stack.enter_context(Receiver()) for _ in range(5)]
        jobs = [await end(store, worker, receivers[n % 5].url()) for n in range(200)]
        async with senders(settings, 3):
            for job_id in jobs:
                await eventually(deliveries, job_id, "delivered", 1, 30)
        ids = [r.headers["webhook-id"] for receiver in receivers for r in receiver.received]
    assert len(ids) == len(set(ids)) == 200


async def test_a_slow_receiver_delays_no_other_and_gets_only_so_many_at_once(
    store, worker, deliveries, settings
):
    patient = settings.model_copy(update={"webhook_timeout_seconds": 30.0})
    tested = threading.Event()
    with Receiver(Reply(after=tested.wait)) as slow, Receiver() as quick:
        for _ in range(50):
            await end(store, worker, slow.url())
        async with senders(patient):
            await until(lambda: len(slow.received) == sending.AT_A_TIME_TO_ONE)
            for _ in range(5):
                job_id = await end(store, worker, quick.url())
                await eventually(deliveries, job_id, "delivered", 1)
            assert len(slow.received) == sending.AT_A_TIME_TO_ONE
            tested.set()
            await until(lambda: len(slow.received) == 50)
    assert slow.most_at_once <= sending.AT_A_TIME_TO_ONE


async def test_a_receiver_that_does_not_answer_in_time_is_tried_again(
    store, worker, deliveries, settings
):
    quick = settings.model_copy(update={"webhook_timeout_seconds": 1.0})
    tested = threading.Event()
    with Receiver(Reply(after=tested.wait), Reply()) as receiver:
        job_id = await end(store, worker, receiver.url())
        async with senders(quick):
            seen = await eventually(deliveries, job_id, "delivered", 2)
        tested.set()
    assert (seen.attempts[0].error, seen.attempts[0].status_code) == ("timeout", None)
    assert seen.attempts[0].seconds >= 1


async def test_what_a_dead_sender_held_another_sends_when_its_lease_has_ended(
    store, worker, deliveries, settings, receiver, raw
):
    job_id = await end(store, worker, receiver.url())
    (held,) = await deliveries.claim(9, 3)
    assert await deliveries.claim(9, 3) == []
    seen = await deliveries.read(job_id, "")
    assert ([a.error for a in seen.attempts], seen.next_attempt_at) == (["interrupted"], None)
    async with senders(settings):
        lease_ends = raw.zscore(keys.deliveries(held.receiver), job_id)
        assert lease_ends > time.time() * 1000 + 5000
        assert receiver.received == []
        raw.zadd(keys.deliveries(held.receiver), {job_id: 1})
        raw.zadd(keys.RECEIVERS, {held.receiver: 1})
        seen = await eventually(deliveries, job_id, "delivered", 2)
    assert [attempt.error for attempt in seen.attempts] == ["interrupted", None]
    late = Outcome("failed", 500, "status", datetime.now(UTC), 1.0)
    assert not await deliveries.settle(held, late), "it writes nothing any more"
    assert not await deliveries.release(held)
    assert (await deliveries.read(job_id, "")).state == "delivered"


async def test_what_ended_while_the_clock_was_ahead_is_told_when_it_is_set_back(
    store, worker, deliveries, settings, receiver, raw
):
    job_id = await end(store, worker, receiver.url())
    ahead = (time.time() + 3600) * 1000
    for key in (keys.UNDELIVERED, keys.deliveries(receiver.url(""))):
        raw.zadd(key, {job_id: ahead})
    raw.zadd(keys.RECEIVERS, {receiver.url(""): ahead})
    async with senders(settings):
        await eventually(deliveries, job_id, "delivered", 1)
    assert len(receiver.received) == 1


async def test_a_delivery_whose_senders_die_is_given_up_like_any_other(
    store, worker, deliveries, raw, receiver
):
    job_id = await end(store, worker, receiver.url())
    for tries in range(1, 4):
        (held,) = await deliveries.claim(9, 3)
        assert held.tries == tries
        raw.zadd(keys.deliveries(held.receiver), {job_id: 1})
        raw.zadd(keys.RECEIVERS, {held.receiver: 1})
    assert await deliveries.claim(9, 3) == []
    assert (await deliveries.read(job_id, "")).state == "failed"
    assert not raw.exists(keys.UNDELIVERED, keys.RECEIVERS, keys.deliveries(held.receiver))


async def test_a_sender_that_stops_gives_back_what_it_has_not_told(
    store, worker, deliveries, settings, monkeypatch
):
    """Which costs no try, and another sends it at once."""
    monkeypatch.setattr(sending, "STOP_SECONDS", 0.1)
    patient = settings.model_copy(update={"webhook_timeout_seconds": 30.0})
    tested = threading.Event()
    with Receiver(Reply(after=tested.wait), Reply()) as receiver:
        job_id = await end(store, worker, receiver.url())
        async with senders(patient):
            await until(lambda: receiver.received)
        seen = await deliveries.read(job_id, "")
        assert (seen.state, seen.attempts) == ("pending", [])
        async with senders(patient):
            await eventually(deliveries, job_id, "delivered", 1)
        tested.set()


async def test_a_sender_stops_whatever_it_does_at_that_moment(settings):
    """Also where its call of Redis takes no cancellation, which is so on Python 3.11 for some steps
    after it was woken."""
    for steps in range(8):
        async with senders(settings) as (one,):
            await until(lambda one=one: one._wake._waiters)
            one._wake.set()
            for _ in range(steps):
                await asyncio.sleep(0)
            async with asyncio.timeout(5):
                await one.stop()


# --- Again, and away ------------------------------------------------------------------------------


async def test_a_webhook_is_told_again_when_its_caller_asks(
    store, worker, deliveries, settings, receiver
):
    receiver.replies = [Reply(404), Reply()]
    job_id = await end(store, worker, receiver.url(), "acme")
    async with senders(settings):
        await eventually(deliveries, job_id, "failed", 1)
        await deliveries.redeliver(job_id, "acme")
        await eventually(deliveries, job_id, "delivered", 2)
        await deliveries.redeliver(job_id, "")
        seen = await eventually(deliveries, job_id, "delivered", 3)
    assert [attempt.status_code for attempt in seen.attempts] == [404, 200, 200]
    assert len({request.headers["webhook-id"] for request in receiver.received}) == 1
    assert len({request.body for request in receiver.received}) == 1


async def test_while_it_is_being_told_asking_again_changes_nothing(
    store, worker, deliveries, receiver, raw
):
    job_id = await end(store, worker, receiver.url())
    (held,) = await deliveries.claim(9, 3)
    await deliveries.redeliver(job_id, "")
    assert await deliveries.claim(9, 3) == [], "nobody sends it a second time meanwhile"
    assert await deliveries.settle(held, Outcome("delivered", 200, None, datetime.now(UTC), 0.1))
    assert (await deliveries.read(job_id, "")).state == "delivered"


async def test_a_webhook_is_there_for_its_owner_alone(store, worker, deliveries, receiver):
    job_id = await end(store, worker, receiver.url(), "acme")
    for call in (deliveries.read, deliveries.redeliver):
        for other in ("globex", "acm"):
            with pytest.raises(JobNotFound):
                await call(job_id, other)
        with pytest.raises(JobNotFound):
            await call(str(uuid4()), "")
    assert (await deliveries.read(job_id, "acme")).receiver == receiver.url("")
    assert (await deliveries.read(job_id, "")).state == "pending"


async def test_an_unfinished_job_has_nothing_to_tell(store, deliveries, receiver):
    job = manifest(receiver.url("/secret"))
    await store.submit(job)
    with pytest.raises(ResultNotReady):
        await deliveries.redeliver(job.job_id, "")
    seen = await deliveries.read(job.job_id, "")
    assert (seen.state, seen.attempts, seen.next_attempt_at) == ("pending", [], None)
    assert "secret" not in seen.model_dump_json()


async def test_a_store_that_can_not_write_still_shows_deliveries_and_loses_none(
    store, worker, deliveries, settings, receiver, raw
):
    """As with a full disk. What was told and could not be noted is told again, in the end."""
    job_id = await end(store, worker, receiver.url())
    raw.config_set("min-replicas-to-write", 1)
    try:
        assert (await deliveries.read(job_id, "")).state == "pending"
        with pytest.raises(StoreUnavailable):
            await deliveries.claim(9, 3)
        async with senders(settings):
            raw.config_set("min-replicas-to-write", 0)
            await eventually(deliveries, job_id, "delivered", 1)
    finally:
        raw.config_set("min-replicas-to-write", 0)
    assert len(receiver.received) == 1


async def test_an_erased_job_is_not_told(store, worker, deliveries, settings, receiver, raw):
    job_id = await end(store, worker, receiver.url())
    await store.erase(job_id, "")
    assert not raw.exists(keys.UNDELIVERED, keys.RECEIVERS, keys.delivery(job_id))
    assert await deliveries.claim(9, 3) == []


async def test_what_has_expired_leaves_the_books(store, worker, deliveries, receiver, raw):
    """Not before its last try, unless someone deletes it by hand."""
    job_id = await end(store, worker, receiver.url())
    raw.delete(keys.job(job_id), keys.delivery(job_id))
    assert await deliveries.claim(9, 3) == []
    assert not raw.exists(keys.UNDELIVERED, keys.RECEIVERS)


async def test_only_the_latest_attempts_are_kept(store, worker, deliveries, receiver, monkeypatch):
    monkeypatch.setattr("api.deliveries.KEPT_ATTEMPTS", 3)
    job_id = await end(store, worker, receiver.url())
    for _ in range(5):
        (held,) = await deliveries.claim(9, 3)
        await deliveries.settle(held, Outcome("delivered", 200, None, datetime.now(UTC), 0.1))
        await deliveries.redeliver(job_id, "")
    seen = await deliveries.read(job_id, "")
    assert [attempt.number for attempt in seen.attempts] == [3, 4, 5]


async def test_receivers_take_turns(store, worker, deliveries):
    """A claim takes one delivery of each, the longest due first, but of those to be left alone."""
    for _ in range(3):
        for host in ("a", "b", "c"):
            await end(store, worker, f"https://{host}.example.org/hook")
    first = await deliveries.claim(2, 3)
    assert [each.receiver for each in first] == ["https://a.example.org", "https://b.example.org"]
    rest = await deliveries.claim(9, 3, ["https://a.example.org"])
    assert [each.receiver for each in rest] == ["https://c.example.org", "https://b.example.org"]
