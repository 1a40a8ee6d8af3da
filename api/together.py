"""Reads that are asked for at the same time share a round trip, and those who ask for the same
share the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from itertools import chain, islice
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Together(Generic[K, V]):
    """`fetch` gets the values of some keys, in their order, in one round trip; of `at_once` keys at
    most, since Redis does nothing else meanwhile.

    A call joins only a round trip that has not begun, so it never gets what was true before it.
    """

    def __init__(self, fetch: Callable[[list[K]], Awaitable[Sequence[V]]], at_once: int):
        self._fetch = fetch
        self._at_once = at_once
        self._asked: dict[K, list[asyncio.Future[V]]] = {}
        self._work: asyncio.Task[None] | None = None

    async def get(self, key: K) -> V:
        """Raises what `fetch` raises."""
        answer: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._asked.setdefault(key, []).append(answer)
        if self._work is None:
            self._work = asyncio.create_task(self._get_all())
        return await answer

    async def _get_all(self) -> None:
        while self._asked:
            keys = list(islice(self._asked, self._at_once))
            await self._get(keys, [self._asked.pop(key) for key in keys])
        self._work = None

    async def _get(self, keys: list[K], asked: list[list[asyncio.Future[V]]]) -> None:
        try:
            values = await self._fetch(keys)
        except Exception as exc:  # theirs, whatever it is
            for answer in chain.from_iterable(asked):
                if not answer.done():
                    answer.set_exception(exc)
            return
        for answers, value in zip(asked, values, strict=True):
            for answer in answers:
                if not answer.done():  # else who asked has left
                    answer.set_result(value)
