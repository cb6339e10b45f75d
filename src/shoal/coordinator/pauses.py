"""How long a worker whose leases bring nothing waits for its next.

Invariant: one broken machine does not use up what the others would have done; one success, and it waits no longer.
"""

from __future__ import annotations

FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 4.0
"""A worker whose leases bring nothing waits this long after the first, twice as long after each further one."""


class Pauses:
    """Of nodes whose last leases brought nothing: how many in a row, and until when they wait."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[int, float]] = {}

    def ended(self, node_id: str, *, fruitful: bool, now: float) -> None:
        """A lease of this node ended."""
        if fruitful:
            self._of.pop(node_id, None)
            return
        attempts = self._of.get(node_id, (0, now))[0] + 1
        self._of[node_id] = (attempts, now + min(FIRST_PAUSE_S * 2 ** min(attempts - 1, 8), MAX_PAUSE_S))

    def waits(self, node_id: str, now: float) -> tuple[int, float]:
        """How many leases in a row brought nothing, and how many seconds the node still waits; 0 where it does not."""
        attempts, until = self._of.get(node_id, (0, now))
        return attempts, max(0.0, until - now)

    def clear(self) -> None:
        """Let everybody ask again."""
        self._of.clear()
