"""A tool's card: what it is called, what it takes and gives, and how it may be used.

The schemas and the description may come from a stranger's server, so they are bounded and checked before use; how a
tool may be used (`Use`) is the user's word and never the server's, except that a server may ask for more caution.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from shoal.errors import RecordError
from shoal.protocol.codec import Record

MAX_DESCRIPTION_CHARS = 4000
MAX_SCHEMA_BYTES = 64 * 1024
MAX_NAME_CHARS = 128

_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_NAME_CHARS}}}")

Mode = Literal["sync", "async"]
"""`sync`: the model decides again when the call is done. `async`: the model has a handle at once, and is told later."""


class Use(Record, frozen=True):
    """How a tool may be used: the part of a card that its user decides."""

    mode: Mode = "sync"
    max_concurrency: int = 8
    timeout_s: float = 60.0
    """Without an answer or a sign of progress for this long, a call has failed."""
    max_retries: int = 2
    idempotent: bool = False
    """Whether a call may be made again when nobody knows if it was carried out."""
    needs_approval: bool = False
    """Whether somebody is asked before each call."""
    cost_usd: float = 0.0
    """Of one attempt."""

    def check(self) -> None:
        if not 1 <= self.max_concurrency <= 4096:
            raise RecordError(f"max_concurrency = {self.max_concurrency} is not between 1 and 4096.")
        if not 0 < self.timeout_s <= 86400:
            raise RecordError(f"timeout_s = {self.timeout_s} is not between 0 and 86400.")
        if not 0 <= self.max_retries <= 16:
            raise RecordError(f"max_retries = {self.max_retries} is not between 0 and 16.")
        if not 0 <= self.cost_usd < 1e6:
            raise RecordError(f"cost_usd = {self.cost_usd} is not between 0 and a million.")


class ToolCard(Record, frozen=True):
    """One tool, as the model and the scheduler see it."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON schema of the arguments, an object."""
    output: dict[str, Any] | None = None
    """JSON schema of the value; absent: any."""
    use: Use = Use()

    def check(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RecordError(f"a tool is called {self.name[:200]!r}: letters, digits, '_', '.' and '-' are possible.")
        if len(self.description) > MAX_DESCRIPTION_CHARS:
            raise RecordError(f"the description of {self.name} has {len(self.description)} characters.")
        for schema in (self.parameters, self.output):
            if schema is not None and len(msgspec.json.encode(schema)) > MAX_SCHEMA_BYTES:
                raise RecordError(f"a schema of {self.name} exceeds {MAX_SCHEMA_BYTES} bytes.")
        if self.parameters.get("type") != "object":
            raise RecordError(f"the parameters of {self.name} are no object.")
        self.use.check()
