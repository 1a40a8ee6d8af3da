"""Waiting for a job without asking again and again: long polls and event streams of the running
service. A worker by hand makes each step happen when a test says so."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from itertools import count
from uuid import uuid4

import httpx2
import pytest

from api.events import HEARTBEAT_SECONDS, STALLED_SECONDS
from api.serve import GRACEFUL_SECONDS
from local.ports import free_port
from local.service import Service, answers
from shared import keys
from shared.errors import UnreadableMedia
from shared.storage import Storage
from tests.conftest import PLAIN, wait_until
from tests.e2e.conftest import QUICK, Client, metric, running
from tests.e2e.streams import ENDS, Event, Hand, Stream, segments
from tests.e2e.test_access import command, new_key

LONG_LEASE = {"lease_seconds": "600"}


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hand]:
    folder = tmp_path_factory.mktemp("waiting")
    with running(folder, {**QUICK, **LONG_LEASE}) as service:
        made = Hand(service, folder)
        yield made
        made.close()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hand]:
    """The same with two API processes."""
    folder = tmp_path_factory.mktemp("two-processes")
    with running(folder, {**QUICK, **LONG_LEASE, "workers": "2"}) as service:
        made = Hand(service, folder)
        yield made
        made.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hand]:
    """The same with API keys."""
    folder = tmp_path_factory.mktemp("guarded")
    with running(folder, {**QUICK, **LONG_LEASE, "auth": "keys"}) as service:
        made = Hand(service, folder)
        yield made
        made.close()


@pytest.fixture
def by_hand(start, tmp_path) -> Callable[..., Hand]:
    """Starts a service of the test's own, to break."""
    made: list[Hand] = []

    def begin(**environment: str) -> Hand:
        service, _ = start(**{**LONG_LEASE, **environment})
        made.append(Hand(service, tmp_path))
        return made[-1]

    yield begin
    for each in made:
        each.close()


@pytest.fixture
def later() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def ask(hand: Hand, job: str, tag: str = "", **query: str) -> httpx2.Response:
    headers = {"If-None-Match": tag} if tag else {}
    url = f"{hand.service.base_url}/status/{job}"
    return httpx2.get(url, params=query, headers=headers, timeout=70, **PLAIN)


def waiters(hand: Hand | Client, **kind: str) -> float:
    client = hand.client if isinstance(hand, Hand) else hand
    return metric(client.http.get("/metrics").text, "whisper_waiters", **kind)


def promptly(wait: Future[httpx2.Response]) -> httpx2.Response:
    """The answer long before its deadline, which is a minute away."""
    return wait.result(20)


# --- Long polls -----------------------------------------------------------------------------------


def test_a_long_poll_is_answered_when_the_job_ends(hand, later):
    """And not before, whatever happens meanwhile."""
    job = hand.submit()
    wait = later.submit(ask, hand, job, wait="60")
    wait_until(lambda: waiters(hand, kind="status") == 1)
    claim = hand.claim()
    hand.store.renew(claim, 0.5)
    hand.complete(claim)
    answer = promptly(wait)
    assert (answer.status_code, answer.json()["status"]) == (200, "completed")
    assert "retry-after" not in answer.headers
    assert ask(hand, job, wait="30").json() == answer.json()
    wait_until(lambda: waiters(hand) == 0)


def test_a_long_poll_has_a_deadline(hand):
    """Then the answer is the present status, with the advice of any other."""
    job, claim = hand.begin()
    began = time.monotonic()
    answer = ask(hand, job, wait="0.5")
    assert 0.5 <= time.monotonic() - began < 30
    assert (answer.status_code, answer.json()["status"]) == (200, "processing")
    assert answer.headers["retry-after"] == "1"
    hand.complete(claim)


def test_an_answer_with_a_tag_is_not_sent_twice(hand):
    job, claim = hand.begin()
    first = ask(hand, job)
    tag = first.headers["etag"]
    again = ask(hand, job, tag)
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == tag
    assert again.headers["retry-after"] == "1"
    assert ask(hand, job, f'"x", {tag}').status_code == 304
    assert ask(hand, job, "*").status_code == 304, "any answer will do (RFC 9110, 13.1.2)"
    assert ask(hand, job, '"x"').json() == first.json()
    hand.store.renew(claim, 0.25)
    assert ask(hand, job, tag).json()["progress"] == 0.25
    hand.complete(claim)
    ended = ask(hand, job, tag)
    assert ended.json()["status"] == "completed"
    assert ask(hand, job, ended.headers["etag"], wait="30").status_code == 304, "at once"


def test_a_long_poll_with_a_tag_is_answered_when_that_is_old(hand, later):
    """So a client follows a job from change to change."""
    job = hand.submit()
    tag = ask(hand, job).headers["etag"]
    seen, claims = [], []
    for step in (
        lambda: claims.append(hand.claim()),
        lambda: hand.store.renew(claims[0], 0.5),
        lambda: hand.store.hand_back(claims[0]),
        lambda: claims.append(hand.claim()),
        lambda: hand.store.fail(claims[1], UnreadableMedia()),
    ):
        wait = later.submit(ask, hand, job, tag, wait="60")
        wait_until(lambda: waiters(hand, kind="status") == 1)
        step()
        answer = promptly(wait)
        seen.append((answer.json()["status"], answer.json()["progress"]))
        tag = answer.headers["etag"]
    assert seen == [
        ("processing", 0), ("processing", 0.5), ("queued", 0), ("processing", 0), ("failed", 0),
    ]  # fmt: skip


def test_a_long_poll_without_news_says_so(hand):
    job, claim = hand.begin()
    tag = ask(hand, job).headers["etag"]
    answer = ask(hand, job, tag, wait="0.3")
    assert (answer.status_code, answer.content) == (304, b"")
    hand.complete(claim)


def test_a_place_in_the_queue_makes_a_tag_old_but_wakes_nobody(hand, later):
    """It changes with each job before it; thousands may wait behind."""
    first, second = hand.submit(), hand.submit()
    tag = ask(hand, second).headers["etag"]
    wait = later.submit(ask, hand, second, tag, wait="5")
    wait_until(lambda: waiters(hand, kind="status") == 1)
    hand.complete(hand.claim())
    assert not wait.done()
    assert ask(hand, second, tag).json()["queue_position"] == 1
    assert not wait.done()
    assert wait.result(30).json()["queue_position"] == 1, "what is then, at its deadline"
    assert hand.client.status(first)["status"] == "completed"
    hand.complete(hand.claim())


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf", "soon", ""])
def test_a_wait_has_bounds(hand, wait):
    answer = ask(hand, str(uuid4()), wait=wait)
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {"field": "wait", "message": "must be a number of seconds from 0 to 60"}
    ]


def test_who_waits_for_nothing_is_told_at_once(hand, raw_of):
    for path in ("status/{}", "jobs/{}/events"):
        for job in (str(uuid4()), "nonsense"):
            answer = hand.client.http.get("/" + path.format(job), params={"wait": "30"})
            assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")
    job, claim = hand.begin()
    hand.complete(claim)
    raw_of(hand.service).hset(keys.job(job), "expires_ms", 1)
    for path in ("status/{}", "jobs/{}/events"):
        answer = hand.client.http.get("/" + path.format(job), params={"wait": "30"})
        assert (answer.status_code, answer.json()["code"]) == (410, "job_expired")


# --- Event streams --------------------------------------------------------------------------------


def test_a_stream_tells_the_life_of_a_job(hand):
    job = hand.submit(metadata='{"a": 1}')
    with Stream(hand.client, job) as stream:
        assert stream.answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert stream.answer.headers["cache-control"] == "no-store"
        assert stream.answer.headers["x-accel-buffering"] == "no"
        queued = stream.until("queued")
        claim = hand.claim()
        started = stream.until("started")
        hand.store.renew(claim, 0.4)
        progress = stream.until("progress")
        hand.store.hand_back(claim)
        stream.until("queued")
        claim = hand.claim()
        stream.until("started")
        hand.complete(claim, segments([" one", " two"]))
        stream.until_over()
    assert stream.names == [
        "queued", "started", "progress", "queued", "started", "segment", "segment", "completed",
    ]  # fmt: skip
    assert (queued.data["status"], queued.data["queue_position"]) == ("queued", 1)
    assert (started.data["status"], started.data["attempts"]) == ("processing", 1)
    assert progress.data == {"progress": 0.4}
    whole = hand.client.http.get(f"/result/{job}").json()["segments"]
    assert [e.data for e in stream.events if e.name == "segment"] == whole
    assert stream.events[-1].data == hand.client.status(job)
    assert stream.events[-1].data["links"]["result"] == f"/result/{job}"
    runs = [round(datetime.fromisoformat(e.data["started_at"]).timestamp() * 1000)
            for e in stream.events if e.name == "started"]  # fmt: skip
    assert [event.id for event in stream.events] == [
        "queued-0-0-0",
        f"processing-{runs[0]}-0-0",
        f"processing-{runs[0]}-4000-0",
        "queued-0-0-0",
        f"processing-{runs[1]}-0-0",
        f"processing-{runs[1]}-0-1",
        f"processing-{runs[1]}-0-2",
        f"completed-{runs[1]}-10000-2",
    ], "what was told until then, whole"


def test_the_segments_of_a_long_recording_come_part_by_part(hand):
    """In order, whatever the order in which parts are done; and each once."""
    job, whole = hand.begin()
    hand.store.split(whole, '{"duration":9}', [0.25] * 4)
    parts = [hand.claim() for _ in range(4)]
    with Stream(hand.client, job) as stream:
        stream.until("started")
        hand.finish_part(parts[1], ["c", "d"])
        stream.until("progress")
        assert stream.segments == []
        hand.finish_part(parts[0], ["a", "b"])
        stream.until_told([0, 1, 2, 3])
        hand.finish_part(parts[2], [])
        hand.finish_part(parts[3], ["e"])
        stream.until_told([0, 1, 2, 3, 4])
        hand.complete(hand.claim(), segments("abcde"))
        stream.until_over()
    assert stream.segments == [0, 1, 2, 3, 4]
    assert [e.data["text"] for e in stream.events if e.name == "segment"] == list("abcde")
    steps = [e.data["progress"] for e in stream.events if e.name == "progress"]
    assert steps == sorted(steps)
    assert stream.names[-1] == "completed"


def test_a_recording_that_is_planned_anew_repeats_no_segment(hand):
    job, whole = hand.begin()
    hand.store.split(whole, '{"duration":9}', [0.5, 0.5])
    first, second = hand.claim(), hand.claim()
    with Stream(hand.client, job) as stream:
        hand.finish_part(first, ["a", "b"])
        stream.until_told([0, 1])
        assert hand.store.replan(second)[0] == "requeued"
        stream.until("queued")
        hand.store.split(hand.claim(), '{"duration":9}', [0.3, 0.3, 0.4])
        parts = [hand.claim() for _ in range(3)]
        for part, texts in zip(parts, ("a", "bc", "d"), strict=True):
            hand.finish_part(part, texts)
        stream.until_told([0, 1, 2, 3])
        hand.complete(hand.claim(), segments("abcd"))
        stream.until_over()
    assert [e.data["text"] for e in stream.events if e.name == "segment"] == list("abcd")
    assert stream.segments == [0, 1, 2, 3]


def test_a_stream_goes_on_after_any_event(hand):
    """As it is when the client comes back: with all segments that it missed, and no other."""
    job = hand.submit()
    with Stream(hand.client, job) as stream:
        stream.until("queued")
        whole = hand.claim()
        hand.store.split(whole, '{"duration":9}', [0.5, 0.5])
        parts = [hand.claim(), hand.claim()]
        hand.store.renew(parts[0], 0.5)
        stream.until("progress")
        hand.finish_part(parts[0], ["a", "b", "c"])
        stream.until_told([0, 1, 2])
        stream.until("progress")
        for number, event in enumerate(list(stream.events), 1):  # while it runs
            rest = [0, 1, 2][segments_in(stream.events[:number]) :]
            with Stream(hand.client, job, event.id) as again:
                if event != stream.events[-1]:
                    again.until_told(rest, stream.events[-1].id)
            assert again.names.count("started") == (event.name == "queued")
        hand.finish_part(parts[1], ["d"])
        hand.complete(hand.claim(), segments("abcd"))
        stream.until_over()
    for number, event in enumerate(stream.events[:-1], 1):  # when it is over
        with Stream(hand.client, job, event.id) as again:
            again.until_over()
        assert again.segments == [0, 1, 2, 3][segments_in(stream.events[:number]) :]
        assert again.names == ["segment"] * len(again.segments) + ["completed"]
        assert again.events[-1] == stream.events[-1]
    last = stream.events[-1].id
    answer = hand.client.http.get(f"/jobs/{job}/events", headers={"Last-Event-ID": last})
    assert (answer.status_code, answer.content) == (204, b""), "browsers stop asking then"


def segments_in(events: list[Event]) -> int:
    return sum(event.name == "segment" for event in events)


@pytest.mark.parametrize(
    "after", ["x", "1", "processing", "ended-0-0-0", "queued-0-0-0-0", "-0-0-0"]
)
def test_an_id_of_no_event_is_refused(hand, after):
    answer = hand.client.http.get(f"/jobs/{uuid4()}/events", headers={"Last-Event-ID": after})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "Last-Event-ID"


@pytest.mark.parametrize("end", sorted(ENDS))
def test_a_job_that_has_ended_is_told_at_once(hand, end):
    job, claim = hand.begin()
    if end == "completed":
        hand.complete(claim, segments(["a"]))
    elif end == "failed":
        hand.store.fail(claim, UnreadableMedia())
    else:
        hand.client.http.delete(f"/jobs/{job}")
    with Stream(hand.client, job) as stream:
        stream.until_over()
    assert stream.names == ["segment"] * (end == "completed") + [end]
    told = stream.events[-1].data
    assert told == hand.client.status(job)
    assert (told["error"] is not None) == (end == "failed")


def test_a_cancel_ends_every_wait_for_that_job(hand, later):
    job = hand.submit()
    same = hand.client.submit(hand.latest)
    claim = hand.claim()
    polls = [later.submit(ask, hand, job, wait="30") for _ in range(3)]
    with Stream(hand.client, job) as stream, Stream(hand.client, same["job_id"]) as other:
        other.until("started")
        stream.until("started")
        wait_until(lambda: waiters(hand) == 5)
        hand.client.http.delete(f"/jobs/{job}")
        assert stream.until_over()[-1].name == "cancelled"
        assert {poll.result(30).json()["status"] for poll in polls} == {"cancelled"}
        assert not other.is_over
        hand.complete(claim)
        assert other.until_over()[-1].name == "completed"


def test_who_leaves_is_forgotten(hand):
    job, claim = hand.begin()
    with Stream(hand.client, job) as stream:
        stream.until("started")
        assert waiters(hand, kind="events") == 1
    wait_until(lambda: waiters(hand) == 0)
    address = (hand.service.settings.host, hand.service.settings.port)
    with socket.create_connection(address) as poll:
        poll.sendall(f"GET /status/{job}?wait=60 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        wait_until(lambda: waiters(hand, kind="status") == 1)
    wait_until(lambda: waiters(hand) == 0)
    hand.complete(claim)


# --- What goes wrong ------------------------------------------------------------------------------


def test_who_waits_outlives_redis(hand, later):
    """Killed and back: nobody is sent away, and what happened is told as soon as it is back."""
    job, claim = hand.begin()
    other = hand.submit()
    with Stream(hand.client, job) as stream, Stream(hand.client, other) as queued:
        stream.until("started")
        queued.until("queued")
        poll = later.submit(ask, hand, job, wait="60")
        wait_until(lambda: waiters(hand) == 3)
        hand.service.kill("Redis")
        hand.service.popen("Redis").wait(30)
        wait_until(lambda: ask(hand, job).status_code == 503, 30, "it is missed")
        refused = hand.client.http.get(f"/jobs/{job}/events")
        assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
        hand.service.restart("Redis")
        hand.service.wait_ready(20, "Redis")
        wait_until(lambda: hand.store.renew(claim, 0.1) == "ok")
        hand.complete(claim)
        assert stream.until_over()[-1].name == "completed"
        assert poll.result(30).json()["status"] == "completed"
        hand.complete(hand.claim())
        assert queued.until_over()[-1].name == "completed"


def test_a_stream_outlives_an_empty_redis(hand, raw_of):
    """The job comes back from its manifest, under the same id."""
    job = hand.submit()
    with Stream(hand.client, job) as stream:
        stream.until("queued")
        raw_of(hand.service).flushall()
        assert ask(hand, job).status_code == 404
        manifest = Storage(hand.service.settings.data_dir).manifest(job)
        assert hand.store.resubmit(manifest) == "new", "as a reaper does"
        hand.complete(hand.claim())
        stream.until_over()
    assert stream.names[-1] == "completed"


def test_two_processes_serve_those_who_wait_alike(two_processes, later):
    """Whichever process has the client; each hears for itself."""
    hand = two_processes
    job, claim = hand.begin()
    polls = [later.submit(ask, hand, job, wait="60") for _ in range(8)]
    streams = [Stream(hand.client, job) for _ in range(8)]
    for stream in streams:
        stream.__enter__()
    wait_until(lambda: waiters(hand) == 16)
    hand.complete(claim, segments(["a"]))
    assert {poll.result(30).json()["status"] for poll in polls} == {"completed"}
    for stream in streams:
        stream.until_over()
        assert (stream.segments, stream.names[-1]) == ([0], "completed")
        stream.__exit__()


@pytest.mark.parametrize("of", ["hand", "two_processes"])
def test_an_api_that_is_told_to_stop_lets_go_of_who_waits(of, later, request):
    """A poll gets the present status, a stream ends so that its client comes back; the process is
    gone soon."""
    hand = request.getfixturevalue(of)
    job, claim = hand.begin()
    with Stream(hand.client, job) as stream:
        stream.until("started")
        poll = later.submit(ask, hand, job, wait="60")
        wait_until(lambda: waiters(hand) == 2)
        began = time.monotonic()
        hand.service.kill("API", signal.SIGTERM)
        answer = poll.result(30)
        assert (answer.status_code, answer.json()["status"]) == (200, "processing")
        stream.until_over()
        hand.service.popen("API").wait(30)
        assert time.monotonic() - began < GRACEFUL_SECONDS - 5
    hand.service.restart("API")
    hand.service.wait_ready(30, "API")
    with Stream(hand.client, job, stream.events[-1].id) as again:
        hand.complete(claim)
        again.until_over()
    assert again.names == ["completed"]


def test_more_than_may_wait_are_refused(by_hand, later):
    """With a time to come back; who does not wait is served."""
    hand = by_hand(MAX_WAITERS="2")
    job, claim = hand.begin()
    with Stream(hand.client, job) as stream:
        stream.until("started")
        poll = later.submit(ask, hand, job, wait="60")
        wait_until(lambda: waiters(hand) == 2)
        for answer in (ask(hand, job, wait="60"), hand.client.http.get(f"/jobs/{job}/events")):
            assert (answer.status_code, answer.json()["code"]) == (503, "too_many_waiters")
            assert int(answer.headers["retry-after"]) >= 2
        assert ask(hand, job).json()["status"] == "processing"
        hand.complete(claim)
        assert poll.result(30).json()["status"] == "completed"
    assert ask(hand, job, wait="60").json()["status"] == "completed"


def slowly(client: Client) -> httpx2.Client:
    """Its connections take some 100 KB, and then no more until they are read."""
    small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)]
    transport = httpx2.HTTPTransport(socket_options=small)
    return httpx2.Client(base_url=client.http.base_url, timeout=30, transport=transport)


def test_slow_readers_cost_bounded_memory_and_miss_no_segment(hand):
    """Clients that read nothing of 5 MB, which each gets in full later. Of the progress that was
    made meanwhile they get none."""
    job, whole = hand.begin()
    hand.store.split(whole, '{"duration":9}', [0.5, 0.5])
    first, second = hand.claim(), hand.claim()
    texts = [f"{number} {'x' * 2000}" for number in range(2500)]
    hand.finish_part(first, texts)
    path = f"/jobs/{job}/events"
    with ExitStack() as stack, Stream(hand.client, job) as quick:
        quick.until("progress")  # what one costs while it is read, all pay together
        before = hand.memory()
        http = stack.enter_context(slowly(hand.client))
        slow = [stack.enter_context(http.stream("GET", path)) for _ in range(20)]
        wait_until(lambda: waiters(hand, kind="events") == 21)
        steps = count(1)

        def has_moved() -> bool:
            hand.store.renew(second, next(steps) / 1000)
            return quick.names.count("progress") >= 4

        wait_until(has_moved, 30, "others are served")
        hand.finish_part(second, ["end"])
        hand.complete(hand.claim(), segments([*texts, "end"]))
        quick.until_over()
        assert hand.memory() - before < 40_000_000, "a copy for each would be 100"
        for answer in slow:
            lines = list(answer.iter_lines())
            told = [json.loads(line[6:]) for line in lines if line.startswith('data: {"id":')]
            assert [segment["id"] for segment in told] == list(range(2501))
            assert lines.count("event: progress") <= 1
            assert lines.count("event: completed") == 1
            answer.close()


def test_who_takes_nothing_is_let_go(hand):
    job, claim = hand.begin()
    hand.complete(claim, segments(["x" * 2000] * 2500))
    other = hurried(hand.service)
    with slowly(other) as http, http.stream("GET", f"/jobs/{job}/events") as answer:
        assert answer.status_code == 200
        wait_until(lambda: waiters(other, kind="events") == 0, STALLED_SECONDS - 5)
    other.http.close()


# --- Who may --------------------------------------------------------------------------------------


def test_nobody_waits_for_the_jobs_of_others(guarded):
    hand, service = guarded, guarded.service
    mine = new_key(service, "mine")
    other = new_key(service, "other")
    admin = new_key(service, "boss", "--scopes", "admin")
    hand.client.http.headers["Authorization"] = f"Bearer {mine}"
    job, claim = hand.begin()
    for path in (f"/status/{job}?wait=30", f"/jobs/{job}/events"):
        url = service.base_url + path
        assert httpx2.get(url, trust_env=False).status_code == 401
        answer = httpx2.get(url, headers={"X-API-Key": other}, trust_env=False)
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")
    with (
        Stream(hand.client, job, Authorization=f"Bearer {mine}") as stream,
        Stream(hand.client, job, Authorization=f"Bearer {admin}") as seen,
    ):
        stream.until("started")
        seen.until("started")
        hand.complete(claim)
        stream.until_over()
        seen.until_over()


HURRIED = """
import sys
from api import events
from api.openai import stream
events.HEARTBEAT_SECONDS = stream.KEEP_ALIVE_SECONDS = 0.7
events.STALLED_SECONDS = 0.5
from api.__main__ import main
sys.exit(main())
"""


def hurried(service: Service) -> Client:
    """Another API process of this service, that beats more often and lets go sooner."""
    spec = service.supervisor.processes["API"].spec
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    service.supervisor.add(
        replace(
            spec,
            name="API-2",
            argv=(sys.executable, "-c", HURRIED),
            env={**spec.env, "PORT": str(port)},
            ready=lambda: answers(url + "/health/live"),
        )
    )
    service.wait_ready(30, "API-2")
    client = Client(service)
    client.http.base_url = url
    return client


def test_a_quiet_stream_has_heartbeats(guarded):
    """They keep proxies from closing it; with each it is seen whether the key is still good, and a
    stream that is not quiet ends then, too. So does one of OpenAI's endpoints."""
    hand, service = guarded, guarded.service
    key = new_key(service, "revoked")
    hand.client.http.headers["Authorization"] = f"Bearer {key}"
    job, claim = hand.begin()
    client = hurried(service)

    def spoken() -> str:
        with hand.latest.open("rb") as file:
            return client.http.post(
                "/v1/audio/transcriptions",
                files={"file": file},
                data={"model": "whisper-1", "stream": "true"},
                headers={"Authorization": f"Bearer {key}"},
            ).text

    with (
        ThreadPoolExecutor(1) as pool,
        Stream(client, job, Authorization=f"Bearer {key}") as stream,
    ):
        text = pool.submit(spoken)
        wait_until(lambda: stream.heartbeats >= 2, HEARTBEAT_SECONDS)
        assert stream.names == ["started"]
        command(service, "revoke", key.split("_")[1])
        steps = count(1)

        def is_over() -> bool:  # however much it has to tell
            hand.store.renew(claim, next(steps) / 10_000)
            return stream.is_over and text.done()

        wait_until(is_over)
        assert "completed" not in stream.names
        assert '"code": "invalid_api_key"' in text.result()
    client.http.close()
    hand.complete(claim)
