"""What a caller names is connected to only if it is public, or listed; and nothing else ever is."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import httpx2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from api.egress import Egress, origin_of
from shared.destinations import Destinations, Listed, is_public
from shared.errors import RequestError, UrlNotAllowed, UrlTooSlow, UrlUnreachable
from tests.receiver import Canary, Receiver, Reply

NAME = "hooks.example.org"


class Names:
    """A resolver that knows these names, and counts who asks."""

    def __init__(self, **addresses: list[str]):
        self._addresses = {name.replace("_", "."): found for name, found in addresses.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Iterable[str]:
        self.asked.append(host)
        if host not in self._addresses:
            raise OSError("no such name")
        return self._addresses[host]


async def ask(egress: Egress, url: str, method: str = "GET") -> tuple[int, bytes]:
    """(status, body). Without Egress.check: the connection has checks of its own."""
    async with egress.ask(method, httpx2.URL(url), {}) as answer:
        return answer.status, b"".join([chunk async for chunk in answer.body])


@pytest.fixture
def canaries() -> Iterator[list[Canary]]:
    """On every loopback address that the URLs below could mean, all on one port."""
    with Canary("127.0.0.1") as first, Canary("::1", first.port) as second:
        yield [first, second]


# --- Nothing that is not public is asked ----------------------------------------------------------

LOOPBACK = [
    "http://127.0.0.1:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://127.8.8.8:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0x0.0x0.0x1:{port}/",
    "http://0x7f.1:{port}/",
    "http://017700000001:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://127.0.0.0x1:{port}/",
    "http://①②⑦.⓪.⓪.①:{port}/",
    "http://127。0。0。1:{port}/",
    "http://0.0.0.0:{port}/",
    "http://0:{port}/",
    "http://localhost:{port}/",
    "http://LOCALHOST.:{port}/",
    "http://app.localhost:{port}/",
    "http://[::1]:{port}/",
    "http://[0:0:0:0:0:0:0:1]:{port}/",
    "http://[::]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::127.0.0.1]:{port}/",
    "http://[64:ff9b:1::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[2001:0:7f00:1::1]:{port}/",
    "http://[fe80::1%25lo]:{port}/",
    "http://user@127.0.0.1:{port}/",
    "http://example.org@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}#@example.org/",
    "http://example.org\\@127.0.0.1:{port}/",
    "http://127.0.0.1%00.example.org:{port}/",
    "HTTP://127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/_PING",
    "file:///etc/passwd",
    "ftp://127.0.0.1:{port}/",
]
ELSEWHERE = [
    "http://169.254.169.254/latest/meta-data/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://100.100.100.200/",
    "http://168.63.129.16/",
    "http://192.0.0.192/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://198.18.0.1/",
    "http://224.0.0.1/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://[fc00::1]/",
    "http://[ff02::1]/",
    "http://[2001:db8::1]/",
    "http://redis/",
    "http://printer.local/",
]


@pytest.mark.parametrize("url", [*LOOPBACK, *ELSEWHERE])
async def test_an_address_that_is_not_public_is_refused_and_never_connected_to(canaries, url):
    """Twice: by its text when it is submitted, and by its addresses when it is connected to, where
    names are resolved as this machine does, which takes 127.1 and 0x7f.1 for 127.0.0.1."""
    port = canaries[0].port
    url = url.format(port=port)
    egress = Egress(Destinations(ports=frozenset({80, port})))
    with pytest.raises(UrlNotAllowed) as caught:
        egress.check("url", url, only_https=False)
    assert caught.value.message.startswith("url: It")
    with suppress(httpx2.InvalidURL):
        if httpx2.URL(url).scheme in {"http", "https"}:
            with pytest.raises(RequestError):
                await asyncio.wait_for(ask(egress, url), 5)
    egress.close()
    assert [canary.accepted for canary in canaries] == [0, 0]


async def test_the_canaries_would_have_noticed(canaries):
    """The same addresses, listed, are connected to."""
    port = canaries[0].port
    egress = Egress(Destinations("127.0.0.0/8,::1,localhost"))
    for url in (f"http://127.0.0.1:{port}/", f"http://[::1]:{port}/", f"http://localhost:{port}/"):
        egress.check("url", url, only_https=False)
        with pytest.raises(UrlUnreachable):
            await ask(egress, url)
    egress.close()
    assert sum(canary.accepted for canary in canaries) >= 3


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.1.2.3", "10.2.3.4", "169.254.169.254", "100.64.1.1", "0.0.0.0"),
        *("192.168.0.1", "172.31.255.255", "224.0.0.251", "255.255.255.255", "198.19.0.1"),
        *("::1", "::", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "fe80::1"),
        *("fe80::1%1", "fd00::1", "ff02::1", "::127.0.0.1", "2001:db8::1", "168.63.129.16"),
    ],
)
async def test_a_name_that_resolves_to_such_an_address_is_not_connected_to(canaries, address):
    """Alone, and behind a public one: what an attacker's name server says is all checked."""
    port = canaries[0].port
    assert not is_public(ip_address(address))
    for found in ([address], ["93.184.216.34", address]):
        egress = Egress(Destinations(), Names(hooks_example_org=found))
        with pytest.raises(UrlNotAllowed):
            await ask(egress, f"http://{NAME}:{port}/")
        egress.close()
    assert [canary.accepted for canary in canaries] == [0, 0]


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "64:ff9b::101:101", "172.32.0.1"]
)
def test_public_addresses_are_public(address):
    assert is_public(ip_address(address))


async def test_a_name_is_resolved_once_and_its_checked_address_is_connected_to():
    """DNS rebinding: the second answer of a name server would be another."""

    async def rebinding(host: str, port: int) -> Iterable[str]:
        answers.append(host)
        return ["127.0.0.1"] if len(answers) == 1 else ["127.0.0.2"]

    answers: list[str] = []
    with Receiver() as receiver, Canary("127.0.0.2", receiver.port) as canary:
        egress = Egress(Destinations(f"127.0.0.1:{receiver.port}"), rebinding)
        url = f"http://{NAME}:{receiver.port}/"
        assert (await ask(egress, url))[0] == 200
        assert answers == [NAME]
        with pytest.raises(UrlNotAllowed):
            await ask(egress, url)
        egress.close()
        assert (receiver.accepted, canary.accepted) == (1, 0)
    assert receiver.received[0].headers["host"] == f"{NAME}:{receiver.port}"


# --- What is asked --------------------------------------------------------------------------------


async def test_the_next_address_of_a_name_is_tried_when_one_takes_no_connection():
    with Receiver() as receiver:
        names = Names(hooks_example_org=["127.0.0.3", "127.0.0.1"])
        egress = Egress(Destinations("127.0.0.0/8"), names)
        assert await ask(egress, f"http://{NAME}:{receiver.port}/") == (200, b"ok")
        egress.close()


async def test_proxies_of_the_environment_are_not_used(monkeypatch):
    with Receiver() as receiver, Canary() as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            monkeypatch.setenv(name.lower(), f"http://127.0.0.1:{proxy.port}")
        egress = Egress(Destinations("127.0.0.1"))
        assert (await ask(egress, receiver.url()))[0] == 200
        egress.close()
        assert proxy.accepted == 0


async def test_redirects_are_not_followed():
    with Canary() as canary:
        away = Reply(302, {"Location": f"http://127.0.0.1:{canary.port}/"})
        with Receiver(away) as receiver:
            egress = Egress(Destinations("127.0.0.1"))
            assert (await ask(egress, receiver.url()))[0] == 302
            egress.close()
        assert canary.accepted == 0


async def test_who_does_not_answer_has_an_error_for_each_reason():
    with Receiver() as plain, Receiver(Reply(status=99)) as wrong:
        destinations = Destinations("127.0.0.1,hooks.example.org")
        egress = Egress(destinations, Names(hooks_example_org=[]))
        for url, reason in [
            ("http://nowhere.example.org/", "name"),
            ("http://hooks.example.org/", "name"),
            ("http://127.0.0.1:1/", "connection"),
            (wrong.url(), "protocol"),
            (f"https://127.0.0.1:{plain.port}/", "tls"),
        ]:
            with pytest.raises(UrlUnreachable) as caught:
                await ask(egress, url)
            assert caught.value.reason == reason, url
        egress.close()


async def test_headers_without_end_are_not_read_to_their_end():
    endless = Reply(200, {"X-Long": "x" * 300_000})
    with Receiver(endless) as receiver:
        egress = Egress(Destinations("127.0.0.1"))
        with pytest.raises(UrlUnreachable) as caught:
            await ask(egress, receiver.url())
        egress.close()
    assert caught.value.reason == "protocol"


async def test_a_connection_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr("api.egress.IDLE_SECONDS", 0.1)
    tested = threading.Event()
    with Receiver(Reply(after=tested.wait)) as receiver:
        egress = Egress(Destinations("127.0.0.1"))
        with pytest.raises(UrlTooSlow):
            await ask(egress, receiver.url())
        egress.close()
        tested.set()


async def test_a_connection_that_is_given_up_is_closed():
    """Also in the middle of a handshake that the other side never ends."""
    ended = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        ended.set()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    egress = Egress(Destinations("127.0.0.1"))
    for scheme in ("http", "https"):
        ended.clear()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await ask(egress, f"{scheme}://127.0.0.1:{port}/")
        await asyncio.wait_for(ended.wait(), 5)
    egress.close()
    server.close()
    await server.wait_closed()


@pytest.fixture
def authority(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(of a server that is hooks.example.org, of a client that trusts it)"""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key)
    return serving, ssl.create_default_context(cafile=certificate)


async def test_tls_is_spoken_with_the_name_and_the_certificate_must_have_it(authority):
    """Although the connection goes to an address."""
    serving, trusting = authority
    said: list[str | None] = []
    serving.sni_callback = lambda _, name, __: said.append(name)
    with Receiver(tls=serving) as receiver:
        names = Names(hooks_example_org=["127.0.0.1"], other_example_org=["127.0.0.1"])
        egress = Egress(Destinations("127.0.0.1"), names, trusting)
        assert (await ask(egress, receiver.url(host=NAME)))[0] == 200
        with pytest.raises(UrlUnreachable) as caught:
            await ask(egress, receiver.url(host="other.example.org"))
        assert caught.value.reason == "tls"
        egress.close()
        strict = Egress(Destinations("127.0.0.1"), names)
        with pytest.raises(UrlUnreachable) as caught:
            await ask(strict, receiver.url(host=NAME))
        strict.close()
    assert caught.value.reason == "tls", "this machine does not trust it"
    assert said[0] == NAME
    assert len(receiver.received) == 1


# --- What the operator lists ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "allow", "only_https", "wanted"),
    [
        ("https://hooks.example.org/a?b=c#d", "", True, "https://hooks.example.org/a?b=c"),
        ("https://HOOKS.example.org.:8443/", "", True, "https://hooks.example.org:8443/"),
        ("https://exämple.org/ü", "", True, "https://xn--exmple-cua.org/%C3%BC"),
        ("https://1.1.1.1/", "", True, "https://1.1.1.1/"),
        ("https://[2606:4700::1111]/", "", True, "https://[2606:4700::1111]/"),
        ("http://hooks.example.org/", "", False, "http://hooks.example.org/"),
        ("http://hooks.example.org/", "", True, None),
        ("https://hooks.example.org:22/", "", True, None),
        ("https://hooks.example.org:6379/", "", False, None),
        ("http://receiver:9000/", "receiver", True, "http://receiver:9000/"),
        ("http://receiver:9000/", "receiver:9000", True, "http://receiver:9000/"),
        ("http://receiver:9001/", "receiver:9000", True, None),
        ("http://other:9000/", "receiver", True, None),
        ("http://10.1.2.3:9000/", "10.0.0.0/8", True, "http://10.1.2.3:9000/"),
        ("http://11.1.2.3:9000/", "10.0.0.0/8", True, None),
        ("http://10.1.2.3:9000/", "10.0.0.0/8:80", True, None),
        ("http://127.0.0.1:9/", "localhost", True, None),
        ("http://[::1]:9/", "[::1]:9", True, "http://[::1]:9/"),
        ("http://[::ffff:10.0.0.1]/", "10.0.0.1", True, "http://[::ffff:10.0.0.1]/"),
        ("http://receiver:0/", "receiver", True, None),
        ("http://receiver:65536/", "receiver", True, None),
        ("https://hooks.example.org/" + "x" * 2048, "", True, None),
        ("https://hooks.example.org/a b", "", True, None),
        ("hooks.example.org/a", "", True, None),
        ("", "", True, None),
    ],
)
def test_what_may_be_named(url, allow, only_https, wanted):
    egress = Egress(Destinations(allow))
    if wanted is None:
        with pytest.raises(UrlNotAllowed, match=r"^webhook_url: It"):
            egress.check("webhook_url", url, only_https=only_https)
    else:
        assert str(egress.check("webhook_url", url, only_https=only_https)) == wanted
    egress.close()


async def test_a_listed_name_may_lead_anywhere_and_a_listed_network_takes_any_name():
    names = Names(receiver=["127.0.0.1"], hooks_example_org=["127.0.0.1"])
    with Receiver() as receiver:
        for allow, host in [("receiver", "receiver"), ("127.0.0.0/8", NAME)]:
            egress = Egress(Destinations(allow), names)
            assert (await ask(egress, receiver.url(host=host)))[0] == 200
            egress.close()
        egress = Egress(Destinations("receiver"), names)
        with pytest.raises(UrlNotAllowed):
            await ask(egress, receiver.url(host=NAME))
        egress.close()
    assert receiver.accepted == 2


@pytest.mark.parametrize("entry", ["10.0.0.1/8", "a b", "http://a", "127.1", "a:0", "a:70000", "["])
def test_an_entry_that_is_none_is_refused_with_what_to_write(entry):
    with pytest.raises(ValueError, match=r"is no name, address or network|a port is"):
        Listed.of(entry)


def test_what_is_logged_has_no_path_and_no_query():
    for url, origin in [
        ("https://hooks.example.org/secret?token=secret", "https://hooks.example.org"),
        ("http://[::1]:9000/secret", "http://[::1]:9000"),
    ]:
        assert origin_of(httpx2.URL(url)) == origin


@given(st.text(max_size=80) | st.builds("http://{}/".format, st.text(max_size=40)))
@example("http://example.org/\ud800")
def test_no_text_makes_the_check_fail_otherwise(text):
    """An address, or UrlNotAllowed; and what it lets pass is not a private address."""
    egress = EGRESS
    with suppress(UrlNotAllowed):
        url = egress.check("url", text, only_https=False)
        assert url.scheme in {"http", "https"}
        with suppress(ValueError):
            assert is_public(ip_address(url.host))


EGRESS = Egress(Destinations())
