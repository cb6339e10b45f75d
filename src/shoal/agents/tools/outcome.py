"""What comes of a call: a value or a typed failure, bounded in size.

Invariant: an outcome is immutable JSON of at most `MAX_VALUE_BYTES`; a failure says whether trying again can help, and
whether the tool may have acted although no answer came.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from shoal.protocol.codec import Record

MAX_VALUE_BYTES = 256 * 1024
"""Longer values are cut, and say so: they stay in memory and in the log for as long as the run does."""

MAX_MESSAGE_CHARS = 2000
"""A failure's message; tools send whole tracebacks."""

FailureKind = Literal[
    "error",
    "timeout",
    "unavailable",
    "disconnected",
    "malformed",
    "arguments",
    "denied",
    "dependency",
    "interrupted",
    "cancelled",
    "budget",
]
"""`error`: the tool said so; `timeout`: its deadline passed; `unavailable`: it was never reached; `disconnected`: its
connection broke during the call; `malformed`: its answer does not match its card; `arguments`: the call does not match
the card; `denied`: not permitted, or not approved; `dependency`: a call it needs failed; `interrupted`: the scheduler
itself was killed during the call; `cancelled`, `budget`: the run ended it."""

MAY_HAVE_ACTED: frozenset[FailureKind] = frozenset({"timeout", "disconnected", "malformed", "interrupted"})
"""After these nobody knows what the tool has done, so only idempotent tools are tried again. (A tool that says itself
that a call may be made again is believed.)"""


class Success(Record, frozen=True):
    """What the tool answered."""

    value: Any
    """JSON: structured content where the tool gives it, else text."""


class Failure(Record, frozen=True):
    """Why there is no answer."""

    kind: FailureKind
    message: str
    retryable: bool = False
    retry_after_s: float = 0.0
    """Before this, trying again cannot help."""


Outcome = Success | Failure


def failure(kind: FailureKind, message: str, *, retryable: bool = False, retry_after_s: float = 0.0) -> Failure:
    """A failure whose message is one bounded paragraph."""
    text = " ".join(message.split())
    return Failure(kind=kind, message=text[:MAX_MESSAGE_CHARS], retryable=retryable, retry_after_s=retry_after_s)


def success(value: Any) -> Outcome:
    """The value, cut to what is kept; `malformed` where it is not JSON."""
    try:
        data = msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        return failure("malformed", f"the answer is not JSON: {error}")
    if len(data) <= MAX_VALUE_BYTES:
        return Success(value=value)
    text = value if isinstance(value, str) else data.decode()
    # Six bytes a character at most, where it is written as an escape: an eighth of the limit always fits.
    return Success(value=f"{text[: MAX_VALUE_BYTES // 8]} [cut: {len(text)} characters in all]")
