"""A recording that is named by its address, fetched from real servers on loopback that behave and
that don't."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import threading
import time
import tracemalloc
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from api import fetch as fetching
from api.admission import Admission
from api.egress import Answer, Egress
from api.fetch import Fetcher
from api.store import JobStore
from shared.broker import celery_app
from shared.destinations import Destinations
from shared.errors import (
    EmptyFile,
    FileTooLarge,
    NotAudio,
    StorageFull,
    TooManyFetches,
    UrlNotAllowed,
    UrlStatus,
    UrlTooSlow,
    UrlUnreachable,
)
from shared.metrics import FETCH_RESULTS, ApiMetrics
from shared.settings import Settings
from shared.storage import Storage
from tests.conftest import wait_until
from tests.receiver import Canary, Receiver, Reply

AUDIO = bytes(range(256)) * 4000  # a megabyte that is no text
LIMIT_MB = 2


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "max_file_size_mb": LIMIT_MB,
            "fetch_seconds": 2.0,
            "upload_patience_seconds": 0.5,
            "min_free_disk_mb": 0,
        }
    )


class Names:
    """Every name is this machine."""

    async def __call__(self, host: str, port: int) -> Iterable[str]:
        return ["127.0.0.1"]


@pytest_asyncio.fixture
async def fetcher(settings: Settings, tmp_path: Path):
    async with FetcherOf(settings, tmp_path) as made:
        yield made


class FetcherOf:
    """A fetcher with all that it needs."""

    def __init__(self, settings: Settings, folder: Path, allow: str = "127.0.0.1"):
        storage = Storage(folder)
        self._store = JobStore(settings, celery_app(settings.redis_url.get_secret_value()))
        self._egress = Egress(Destinations(allow), Names())
        self.metrics = ApiMetrics(CollectorRegistry())
        admission = Admission(settings, self._store, storage)
        self.made = Fetcher(settings, self._egress, storage, admission, self.metrics)

    async def __aenter__(self) -> Fetcher:
        return self.made

    async def __aexit__(self, *_: object) -> None:
        self._egress.close()
        await self._store.close()


async def test_the_bytes_arrive_as_they_are(fetcher, tmp_path):
    with Receiver(Reply(body=AUDIO)) as server:
        fetched = await fetcher.fetch(server.url("/a.mp3?token=1"), tmp_path / "audio.part", "")
        request = server.received[0]
    assert (request.method, request.path) == ("GET", "/a.mp3?token=1")
    assert request.headers["accept-encoding"] == "identity"
    assert fetched.size_bytes == len(AUDIO)
    assert fetched.checksum == hashlib.sha256(AUDIO).hexdigest()
    assert (tmp_path / "audio.part").read_bytes() == AUDIO


async def test_a_file_whose_length_is_not_announced_arrives_whole(fetcher, tmp_path):
    """Room for the largest is taken first, and given back."""
    with Receiver(Reply(headers={"Content-Length": ""}, body=AUDIO)) as server:
        server.replies = [Reply(headers={"Transfer-Encoding": "chunked"}, body=chunked(AUDIO))]
        fetched = await fetcher.fetch(server.url(), tmp_path / "audio.part", "")
    assert fetched.checksum == hashlib.sha256(AUDIO).hexdigest()
    assert (tmp_path / "audio.part").stat().st_size == len(AUDIO)


def chunked(content: bytes) -> bytes:
    return f"{len(content):x}\r\n".encode() + content + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(fetcher, tmp_path, status):
    with Receiver(Reply(body=AUDIO)) as server:
        server.replies.insert(0, Reply(status, {"Location": "/there?x=1"}))
        server.replies.insert(0, Reply(status, {"Location": server.url("/hop")}))
        await fetcher.fetch(server.url("/here"), tmp_path / "audio.part", "")
        assert [request.path for request in server.received] == ["/here", "/hop", "/there?x=1"]


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.2:{port}/",
        "//127.0.0.2:{port}/",
        "http://[::ffff:127.0.0.2]:{port}/",
        "http://inside:{port}/",
        "http://0x7f.0.0.2:{port}/",
        "http://user@127.0.0.2:{port}/",
        "ftp://127.0.0.2:{port}/",
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data/",
    ],
)
async def test_each_redirect_is_checked_like_the_address_itself(fetcher, tmp_path, location):
    with Canary("127.0.0.2") as canary:
        away = Reply(302, {"Location": location.format(port=canary.port)})
        with Receiver(away) as server:
            with pytest.raises(UrlNotAllowed, match="redirected"):
                await fetcher.fetch(server.url(), tmp_path / "audio.part", "")
            assert len(server.received) == 1
        assert canary.accepted == 0


async def test_a_redirect_does_not_lead_from_https_to_http(fetcher):
    """What is fetched would be what anybody on the way makes of it."""
    there = {"location": "http://example.org/a.mp3"}
    for scheme, is_refused in (("https", True), ("http", False)):
        with pytest.raises(UrlNotAllowed) if is_refused else nullcontext():
            fetcher._next(httpx2.URL(f"{scheme}://example.org/"), Answer(302, there, no_body()))


async def no_body():
    yield b""


async def test_redirects_have_an_end(fetcher, tmp_path):
    with Receiver(Reply(302, {"Location": "/again"})) as server:
        with pytest.raises(UrlStatus, match="redirects more than 5 times"):
            await fetcher.fetch(server.url(), tmp_path / "audio.part", "")
        assert len(server.received) == 6
    with Receiver(Reply(302)) as server, pytest.raises(UrlStatus, match="nowhere"):
        await fetcher.fetch(server.url(), tmp_path / "audio.part", "")


@pytest.mark.parametrize("status", [201, 204, 206, 304, 401, 403, 404, 410, 429, 500, 503])
async def test_a_server_that_does_not_give_the_file_is_named_with_its_status(
    fetcher, tmp_path, status
):
    with Receiver(Reply(status, body=b"")) as server, pytest.raises(UrlStatus, match=str(status)):
        await fetcher.fetch(server.url(), tmp_path / "audio.part", "")


async def test_what_is_larger_than_a_file_may_be_is_not_taken(fetcher, tmp_path):
    """By what is announced, and by what comes."""
    large = b"\x00" * (LIMIT_MB * 1024 * 1024 + 1)
    with Receiver(Reply(body=large)) as server, pytest.raises(FileTooLarge):
        await fetcher.fetch(server.url(), tmp_path / "audio.part", "")
    endless = Reply(headers={"Transfer-Encoding": "chunked"}, body=chunked(large * 10))
    with Receiver(endless) as server, pytest.raises(FileTooLarge):
        await fetcher.fetch(server.url(), tmp_path / "audio.part", "")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<!DOCTYPE html><html><body>" + b"x" * 5000, "web page"),
        ("\ufeff\n <html lang=de><p>Grüße ".encode() + b"\xff" * 2000, "web page"),
        (b"<?xml version='1.0'?><rss/>", "web page"),
        (b"#EXTM3U\nhttp://example.org/a.mp3\n", "is text"),
        (b'{"url": "http://example.org/a.mp3"}', "is text"),
    ],
)
async def test_a_page_or_a_playlist_is_no_recording(fetcher, tmp_path, body, message):
    with Receiver(Reply(body=body)) as server, pytest.raises(NotAudio, match=message):
        await fetcher.fetch(server.url(), tmp_path / "audio.part", "")


async def test_an_empty_file_is_refused(fetcher, tmp_path):
    with Receiver(Reply(body=b"")) as server, pytest.raises(EmptyFile):
        await fetcher.fetch(server.url(), tmp_path / "audio.part", "")


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
async def test_what_is_compressed_on_the_way_is_not_unpacked(fetcher, tmp_path, encoding):
    """A megabyte could become a gigabyte."""
    bomb = gzip.compress(b"\x00" * 50_000_000)
    compressed = Reply(headers={"Content-Encoding": encoding}, body=bomb)
    with Receiver(compressed) as server, pytest.raises(NotAudio, match="compressed"):
        await fetcher.fetch(server.url(), tmp_path / "audio.part", "")


async def test_a_file_that_ends_early_is_not_taken_for_whole(fetcher, tmp_path):
    cut = Reply(headers={"Content-Length": str(len(AUDIO) + 1)}, body=AUDIO)
    with Receiver(cut) as server, pytest.raises(UrlUnreachable, match="early"):
        await fetcher.fetch(server.url(), tmp_path / "audio.part", "")


async def test_a_server_that_is_not_there_is_unreachable(fetcher, tmp_path):
    with pytest.raises(UrlUnreachable):
        await fetcher.fetch("http://127.0.0.1:1/a", tmp_path / "audio.part", "")
    with pytest.raises(UrlNotAllowed):
        await fetcher.fetch("http://127.0.0.2:1/a", tmp_path / "audio.part", "")


async def dripping(pieces: int, pause_seconds: float) -> asyncio.Server:
    """A server that sends a byte now and then."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        try:
            for _ in range(pieces):
                writer.write(b"\x00")
                await writer.drain()
                await asyncio.sleep(pause_seconds)
        except OSError:
            pass
        finally:
            writer.close()

    return await asyncio.start_server(drip, "127.0.0.1", 0)


async def test_a_server_that_drips_or_says_nothing_is_left(fetcher, tmp_path):
    tested = threading.Event()
    with Receiver(Reply(after=tested.wait)) as silent:
        server = await dripping(1200, 0.05)
        port = server.sockets[0].getsockname()[1]
        for url in (f"http://127.0.0.1:{port}/", silent.url()):
            began = time.monotonic()
            with pytest.raises(UrlTooSlow):
                await fetcher.fetch(url, tmp_path / "audio.part", "")
            assert time.monotonic() - began < 20, "the drips alone would take a minute"
        tested.set()
        server.close()


async def test_only_so_many_are_fetched_at_a_time(fetcher, settings, tmp_path, monkeypatch):
    """Others wait for their turn, and are refused in the end; none is lost in silence."""
    monkeypatch.setattr(fetcher, "_turns", asyncio.Semaphore(2))
    patient = settings.model_copy(update={"fetch_seconds": 60.0})
    monkeypatch.setattr(fetcher, "_settings", patient)
    tested = threading.Event()
    with Receiver(Reply(after=tested.wait)) as silent, Receiver(Reply(body=AUDIO)) as quick:
        held = [
            asyncio.create_task(fetcher.fetch(silent.url(), tmp_path / f"{n}.part", ""))
            for n in range(2)
        ]
        await asyncio.to_thread(wait_until, lambda: len(silent.received) == 2)
        with monkeypatch.context() as patch:
            impatient = settings.model_copy(update={"fetch_seconds": 0.2})
            patch.setattr(fetcher, "_settings", impatient)
            with pytest.raises(TooManyFetches):
                await fetcher.fetch(quick.url(), tmp_path / "third.part", "")
        assert quick.accepted == 0
        tested.set()
        assert len(await asyncio.gather(*held, return_exceptions=True)) == 2
        await fetcher.fetch(quick.url(), tmp_path / "fourth.part", "")


async def test_a_disk_without_room_is_not_filled(settings, tmp_path):
    """Its place is taken before the bytes come."""
    full = settings.model_copy(update={"min_free_disk_mb": 10**9})
    with Receiver(Reply(body=AUDIO)) as server:
        async with FetcherOf(full, tmp_path) as fetcher:
            with pytest.raises(StorageFull):
                await fetcher.fetch(server.url(), tmp_path / "audio.part", "")


async def test_memory_stays_flat(settings, tmp_path):
    large = settings.model_copy(update={"max_file_size_mb": 100, "fetch_seconds": 60.0})
    body = b"\x00" * 80_000_000
    with Receiver(Reply(body=body)) as server:
        async with FetcherOf(large, tmp_path) as fetcher:
            tracemalloc.start()
            await fetcher.fetch(server.url(), tmp_path / "audio.part", "")
            _, most_bytes = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    assert most_bytes < 12_000_000


async def test_every_outcome_is_counted(settings, tmp_path):
    """Under its code, or as `other`."""
    folder = FetcherOf(settings, tmp_path)
    with ExitStack() as stack:
        good, missing, page = (
            stack.enter_context(Receiver(reply))
            for reply in (Reply(body=AUDIO), Reply(404), Reply(body=b"<html>"))
        )
        async with folder as fetcher:
            for url in (
                good.url(),
                missing.url(),
                page.url(),
                "http://10.0.0.1/",
                "http://127.0.0.1:1/",
            ):
                await asyncio.gather(
                    fetcher.fetch(url, tmp_path / "audio.part", ""), return_exceptions=True
                )
    counted = {r: folder.metrics.fetches.labels(r)._value.get() for r in FETCH_RESULTS}
    assert counted == {
        "fetched": 1,
        "url_not_allowed": 1,
        "url_unreachable": 1,
        "url_status": 1,
        "url_too_slow": 0,
        "other": 1,
    }
    assert fetching.AT_A_TIME > 1
