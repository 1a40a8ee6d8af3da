"""Reads that share a round trip get what they would have got alone."""

from __future__ import annotations

import asyncio
import time

import pytest

from api.together import Together


class Source:
    """Answers with the time of its round trip; the first is under way until `go` is set."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.came = asyncio.Event()
        self.go = asyncio.Event()
        self.failure: Exception | None = None

    async def fetch(self, keys: list[str]) -> list[tuple[str, float]]:
        self.asked.append(keys)
        self.came.set()
        began = time.monotonic()
        await self.go.wait()
        if self.failure:
            raise self.failure
        return [(key, began) for key in keys]


async def begun(source: Source, count: int) -> None:
    async with asyncio.timeout(5):
        while len(source.asked) < count:
            source.came.clear()
            await source.came.wait()


async def test_those_who_come_together_share_a_round_trip():
    source = Source()
    together = Together(source.fetch, at_once=100)
    asks = [asyncio.create_task(together.get(key)) for key in "abcaab"]
    await begun(source, 1)
    source.go.set()
    assert [key for key, _ in await asyncio.gather(*asks)] == list("abcaab")
    assert source.asked == [["a", "b", "c"]]


async def test_who_comes_later_never_gets_what_was_before():
    """Or a wait would begin with what it is to learn of."""
    source = Source()
    together = Together(source.fetch, at_once=100)
    early = asyncio.create_task(together.get("a"))
    await begun(source, 1)
    asked_at = time.monotonic()
    late = asyncio.create_task(together.get("a"))
    source.go.set()
    assert (await early)[1] <= asked_at <= (await late)[1]
    assert source.asked == [["a"], ["a"]]


async def test_a_round_trip_has_a_size():
    source = Source()
    source.go.set()
    together = Together(source.fetch, at_once=2)
    await asyncio.gather(*(together.get(key) for key in "abcde"))
    assert source.asked == [["a", "b"], ["c", "d"], ["e"]]


async def test_a_failure_is_everybodys_and_the_next_try_is_a_new_one():
    source = Source()
    source.failure = OSError("no")
    source.go.set()
    together = Together(source.fetch, at_once=1)
    failed = await asyncio.gather(*(together.get(key) for key in "aab"), return_exceptions=True)
    assert [type(each) for each in failed] == [OSError] * 3
    source.failure = None
    assert (await together.get("a"))[0] == "a"


async def test_who_leaves_takes_it_from_nobody():
    source = Source()
    together = Together(source.fetch, at_once=100)
    leaving, staying = (asyncio.create_task(together.get("a")) for _ in range(2))
    await begun(source, 1)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    source.go.set()
    assert (await staying)[0] == "a"
