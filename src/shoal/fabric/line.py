"""A record as one line of text that people copy: tickets and router lines.

    line = prefix + base64url( MessagePack [version, …] + checksum )

Invariant: a mistyped or cut-off line is noticed before anything in it is believed. The version is read by itself
first, so that a line of another shape is still answered by its version.
"""

from __future__ import annotations

import base64
import binascii
from typing import NamedTuple, TypeVar

import msgspec
from blake3 import blake3

from shoal import PROTOCOL_VERSION
from shoal.errors import TicketError

CHECKSUM_BYTES = 4
MAX_LINE_CHARS = 4096

T = TypeVar("T", bound=msgspec.Struct)


class Line(NamedTuple):
    """One kind of line, and what is said about a bad one."""

    prefix: str
    """Ends in the digit of the kind's shape."""
    noun: str
    remedy: str
    domain: bytes
    """What the checksum is bound to, so that no kind passes for another."""

    def write(self, record: msgspec.Struct) -> str:
        """The record as a line."""
        payload = msgspec.msgpack.encode(record)
        return self.prefix + base64.urlsafe_b64encode(payload + self._checksum(payload)).decode().rstrip("=")

    def read(self, text: str, record: type[T]) -> T:
        """The record in a line; white space, as a terminal's line wrap leaves it, and quotes are ignored.

        Raises:
            TicketError: no such line, damaged in copying, or made by another version of Shoal.
        """
        line = "".join(text.split()).strip("\"'`")
        kind = self.prefix[:-1]
        if not line.startswith(kind) or not line[len(kind) : len(self.prefix)].isdigit() or len(line) > MAX_LINE_CHARS:
            raise TicketError(f"this is not a {self.noun}: it would start with “{self.prefix}”.", self.remedy)
        if not line.startswith(self.prefix):
            raise TicketError(
                f"this {self.noun} was made by another version of Shoal (it starts with "
                f"{line[: len(self.prefix)]!r}, not {self.prefix!r}).",
                "Install the same version on both machines.",
            )
        body = line[len(self.prefix) :]
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            data = b""
        payload, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        if not payload or checksum != self._checksum(payload):
            raise TicketError(f"this {self.noun} is cut off or mistyped: its checksum does not match.", self.remedy)
        return self._decode(payload, record)

    def _decode(self, payload: bytes, record: type[T]) -> T:
        try:
            fields = msgspec.msgpack.decode(payload, type=list[msgspec.Raw])
            version = msgspec.msgpack.decode(fields[0], type=int) if fields else 0
        except (msgspec.DecodeError, RecursionError, OverflowError):
            raise TicketError(
                f"this {self.noun} is damaged inside, though its checksum matches.", self.remedy
            ) from None
        if version != PROTOCOL_VERSION:
            raise TicketError(
                f"this {self.noun} is for protocol version {version}; this Shoal speaks version {PROTOCOL_VERSION}.",
                "Install the same version on both machines.",
            )
        try:
            return msgspec.msgpack.decode(payload, type=record)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
            raise self.unusable(f"{error}") from None

    def unusable(self, why: str) -> TicketError:
        """The error for a line whose checksum is right and whose content is not."""
        return TicketError(f"this {self.noun} cannot be used: {why}.", self.remedy)

    def _checksum(self, payload: bytes) -> bytes:
        return blake3(self.domain + payload).digest(CHECKSUM_BYTES)
