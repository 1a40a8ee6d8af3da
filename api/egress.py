"""The one way out: every connection that the service makes because a caller named an address.

A caller could name what only this machine reaches (SSRF). So the address is read by one parser and
checked; its name is resolved once, all that it resolves to is checked (shared/destinations.py), and
the connection goes to an address that was checked: a name that resolves to something else a moment
later (DNS rebinding) leads nowhere. TLS and the header Host still have the name. Redirects are not
followed, and no proxy of the environment is used.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address

import httpcore2
import httpx2

from shared.destinations import (
    Address,
    Destinations,
    address_of,
    is_local_name,
    is_name,
    is_public,
)
from shared.errors import UrlNotAllowed, UrlTooSlow, UrlUnreachable
from shared.metrics import VERSION

MAX_URL_LENGTH = 2048
CONNECT_SECONDS = 5.0  # to one address; a name may have several
IDLE_SECONDS = 60.0  # callers have limits of their own, which are shorter
RESOLVING_THREADS = 16
NOT_PUBLIC = (
    "It leads to an address that is not public. Whoever runs this service can list it in "
    "EGRESS_ALLOW."
)
_PORTS = {"http": 80, "https": 443}
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f\\]")

Resolve = Callable[[str, int], Awaitable[Iterable[str]]]


@dataclass(frozen=True)
class Answer:
    """What the other side says, up to its body."""

    status: int
    headers: Mapping[str, str]  # names in lower case; of several the last
    body: AsyncIterator[bytes]  # raises as Egress.ask


class Egress:
    """One for each API process."""

    def __init__(
        self,
        destinations: Destinations,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
    ):
        """`resolve`: gives the addresses of a name. `tls`: whom to trust; None: as this system."""
        self._destinations = destinations
        self._threads = ThreadPoolExecutor(RESOLVING_THREADS, thread_name_prefix="resolve")
        self._resolve = resolve or self._system
        self._tls = tls or httpcore2.default_ssl_context()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check(self, field: str, text: str, *, only_https: bool) -> httpx2.URL:
        """What can be told without asking anybody. `only_https`: but for what the operator listed.
        Raises UrlNotAllowed, which says why of the form field `field`."""
        try:
            return self._checked(text, only_https=only_https)
        except UrlNotAllowed as exc:
            raise UrlNotAllowed(f"{field}: {exc.message}") from exc

    def _checked(self, text: str, *, only_https: bool) -> httpx2.URL:
        text = text.strip()
        try:
            url = httpx2.URL(text[: MAX_URL_LENGTH + 1])
        except (httpx2.InvalidURL, UnicodeEncodeError) as exc:  # half of a surrogate pair
            raise UrlNotAllowed("It can't be read as an address.") from exc
        if max(len(text), len(str(url))) > MAX_URL_LENGTH:
            raise UrlNotAllowed(f"It is longer than {MAX_URL_LENGTH} characters.")
        if _UNPRINTABLE.search(text):
            raise UrlNotAllowed("It has spaces, backslashes or control characters; encode them.")
        if url.scheme not in _PORTS:
            raise UrlNotAllowed("It must begin with https:// or http://.")
        if url.userinfo:
            raise UrlNotAllowed("It must not have a user name or a password.")
        host = url.raw_host.decode("ascii").rstrip(".")
        address = address_of(host)
        if address is None and not is_name(host):
            raise UrlNotAllowed("Its host is neither a name nor an address in its usual form.")
        port = _port_of(url)
        if not 0 < port < 65_536:
            raise UrlNotAllowed("Its port is not a number from 1 to 65535.")
        if not self._destinations.lists(host, port):
            self._refuse_unlisted(host, address, port, url.scheme, only_https=only_https)
        return url.copy_with(host=host, fragment=None)

    def _refuse_unlisted(
        self, host: str, address: Address | None, port: int, scheme: str, *, only_https: bool
    ) -> None:
        if is_local_name(host) if address is None else not is_public(address):
            raise UrlNotAllowed(NOT_PUBLIC)
        ports = self._destinations.ports
        if port not in ports:
            raise UrlNotAllowed(f"Its port is none of {', '.join(map(str, sorted(ports)))}.")
        if only_https and scheme != "https":
            raise UrlNotAllowed("It must begin with https://.")

    @asynccontextmanager
    async def ask(
        self, method: str, url: httpx2.URL, headers: Mapping[str, str], content: bytes = b""
    ) -> AsyncIterator[Answer]:
        """One request to an address that was checked, on a connection of its own. Raises
        UrlNotAllowed, UrlUnreachable, UrlTooSlow. How long it may take is the caller's affair."""
        asked = httpcore2.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
        )
        way = _Way(self._destinations, self._resolve)
        connection = httpcore2.AsyncHTTPConnection(
            asked.origin, ssl_context=self._tls, network_backend=way
        )
        sent = {
            "Host": url.netloc.decode("ascii"),
            "User-Agent": f"faster-whisper-api/{VERSION}",
            "Accept-Encoding": "identity",
        }
        limits = {"connect": CONNECT_SECONDS, "read": IDLE_SECONDS, "write": IDLE_SECONDS}
        has_answered = False
        try:
            async with (
                connection,
                connection.stream(
                    method,
                    asked,
                    headers=list({**sent, **headers}.items()),
                    content=content or None,
                    extensions={"timeout": limits},
                ) as response,
            ):
                has_answered = True
                found = {name.decode("latin-1").lower(): value for name, value in response.headers}
                yield Answer(
                    response.status,
                    {name: value.decode("latin-1") for name, value in found.items()},
                    response.aiter_stream(),
                )
        except httpcore2.TimeoutException as exc:
            raise UrlTooSlow from exc
        except httpcore2.NetworkError as exc:
            is_tls = isinstance(exc.__cause__, ssl.SSLError)
            raise UrlUnreachable("tls" if is_tls else "connection") from exc
        except httpcore2.ProtocolError as exc:
            raise UrlUnreachable("ended" if has_answered else "protocol") from exc
        finally:
            await way.aclose()

    async def _system(self, host: str, port: int) -> Iterable[str]:
        """In threads of its own: a slow name server must not hold up files, which share those of
        asyncio."""
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM
        )
        return [str(address[0]) for *_, address in found]


class _Way(httpcore2.AsyncNetworkBackend):
    """Of one request: resolves, checks, connects to what was checked."""

    def __init__(self, destinations: Destinations, resolve: Resolve):
        self._destinations = destinations
        self._resolve = resolve
        self._connect = httpcore2.AnyIOBackend().connect_tcp
        self._stream: httpcore2.AsyncNetworkStream | None = None

    async def aclose(self) -> None:
        """httpcore leaves the connection open when it is cancelled before TLS is agreed upon."""
        if self._stream:
            await self._stream.aclose()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - its name in httpcore
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,  # noqa: ARG002
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self._addresses(host, port)
        if not all(self._destinations.permits(host, address, port) for address in addresses):
            raise UrlNotAllowed(NOT_PUBLIC)
        for address in addresses:
            try:
                self._stream = await self._connect(str(address), port, timeout)
                return self._stream
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if address == addresses[-1]:
                    raise
        raise UrlUnreachable("name")

    async def _addresses(self, host: str, port: int) -> list[Address]:
        if address := address_of(host):
            return [address]
        try:
            found = [address_of(text) for text in await self._resolve(host, port)]
        except OSError as exc:
            raise UrlUnreachable("name") from exc
        return list(dict.fromkeys(address for address in found if address))

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def origin_of(url: httpx2.URL) -> str:
    """`https://example.org`, with its port if that is not the usual: what may be logged and shown.
    Paths and queries often hold a secret."""
    host = url.raw_host.decode("ascii")
    shown = f"[{host}]" if isinstance(address_of(host), IPv6Address) else host
    port = _port_of(url)
    return f"{url.scheme}://{shown}" + ("" if port == _PORTS[url.scheme] else f":{port}")


def _port_of(url: httpx2.URL) -> int:
    return _PORTS[url.scheme] if url.port is None else url.port
