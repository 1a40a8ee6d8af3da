"""The segments of a job, in order and as soon as they are there: part by part while a long
recording runs, all at once of any other.

Those who follow the same transcription share what is read of it, so there may be very many.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from weakref import WeakValueDictionary

from api.store import JobStore
from shared.jobs import Job, JobStatus

KEPT_SECONDS = 1.0
as_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Page(list[str]):
    """Segments one after the other, each as JSON."""

    @classmethod
    def of(cls, transcript: str | bytes) -> Page:
        return cls(map(as_json, json.loads(transcript)["segments"]))

    @classmethod
    def of_part(cls, result: str | bytes, first: int) -> Page:
        """`first`: the number of its first segment. What is doubtful is known in the end only."""
        found = json.loads(result)["segments"]
        return cls(
            as_json({**{k: v for k, v in each.items() if k != "warnings"}, "id": number})
            for number, each in enumerate(found, first)
        )


class Pages:
    """One for each API process. A page is shared while somebody has it in hand, and with those who
    come within KEPT_SECONDS."""

    def __init__(self, store: JobStore):
        self._store = store
        self._kept: WeakValueDictionary[str, Page] = WeakValueDictionary()

    async def whole(self, job: Job) -> Page:
        """Of a completed job. Raises JobExpired, StoreUnavailable."""
        page = await self._page(job.fingerprint, lambda: self._store.transcript(job), Page.of)
        assert page is not None
        return page

    async def part(self, job: Job, number: int, first: int) -> Page | None:
        """Of a part whose first segment is number `first` of the whole. None: it is not done yet.
        Raises StoreUnavailable."""
        name = f"{job.fingerprint}#{number} {job.started_at} {first}"
        return await self._page(
            name, lambda: self._store.part(job, number), lambda text: Page.of_part(text, first)
        )

    async def _page(
        self,
        name: str,
        read: Callable[[], Awaitable[str | bytes | None]],
        make: Callable[[str | bytes], Page],
    ) -> Page | None:
        if (page := self._kept.get(name)) is not None:
            return page
        text = await read()
        page = self._kept.get(name)  # of who read it together with this one
        if page is None and text is not None:
            page = self._kept[name] = make(text)
            asyncio.get_running_loop().call_later(KEPT_SECONDS, lambda: page)
        return page


class Segments:
    """Those of a job that one follower has, and those that are new to it. `told`: so many of them
    it had before."""

    def __init__(self, pages: Pages, told: int = 0):
        self._pages = pages
        self.told = told
        self._run: datetime | None = None  # of which these are the parts
        self._part = 0  # the next one
        self._first = 0  # the number of its first segment

    async def new(self, job: Job) -> AsyncIterator[str]:
        """Each as JSON, when `told` counts it already. Raises JobExpired, StoreUnavailable."""
        async for page, first in self._pages_of(job):
            for segment in page[max(0, self.told - first) :]:
                self.told += 1
                yield segment

    async def _pages_of(self, job: Job) -> AsyncIterator[tuple[Page, int]]:
        """That were not given before, each with the number of its first segment."""
        if job.status is JobStatus.COMPLETED:
            yield await self._pages.whole(job), 0
            return
        if job.started_at != self._run:  # it was planned anew
            self._run, self._part, self._first = job.started_at, 0, 0
        while self._part < job.parts_done:
            first = self._first
            page = await self._pages.part(job, self._part, first)
            if page is None:  # others were faster than this one
                return
            self._part, self._first = self._part + 1, first + len(page)
            yield page, first
