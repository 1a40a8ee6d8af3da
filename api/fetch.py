"""A recording that comes by its address instead of its bytes: fetched within the request, so that
an answer of 202 means for it what it means for an upload: the bytes are here.

The other server is a stranger. It is asked through api/egress.py, as is each address that it
redirects to; what it sends is counted, and measured by the clock, as an upload's bytes are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

from api.admission import Admission
from api.egress import Answer, Egress, origin_of
from api.uploads import ArrivedFile, paced, too_large
from shared.errors import (
    EmptyFile,
    NotAudio,
    ServiceError,
    TooManyFetches,
    UploadTooSlow,
    UrlStatus,
    UrlTooSlow,
)
from shared.metrics import FETCH_RESULTS, ApiMetrics
from shared.settings import Settings
from shared.storage import Storage

log = logging.getLogger(__name__)

AT_A_TIME = 32
MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
RETRY_AFTER_SECONDS = 5


@dataclass(frozen=True)
class Fetched:
    checksum: str  # SHA-256, hex
    size_bytes: int


class Fetcher:
    """One for each API process."""

    def __init__(
        self,
        settings: Settings,
        egress: Egress,
        storage: Storage,
        admission: Admission,
        metrics: ApiMetrics,
    ):
        self._settings = settings
        self._egress = egress
        self._storage = storage
        self._admission = admission
        self._metrics = metrics
        self._turns = asyncio.Semaphore(AT_A_TIME)

    async def fetch(self, text: str, path: Path, owner: str) -> Fetched:
        """What is at this address goes to `path`, to be a job of `owner`. Raises UrlNotAllowed,
        UrlUnreachable, UrlStatus, UrlTooSlow, TooManyFetches, FileTooLarge, NotAudio, EmptyFile,
        StorageFull, OSError, and what Admission.before_body raises."""
        result = "other"
        try:
            fetched = await self._in_time(text, path, owner)
            result = "fetched"
            return fetched
        except ServiceError as exc:
            result = exc.code if exc.code in FETCH_RESULTS else "other"
            raise
        finally:
            self._metrics.fetches.labels(result).inc()

    async def _in_time(self, text: str, path: Path, owner: str) -> Fetched:
        url = self._egress.check("url", text, only_https=False)
        begun = False
        try:
            async with asyncio.timeout(self._settings.fetch_seconds), self._turns:
                begun = True
                return await self._follow(url, path, owner)
        except TimeoutError as exc:
            if not begun:
                raise TooManyFetches(retry_after_seconds=RETRY_AFTER_SECONDS) from exc
            raise UrlTooSlow(
                f"The file was not here within {self._settings.fetch_seconds:g} seconds, which is "
                "what this server gives it. Download it, and upload it."
            ) from exc

    async def _follow(self, url: httpx2.URL, path: Path, owner: str) -> Fetched:
        for _ in range(MAX_REDIRECTS + 1):
            async with self._egress.ask("GET", url, {"Accept": "*/*"}) as answer:
                if answer.status not in REDIRECTS:
                    fetched = await self._take(answer, path, owner)
                    log.info(
                        "fetched",
                        extra={
                            "action": "fetched",
                            "origin": origin_of(url),
                            "size_bytes": fetched.size_bytes,
                        },
                    )
                    return fetched
                url = self._next(url, answer)
        raise UrlStatus(f"The server at this address redirects more than {MAX_REDIRECTS} times.")

    def _next(self, url: httpx2.URL, answer: Answer) -> httpx2.URL:
        location = answer.headers.get("location", "")
        if not location:
            raise UrlStatus("The server at this address redirects to nowhere.")
        try:
            target = str(url.join(location))
        except httpx2.InvalidURL:
            target = location
        only_https = url.scheme == "https"  # who named it relies on that
        return self._egress.check("url (redirected)", target, only_https=only_https)

    async def _take(self, answer: Answer, path: Path, owner: str) -> Fetched:
        if answer.status != 200:
            raise UrlStatus(
                f"The server at this address answered with status {answer.status}, not with the "
                "file. Does the address work without a login?"
            )
        if answer.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise NotAudio(
                "The server at this address sends the file compressed (Content-Encoding), although "
                "it was asked not to. Download it, and upload it."
            )
        most_bytes = self._settings.max_file_size_bytes
        announced = answer.headers.get("content-length", "")
        is_number = announced.isascii() and announced.isdigit()
        announced_bytes = int(announced[:20]) if is_number else None
        if (announced_bytes or 0) > most_bytes:
            raise too_large(most_bytes)
        await self._admission.before_body(announced_bytes, owner)
        await asyncio.to_thread(self._storage.reserve, path, announced_bytes or most_bytes)
        self._admission.reserved()
        try:
            body = paced(answer.body, self._settings.upload_patience_seconds)
            return await written(body, path, most_bytes)
        except UploadTooSlow as exc:
            raise UrlTooSlow from exc


async def written(body: AsyncIterator[bytes], path: Path, most_bytes: int) -> Fetched:
    """The bytes go to the disk as they come, as those of an upload. Raises FileTooLarge, NotAudio,
    EmptyFile, OSError."""

    async def place() -> Path:
        return path

    file = ArrivedFile()
    try:
        async for chunk in body:
            file.size_bytes += len(chunk)
            if file.size_bytes > most_bytes:
                raise too_large(most_bytes)
            file.pending += chunk
            file.sniff()
            await file.write_out(place)
        file.is_complete = True
        file.sniff()
        await file.write_out(place)
    finally:
        await file.close()
    if not file.size_bytes:
        raise EmptyFile
    return Fetched(file.checksum, file.size_bytes)
