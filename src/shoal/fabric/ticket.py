"""The one line that lets a machine join a run: where to call, whom to expect there, and the secret to show.

    shoal1 + base64url( MessagePack [protocol version, run, endpoints, coordinator's public key, secret] + checksum )

The ticket carries no certificate: the coordinator's certificate authority is a function of its public key
(`fabric.tls`), so that 32 bytes pin both the TLS server and the signer of its answers, and a coordinator that
restarts with its identity keeps old tickets valid.

Invariants: a mistyped or cut-off ticket is noticed before anything is dialled; a ticket that decodes names only
endpoints that `fabric.endpoint` allows. A ticket is a secret: it is never logged, and `repr` hides what matters.
"""

from __future__ import annotations

import base64
import binascii
import re

import msgspec
from blake3 import blake3

from shoal import PROTOCOL_VERSION
from shoal.errors import TicketError
from shoal.fabric.endpoint import Endpoint
from shoal.fabric.identity import PUBLIC_KEY_BYTES

PREFIX = "shoal1"
CHECKSUM_BYTES = 4
MIN_SECRET_BYTES = 16
MAX_ENDPOINTS = 8
MAX_TICKET_CHARS = 4096

ASK_AGAIN = "Copy the whole line again as `shoal train` printed it."


class Ticket(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Permission to join one run."""

    protocol_version: int
    run: str
    endpoints: tuple[str, ...]
    """Addresses of the coordinator, the likeliest first; see `fabric.endpoint`."""
    coordinator_key: bytes
    """Raw public key of the coordinator: its TLS certificate and its answers are checked against it."""
    secret: bytes
    """Shown, as a keyed hash, by whoever joins."""

    def __repr__(self) -> str:
        return f"Ticket(run={self.run!r}, endpoints={self.endpoints!r})"

    def encode(self) -> str:
        """The ticket as one line of text."""
        payload = msgspec.msgpack.encode(self)
        return PREFIX + base64.urlsafe_b64encode(payload + _checksum(payload)).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Ticket:
        """The ticket written as `text`; white space, as a terminal's line wrap leaves it, is ignored.

        Raises:
            TicketError: not a ticket, damaged in copying, or made by another version of Shoal.
        """
        line = "".join(text.split()).strip("\"'`")
        if not re.match(r"shoal\d", line) or len(line) > MAX_TICKET_CHARS:
            raise TicketError("this is not a join ticket: a ticket starts with “shoal1”.", ASK_AGAIN)
        if not line.startswith(PREFIX):
            raise TicketError(
                f"this ticket was made by another version of Shoal (it starts with {line[:6]!r}, not {PREFIX!r}).",
                "Install the version that the coordinator runs.",
            )
        body = line[len(PREFIX) :]
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            data = b""
        payload, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        if not payload or checksum != _checksum(payload):
            raise TicketError("this ticket is cut off or mistyped: its checksum does not match.", ASK_AGAIN)
        return _read(payload)


def _read(payload: bytes) -> Ticket:
    # The version is read by itself first, so that a ticket of another shape is still answered by its version.
    try:
        fields = msgspec.msgpack.decode(payload, type=list[msgspec.Raw])
        version = msgspec.msgpack.decode(fields[0], type=int) if fields else 0
    except (msgspec.DecodeError, RecursionError):
        raise TicketError("this ticket is damaged inside, though its checksum matches.", ASK_AGAIN) from None
    if version != PROTOCOL_VERSION:
        raise TicketError(
            f"this ticket is for protocol version {version}; this Shoal speaks version {PROTOCOL_VERSION}.",
            "Install the version that the coordinator runs.",
        )
    try:
        ticket = msgspec.msgpack.decode(payload, type=Ticket)
        for endpoint in ticket.endpoints:
            Endpoint.parse(endpoint)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise TicketError(f"this ticket cannot be used: {error}.", ASK_AGAIN) from None
    if (
        not ticket.run
        or len(ticket.run) > 256
        or not 1 <= len(ticket.endpoints) <= MAX_ENDPOINTS
        or len(ticket.coordinator_key) != PUBLIC_KEY_BYTES
        or len(ticket.secret) < MIN_SECRET_BYTES
    ):
        raise TicketError("this ticket cannot be used: a field is empty or has the wrong length.", ASK_AGAIN)
    return ticket


def _checksum(payload: bytes) -> bytes:
    return blake3(b"shoal ticket" + payload).digest(CHECKSUM_BYTES)
