"""Which addresses the service may connect to because a caller named them: public ones, and what the
operator lists in EGRESS_ALLOW. Rules only; api/egress.py resolves names and connects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

Address = IPv4Address | IPv6Address

USUAL_PORTS = frozenset({80, 443, 8080, 8443})

# IANA's registries of special-purpose addresses, multicast, and Azure's service of each machine.
_NOT_PUBLIC_4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
    )
)
# Of IPv6 only this is handed out to the public, but for tunnels (Teredo, 6to4), documentation and
# protocols of the IETF.
_PUBLIC_6 = IPv6Network("2000::/3")
_NOT_PUBLIC_6 = tuple(
    IPv6Network(text)
    for text in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)
_NAT64 = IPv6Network("64:ff9b::/96")  # names that have IPv4 only, in a network that has IPv6 only

_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LOCAL_NAMES = ("localhost", "local", "internal", "home.arpa", "lan", "home", "corp")


def address_of(host: str) -> Address | None:
    """The address that a host is, written as addresses are; None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def is_name(host: str) -> bool:
    """A name by the rules of DNS, lower-case. `127.1`, `0x7f000001` and `2130706433` are none: old
    libraries take them for addresses."""
    return bool(_NAME.fullmatch(host)) and not _NUMBER.fullmatch(host.rpartition(".")[2])


def is_local_name(host: str) -> bool:
    """Names that mean something in one network only."""
    return "." not in host or any(host.endswith(f".{each}") for each in _LOCAL_NAMES)


def is_public(address: Address) -> bool:
    address = _plain(address)
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    if address.scope_id is not None or address not in _PUBLIC_6:
        return False
    return not any(address in network for network in _NOT_PUBLIC_6)


def _plain(address: Address) -> Address:
    """The IPv4 address that a mapped or translated one leads to."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address


@dataclass(frozen=True)
class Listed:
    """One entry of EGRESS_ALLOW."""

    name: str  # '' for a network
    network: IPv4Network | IPv6Network | None
    port: int | None  # None: any

    @classmethod
    def of(cls, text: str) -> Listed:
        """`receiver.internal`, `10.0.0.0/8`, `127.0.0.1:9000`, `[::1]:9000`. Raises ValueError."""
        host, port = text.lower(), None
        if match := re.fullmatch(r"(\[.*\]|[^:]*):(\d{1,5})", host):
            host, port = match[1], int(match[2])
        if port is not None and not 0 < port < 65_536:
            raise ValueError(f"{text!r}: a port is a number from 1 to 65535")
        host = host.removeprefix("[").removesuffix("]")
        try:
            return cls("", ip_network(host), port)
        except ValueError:
            if not is_name(host):
                raise ValueError(
                    f"{text!r} is no name, address or network; write receiver.internal, "
                    "10.0.0.0/8 or 127.0.0.1:9000"
                ) from None
            return cls(host, None, port)


class Destinations:
    """What may be connected to."""

    def __init__(self, allow: str = "", ports: frozenset[int] = USUAL_PORTS):
        """`allow`: EGRESS_ALLOW. `ports`: of what is not listed there. Raises ValueError."""
        self.ports = ports
        self._listed = tuple(Listed.of(part) for part in map(str.strip, allow.split(",")) if part)

    def lists(self, host: str, port: int) -> bool:
        """Has the operator listed this very name, or the network of this address?"""
        address = address_of(host)
        return any(
            entry.port in {None, port}
            and (entry.name == host if address is None else _contains(entry, address))
            for entry in self._listed
        )

    def permits(self, host: str, address: Address, port: int) -> bool:
        """May we connect to `address`, which is what `host` resolved to?"""
        return is_public(address) or self.lists(host, port) or self.lists(str(address), port)


def _contains(entry: Listed, address: Address) -> bool:
    return entry.network is not None and _plain(address) in entry.network
