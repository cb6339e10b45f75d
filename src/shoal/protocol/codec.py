"""Records to bytes and back, with bounds: the only place where bytes from elsewhere become objects.

Invariants: `decode(encode(r), type(r)) == r` for every record; hostile bytes end in `RecordError`, never in another
exception; nothing larger than `max_bytes` is parsed; unknown fields are refused (each record forbids them), so a
newer peer's message is an error to name and not a value to lose. After parsing, a record's `check()` (its ranges and
cross-field rules) has passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from shoal.errors import RecordError

R = TypeVar("R", bound="Record")

MAX_RECORD_BYTES = 64 * 2**20
"""The largest record decoded when the caller names no limit of its own."""

MAX_LINE_BYTES = 64 * 2**20
"""The longest line read from a JSON Lines file."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all records: immutable, keyword-only, unknown fields refused."""

    def check(self) -> None:
        """Raise `RecordError` where a value is out of range or two fields contradict each other."""


def encode(record: Record) -> bytes:
    """MessagePack bytes of one record."""
    return msgspec.msgpack.encode(record)


def decode(data: bytes | memoryview, kind: type[R], *, max_bytes: int = MAX_RECORD_BYTES) -> R:
    """The record of type `kind` in `data`, checked.

    Raises:
        RecordError: `data` is too large, malformed, of another type, or fails the record's own check.
    """
    if len(data) > max_bytes:
        raise RecordError(f"a {kind.__name__} of {len(data)} bytes exceeds the limit of {max_bytes} bytes.")
    try:
        record = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise RecordError(f"bytes that should be a {kind.__name__} are not: {error}.") from None
    record.check()
    return record


def to_json(record: Record) -> bytes:
    """One line of JSON, without the newline."""
    return msgspec.json.encode(record)


def from_json(line: bytes | str, kind: type[R]) -> R:
    """The record of type `kind` in one line of JSON, checked; raises `RecordError` as `decode` does."""
    if len(line) > MAX_LINE_BYTES:
        raise RecordError(f"a line of {len(line)} characters exceeds the limit of {MAX_LINE_BYTES}.")
    try:
        record = msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise RecordError(f"a line that should be a {kind.__name__} is not: {error}.") from None
    record.check()
    return record


def read_jsonl(path: Path, kind: type[R]) -> Iterator[R]:
    """The records of a JSON Lines file, in order.

    A last line without its newline is what a killed writer leaves behind: it is skipped. Any other bad line raises.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield from_json(line, kind)
            except RecordError as error:
                raise RecordError(f"{path}, line {number}: {error.problem}") from None


def builtins(record: Record) -> Any:
    """The record as dicts, lists and scalars, for printing and for JSON that holds several records."""
    return msgspec.to_builtins(record)
