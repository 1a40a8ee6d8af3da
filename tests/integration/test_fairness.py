"""Between callers: who has work waiting gets as much as the others who have, who has none is next,
and each caller's own jobs keep their order."""

from __future__ import annotations

from uuid import uuid4

import pytest

from shared import keys
from shared.storage import Manifest
from tests.integration.test_job_store import complete, end_lease

MIB = 1024 * 1024


@pytest.fixture
def submit(store, settings):
    """Submits a file of a caller's; returns its manifest. Its fingerprint is caller/content."""

    async def submit(
        owner: str, content: object, size_bytes: int = MIB, priority: str = "normal"
    ) -> Manifest:
        made = Manifest(
            job_id=str(uuid4()),
            fingerprint=f"{owner}/{content}",
            checksum="",
            options="{}",
            model=settings.model_key,
            size_bytes=size_bytes,
            owner=owner,
            job_options={"priority": priority},
        )
        await store.submit(made)
        return made

    return submit


def claimed(worker) -> str:
    """The caller whose work is next, which is taken; '-' when nothing waits."""
    claim = worker.claim()
    return claim.fingerprint.partition("/")[0] if claim else "-"


def all_claimed(worker) -> list[str]:
    return [claim.fingerprint for claim in iter(worker.claim, None)]


async def test_callers_whose_work_waits_get_even_shares_whatever_the_size_of_their_files(
    worker, submit
):
    """At no time has one got more than another by more than a file of each."""
    sizes = {"large": 5 * MIB, "middle": MIB, "small": MIB // 8}
    for owner, size_bytes in sizes.items():
        for n in range(20 * MIB // size_bytes):
            await submit(owner, n, size_bytes)
    got = dict.fromkeys(sizes, 0)
    while min(got.values()) < 19 * MIB:
        owner = claimed(worker)
        got[owner] += sizes[owner]
        assert max(got.values()) - min(got.values()) <= 6 * MIB, got


async def test_who_has_nothing_waiting_is_next(store, worker, submit):
    """In the order of arrival, and `queue_position` says so; then it is one of them."""
    for n in range(30):
        await submit("greedy", n)
    assert [claimed(worker) for _ in range(3)] == ["greedy"] * 3
    polite = [await submit(owner, 0) for owner in ("ann", "bob", "cem")]
    places = [(await store.read(job.job_id, "")).queue_position for job in polite]
    assert places == [1, 2, 3]
    await submit("ann", 1)
    assert [claimed(worker) for _ in range(6)] == ["ann", "bob", "cem", "greedy", "ann", "greedy"]


@pytest.mark.parametrize(("priority", "other"), [("low", "normal"), ("normal", "high")])
async def test_who_has_nothing_waiting_is_next_whatever_was_taken_of_another_priority(
    store, worker, submit, priority, other
):
    for n in range(30):
        await submit("greedy", n, MIB, priority)
    for n in range(40):
        await submit("busy", n, MIB, other)
    assert [claimed(worker) for _ in range(40)] == ["busy"] * 40
    polite = await submit("ann", 0, MIB, priority)
    assert (await store.read(polite.job_id, "")).queue_position == 2
    assert [claimed(worker) for _ in range(3)] == ["greedy", "ann", "greedy"]


async def test_parts_take_turns_whatever_was_taken_of_another_priority(worker, submit):
    async def split(owner: str, content: int, priority: str) -> None:
        await submit(owner, content, 8 * MIB, priority)
        assert worker.split(worker.claim(takes_parts=False), "{}", [0.125] * 8) == "ok"

    for n in range(3):
        await split("greedy", n, "low")
    for n in range(6):
        await split("busy", n, "normal")
    assert [claimed(worker) for _ in range(48)] == ["busy"] * 48
    await split("ann", 0, "low")
    assert sorted(claimed(worker) for _ in range(4)) == ["ann", "ann", "greedy", "greedy"]


async def test_one_callers_jobs_keep_their_order(store, worker, submit):
    """Whatever their size, also where others of the same caller are cancelled or taken back."""
    jobs = [await submit("", n, (n % 3 + 1) * MIB) for n in range(12)]
    for job in jobs[:6]:
        await store.cancel(job.job_id, "")
    claim = worker.claim()
    jobs += [await submit("", n) for n in range(12, 15)]
    worker.hand_back(claim)
    claim = worker.claim()
    end_lease(store_of(worker), claim)
    worker.reap()
    assert all_claimed(worker) == [job.fingerprint for job in jobs[6:]]


def store_of(worker):
    return worker._redis


async def test_nobody_waits_for_ever(worker, submit):
    """Callers who are next again and again pass what waits by no more than it is behind."""
    for n in range(4):
        await submit("greedy", n)
    found = []
    for n in range(8):
        await submit("ann", n)
        await submit("bob", n)
        found += [claimed(worker) for _ in range(3)]
    assert found.count("greedy") == 4
    assert found.index("greedy") <= 2
    assert len(found) - found[::-1].index("greedy") <= 12


async def test_what_is_cancelled_is_not_charged(store, worker, submit):
    """But what was begun is."""
    for owner in ("other", "changed"):
        jobs = [await submit(owner, n) for n in range(20)]
    for job in jobs:
        await store.cancel(job.job_id, "")
    await submit("changed", "new")
    assert [claimed(worker) for _ in range(3)] == ["other", "changed", "other"]
    running = await submit("changed", "running", 10 * MIB)
    assert claimed(worker) == "changed"
    await store.cancel(running.job_id, "")
    await submit("changed", "last")
    assert [claimed(worker) for _ in range(10)] == ["other"] * 10


async def test_nobody_is_charged_for_what_was_done_while_nobody_waited(worker, submit, settings):
    await submit("busy", 0, 500 * MIB)
    assert complete(worker, settings, worker.claim())
    for n in (1, 2):
        await submit("busy", n)
        await submit("other", n)
    assert [claimed(worker) for _ in range(4)] == ["busy", "other", "busy", "other"]


async def test_who_joins_what_another_waits_for_takes_it_to_its_own_place(store, worker, submit):
    """And is charged for it, instead of the other (SHARE_RESULTS)."""
    jobs = [await submit("greedy", n) for n in range(6)]
    await submit("other", 0)
    await store.submit(joining(jobs[5], "ann"))
    await submit("ann", 0)
    await submit("greedy", 6)
    assert all_claimed(worker) == [
        "greedy/0", "other/0", "greedy/5", "greedy/1", "ann/0", "greedy/2", "greedy/3", "greedy/4",
        "greedy/6",
    ]  # fmt: skip


def joining(job: Manifest, owner: str) -> Manifest:
    return Manifest(str(uuid4()), job.fingerprint, "", "{}", job.model, job.size_bytes, owner=owner)


async def test_long_recordings_of_two_callers_take_turns_by_parts(store, worker, submit):
    """However many of one's were cut into parts before; and when one is joined meanwhile."""
    for n in range(3):
        await submit("greedy", n, 4 * MIB)
        assert worker.split(worker.claim(), "{}", [0.25] * 4) == "ok"
    assert [claimed(worker) for _ in range(2)] == ["greedy"] * 2
    polite = await submit("polite", 0, 4 * MIB)
    assert worker.split(worker.claim(takes_parts=False), "{}", [0.25] * 4) == "ok"
    assert [claimed(worker) for _ in range(4)] == ["polite", "greedy", "polite", "greedy"]
    await store.submit(joining(polite, "ann"))
    assert [claimed(worker) for _ in range(2)] == ["polite", "polite"]
    assert [claimed(worker) for _ in range(9)] == ["greedy"] * 8 + ["-"]


async def test_a_callers_low_jobs_do_not_hold_up_its_normal_ones(worker, submit):
    for n in range(20):
        await submit("batch", n, priority="low")
        await submit("other", n)
    await submit("batch", "now")
    assert "batch" in {claimed(worker) for _ in range(2)}


async def test_nothing_is_kept_of_what_has_gone(worker, submit, settings, raw):
    """But where the last one of a line ends, for a month."""
    for n in range(20):
        await submit("ann", n)
        await submit("bob", n)
    while claim := worker.claim():
        complete(worker, settings, claim)
    left = {owner: keys.lines(f"queue/normal/{owner}") for owner in ("ann", "bob")}
    assert [raw.zrange(key, 0, -1) for key in left.values()] == [["taken"], ["taken"]]
    assert all(0 < raw.ttl(key) <= 30 * 86400 for key in left.values())
    assert not raw.exists(keys.BACKLOGS, keys.QUEUE, keys.PARTS)
