"""One connection to Redis on which this process hears what becomes of transcriptions (shared/lua:
tell), however many clients wait for them here. It listens to those that somebody waits for, and to
no others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import islice

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from api.store import connect
from shared import keys
from shared.settings import Settings

log = logging.getLogger(__name__)

PING_SECONDS = 5.0
SILENT_SECONDS = 2 * PING_SECONDS  # the connection is dead
AGAIN_SECONDS = 0.5  # after a connection is lost
AT_ONCE = 500  # channels in one command; notices without a break for others

# (fingerprint, what was told). Also called when a channel begins to be heard, with LISTENING: what
# was told before that was heard by nobody, and is to be looked up.
OnNotice = Callable[[str, str], None]
LISTENING = "listening"


class Notices:
    """`connect` makes a connection, not yet connected."""

    def __init__(self, connect: Callable[[], AbstractConnection], on_notice: OnNotice):
        self._connect = connect
        self._on_notice = on_notice
        self._wanted: set[str] = set()  # fingerprints
        self._changed: set[str] = set()  # that begin or cease to be wanted
        self._has_changed = asyncio.Event()
        self._asked: set[str] = set()  # what this connection subscribes to
        self._heard: set[str] = set()  # what Redis has confirmed of that
        self._serving: AbstractConnection | None = None
        self._is_stopping = False

    def listen(self, fingerprint: str) -> None:
        """LISTENING comes as soon as that is so, and again whenever it was interrupted."""
        self._wanted.add(fingerprint)
        self._changed.add(fingerprint)
        self._has_changed.set()

    def ignore(self, fingerprint: str) -> None:
        """Redis is told some seconds later, of all together: many come back at once."""
        self._wanted.discard(fingerprint)
        self._changed.add(fingerprint)

    def hears(self, fingerprint: str) -> bool:
        return fingerprint in self._heard

    def stop(self) -> None:
        """To be told before `run` is cancelled."""
        self._is_stopping = True

    async def run(self) -> None:
        """Connects again whenever the connection is lost. Nothing here relies on a cancellation
        alone: redis-py sends with asyncio.wait_for, which can swallow one on Python 3.11."""
        is_lost = False
        while not self._is_stopping:
            try:
                connection = self._connect()
                try:
                    await connection.connect()  # type: ignore[no-untyped-call]
                    if is_lost:
                        log.info("notices are heard again", extra={"action": "notices_back"})
                    is_lost = False
                    if not self._is_stopping:
                        await self._serve(connection)
                finally:
                    self._heard.clear()
                    await connection.disconnect(nowait=True)
            except (RedisError, OSError) as exc:
                if not is_lost:
                    log.warning("no notices: %s", exc, extra={"action": "notices_lost"})
            except Exception:
                log.exception("no notices", extra={"action": "notices_lost"})
            is_lost = True
            await asyncio.sleep(AGAIN_SECONDS)

    async def _serve(self, connection: AbstractConnection) -> None:
        self._asked.clear()
        self._changed = set(self._wanted)
        self._has_changed.set()
        self._serving = connection
        writing = asyncio.create_task(self._write(connection))
        try:
            await self._read(connection)
        finally:
            self._serving = None
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, connection: AbstractConnection) -> None:
        """Whatever ends this ends the connection, and so the reading."""
        clock = asyncio.get_running_loop().time
        ping = clock() + PING_SECONDS
        try:
            while self._serving is connection:
                try:
                    async with asyncio.timeout_at(ping):
                        await self._has_changed.wait()
                except TimeoutError:
                    await connection.send_command("PING", check_health=False)
                    ping = clock() + PING_SECONDS
                self._has_changed.clear()
                while self._changed and self._serving is connection:
                    some = set(islice(self._changed, AT_ONCE))
                    self._changed -= some
                    await self._update(connection, some)
        finally:
            await connection.disconnect(nowait=True)

    async def _update(self, connection: AbstractConnection, some: set[str]) -> None:
        begin, end = (some & self._wanted) - self._asked, (some & self._asked) - self._wanted
        self._asked |= begin
        self._asked -= end
        self._heard -= end
        for command, fingerprints in (("SUBSCRIBE", begin), ("UNSUBSCRIBE", end)):
            if fingerprints:
                channels = map(keys.changes, fingerprints)
                await connection.send_command(command, *channels, check_health=False)

    async def _read(self, connection: AbstractConnection) -> None:
        prefix = len(keys.changes(""))
        count = 0
        while True:
            reply = await connection.read_response(
                timeout=SILENT_SECONDS, disconnect_on_error=False, push_request=True
            )
            if reply is None:
                raise RedisError("Redis is silent")
            kind, channel, *rest = reply if isinstance(reply, list) else (reply, "")
            if kind == "message":
                self._on_notice(channel[prefix:], rest[0])
            elif kind == "subscribe" and channel[prefix:] in self._asked:
                self._heard.add(channel[prefix:])
                self._on_notice(channel[prefix:], LISTENING)
            count += 1
            if count % AT_ONCE == 0:
                await asyncio.sleep(0)


def lone_connection(settings: Settings) -> AbstractConnection:
    """To Redis, of no pool. In its older protocol, in which notices are plain lists."""
    pool = connect(settings).connection_pool
    about = {**pool.connection_kwargs, "protocol": 2, "client_name": "whisper-api-notices"}
    connection: AbstractConnection = pool.connection_class(**about)
    return connection
