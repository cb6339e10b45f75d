"""What goes wrong between nodes, where the caller may want to tell one refusal from another."""

from __future__ import annotations

from typing import Literal, get_args

from shoal.errors import NetworkError, RecordError

RefusalKind = Literal[
    "busy",
    "stranger",
    "size",
    "malformed",
    "version",
    "key",
    "audience",
    "signature",
    "clock",
    "replay",
    "seal",
    "refused",
    "internal",
]
"""Why an envelope or a request was not acted on. `refused`: the handler said no (a `ShoalError`); `internal`: the
handler failed; `busy`: its queue was full; the others name what was wrong with the envelope."""

REFUSAL_KINDS: frozenset[str] = frozenset(get_args(RefusalKind))


class RemoteError(NetworkError):
    """The other side received the request and refused it; `kind` says why.

    `error_type` is the name of the `ShoalError` class that the handler raised, empty for other refusals.
    """

    def __init__(self, kind: RefusalKind, problem: str, remedy: str = "", error_type: str = "") -> None:
        super().__init__(problem, remedy)
        self.kind: RefusalKind = kind
        self.error_type = error_type


class EnvelopeError(RecordError):
    """An envelope that must not be acted on; `kind` is what the sender is told."""

    def __init__(self, kind: RefusalKind, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.kind: RefusalKind = kind
