"""What people watch: one stream of events from every node, and the metrics of every learner step."""

from __future__ import annotations

from typing import Any

from shoal.errors import RecordError
from shoal.protocol.codec import Record


class Event(Record, frozen=True):
    """Something that happened, for people and tests. `data` is small and JSON-like."""

    time: float
    """Unix seconds on the clock of the node that saw it."""
    node: str
    kind: str
    """Dotted words, the room first: `lease.expired`, `worker.joined`, `snapshot.published`."""
    data: dict[str, Any] = {}

    def check(self) -> None:
        if not self.kind or len(self.kind) > 128 or len(self.node) > 256:
            raise RecordError("an event's kind is empty, or its kind or node too long.")
