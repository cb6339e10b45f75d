"""The one line that lets a machine join a run: where to call, whom to expect there, and the secret to show.

    ticket      = shoal1…    [protocol version, run, endpoints, coordinator's public key, secret, routers]
    router line = shoalr1…   [protocol version, the router's public key, addresses]

Neither carries a certificate: a listener's certificate authority is a function of its public key (`fabric.tls`), so
that 32 bytes pin the TLS server, and the coordinator's pin the signer of its answers too; whoever restarts with its
identity keeps old lines valid.

Invariants: a mistyped or cut-off line is noticed before anything is dialled (`fabric.line`); one that decodes names
only endpoints that `fabric.endpoint` allows, and no more than `MAX_ENDPOINTS` and `MAX_ROUTERS` of them. A ticket is
a secret: it is never logged, and `repr` hides what matters. A router line is none.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from shoal import PROTOCOL_VERSION
from shoal.errors import TicketError
from shoal.fabric.endpoint import Endpoint, is_loopback
from shoal.fabric.identity import PUBLIC_KEY_BYTES
from shoal.fabric.line import MAX_LINE_CHARS, Line

MIN_SECRET_BYTES = 16
MAX_SECRET_BYTES = 64
MAX_RUN_CHARS = 256
MAX_ENDPOINTS = 8
"""Direct addresses of a ticket, and addresses of one router."""

MAX_ROUTERS = 4
"""A node holds a connection to each of them."""

MAX_LINE_FILE_BYTES = 2**16
"""Read of a file that should hold a line; a line is far shorter."""

TICKET = Line("shoal1", "join ticket", "Copy the whole line again as `shoal train` printed it.", b"shoal ticket")
ROUTER = Line("shoalr1", "router line", "Copy the whole line again as `shoal router` printed it.", b"shoal router")


class RouterAddress(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where one router is and whom to expect there."""

    protocol_version: int
    key: bytes
    """Raw public key of the router: its TLS certificate is checked against it."""
    hosts: tuple[str, ...]
    """`host:port` each, the likeliest first; always TLS."""

    @property
    def endpoints(self) -> list[Endpoint]:
        return [Endpoint.parse(f"tls/{host}") for host in self.hosts]

    def encode(self) -> str:
        """The router line."""
        return ROUTER.write(self)

    @classmethod
    def decode(cls, text: str) -> RouterAddress:
        """The router written as `text`.

        Raises:
            TicketError: not a router line, damaged in copying, or made by another version of Shoal.
        """
        router = ROUTER.read(text, cls)
        _check_router(router, ROUTER)
        return router

    @classmethod
    def find(cls, text: str) -> RouterAddress:
        """The router whose line is `text`, or is the file that `text` names.

        Raises:
            TicketError: as `decode`, or there is no such file.
        """
        if text.startswith(ROUTER.prefix[:-1]):
            return cls.decode(text)
        try:
            with Path(text).open("rb") as file:
                return cls.decode(file.read(MAX_LINE_FILE_BYTES).decode(errors="replace"))
        except OSError as error:
            raise TicketError(
                f"{text[:100]!r} is neither a router line nor a file that can be read ({error.strerror}).",
                "Give the line that `shoal router` printed (it starts with shoalr1), or a file that holds it.",
            ) from None


class Ticket(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Permission to join one run."""

    protocol_version: int
    run: str
    endpoints: tuple[str, ...]
    """Direct addresses of the coordinator, the likeliest first; see `fabric.endpoint`."""
    coordinator_key: bytes
    """Raw public key of the coordinator: its TLS certificate and its answers are checked against it."""
    secret: bytes
    """Shown, as a keyed hash, by whoever joins."""
    routers: tuple[RouterAddress, ...] = ()
    """Relays through which the run can be reached when no direct address can, or beside it."""

    def __repr__(self) -> str:
        return f"Ticket(run={self.run!r}, endpoints={self.endpoints!r}, routers={len(self.routers)})"

    def elsewhere(self) -> Ticket:
        """The ticket for other machines: where it has routers, this machine's own loopback is of no use to them."""
        if not self.routers:
            return self
        far = tuple(text for text in self.endpoints if not is_loopback(Endpoint.parse(text).host))
        return msgspec.structs.replace(self, endpoints=far)

    def encode(self) -> str:
        """The ticket as one line of text."""
        line = TICKET.write(self)
        assert len(line) <= MAX_LINE_CHARS
        return line

    @classmethod
    def decode(cls, text: str) -> Ticket:
        """The ticket written as `text`.

        Raises:
            TicketError: not a ticket, damaged in copying, or made by another version of Shoal.
        """
        ticket = TICKET.read(text, cls)
        try:
            for endpoint in ticket.endpoints:
                Endpoint.parse(endpoint)
        except ValueError as error:
            raise TICKET.unusable(str(error)) from None
        if (
            not 1 <= len(ticket.run) <= MAX_RUN_CHARS
            or len(ticket.endpoints) > MAX_ENDPOINTS
            or len(ticket.routers) > MAX_ROUTERS
            or not ticket.endpoints + ticket.routers
            or len(ticket.coordinator_key) != PUBLIC_KEY_BYTES
            or not MIN_SECRET_BYTES <= len(ticket.secret) <= MAX_SECRET_BYTES
        ):
            raise TICKET.unusable("a field is empty or has the wrong length")
        for router in ticket.routers:
            _check_router(router, TICKET)
        return ticket


def _check_router(router: RouterAddress, line: Line) -> None:
    if len(router.key) != PUBLIC_KEY_BYTES or not 1 <= len(router.hosts) <= MAX_ENDPOINTS:
        raise line.unusable("a router's key or addresses have the wrong length")
    try:
        assert router.endpoints
    except ValueError as error:
        raise line.unusable(str(error)) from None
    if router.protocol_version != PROTOCOL_VERSION:
        raise line.unusable("a router in it speaks another version of the protocol")
