"""Addresses as Zenoh writes them (`tls/192.0.2.1:7447`): parsing, and the rule that plain TCP stays on loopback."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from shoal.errors import NetworkError

HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


class Endpoint(NamedTuple):
    """One address of a node. `host` is an IPv4 or IPv6 address (without brackets) or a host name."""

    scheme: Literal["tcp", "tls"]
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}/{host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """The endpoint written as `text`.

        Raises:
            ValueError: it is no endpoint, or plain TCP to a machine that is not this one.
        """
        scheme, _, rest = text.partition("/")
        host, _, port = rest.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = str(ipaddress.IPv6Address(host[1:-1]))
        elif not HOST_NAME.fullmatch(host):
            raise ValueError(f"{text!r} names no host")
        if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
            raise ValueError(f"{text!r} names no port between 1 and 65535")
        if scheme == "tls":
            return cls("tls", host, int(port))
        if scheme != "tcp":
            raise ValueError(f"{text!r} starts with neither tcp/ nor tls/")
        if not is_loopback(host):
            raise ValueError(f"{text!r} is plain TCP to another machine")
        return cls("tcp", host, int(port))


def is_loopback(host: str) -> bool:
    """Whether `host`, an address or `localhost`, is this machine itself; other names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def resolve(host: str) -> str:
    """The address to bind for `host`.

    Raises:
        NetworkError: the name is unknown.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise NetworkError(
            f"the host name {host!r} is unknown: {error.strerror}.",
            "Give an address of this machine, such as 127.0.0.1.",
        ) from error
    return str(found[0][4][0])


def reachable_addresses(address: str) -> list[str]:
    """Addresses at which others may reach a socket bound to `address`: itself, or this machine's for a wildcard."""
    bound = ipaddress.ip_address(address)
    if not bound.is_unspecified:
        return [address]
    found: list[str] = []
    # Connecting a datagram socket sends nothing; it makes the system choose the address it would send from.
    families = [(socket.AF_INET, "192.0.2.1", "127.0.0.1")]
    if bound.version == 6:
        families.insert(0, (socket.AF_INET6, "2001:db8::1", "::1"))
    for family, probe, loopback in families:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as datagram:
                datagram.connect((probe, 9))
                found.append(datagram.getsockname()[0])
        except OSError:
            pass  # No route in this family: only loopback can be offered.
        found.append(loopback)
    return list(dict.fromkeys(found))


def advertised(told: Iterable[str], own: Sequence[str]) -> tuple[str, ...]:
    """The endpoints of a listener as others are told them: those its owner names first, then its own.

    Args:
        told: `host` or `host:port` each, such as the public address of a machine behind NAT.
        own: endpoints of the listener; scheme and port are theirs where they are not told.

    Raises:
        ValueError: something told is no address.
    """
    listener = Endpoint.parse(own[0])
    found: list[str] = []
    for address in told:
        host = f"[{address}]" if address.count(":") > 1 and not address.startswith("[") else address
        has_port = host.rpartition(":")[2].isdigit()
        found.append(str(Endpoint.parse(f"{listener.scheme}/{host}" + ("" if has_port else f":{listener.port}"))))
    return tuple(dict.fromkeys([*found, *own]))
