"""How long a question for a chunk waits before it is asked again: answers are lost with their connections.

    seconds = RETRY_S + SLACK · (bytes in flight) / (bytes per second so far) · 2^(times it was too short)

A pure state machine; times are seconds of a clock that never goes back.

Invariants: never longer than the slowest acceptable link needs; a link that became slower is not asked again and again
for what is under way: the time doubles, at most once a round, until answers come.
"""

from __future__ import annotations

RETRY_S = 5.0
"""A busy or distant source may take so long to answer at all."""

SLACK = 3.0
"""Answers come in any order, and others use the link too."""

ASSUMED_BYTES_PER_S = 1e6
"""As long as too little came to tell a rate. On a slower link some chunks then come twice."""


class AskTime:
    """Of one transfer.

    Args:
        in_flight: questions that share the link.
        min_bytes_per_s: a slower link is taken for a dead one.
    """

    def __init__(self, in_flight: int, min_bytes_per_s: float, now: float) -> None:
        self._in_flight = in_flight
        self._min_bytes_per_s = min_bytes_per_s
        self._started_at = self._arrived_at = now
        self._num_bytes = 0
        self._factor = 1
        self._next_doubling = now

    def arrived(self, num_bytes: int, now: float) -> None:
        """A chunk came."""
        self._num_bytes += num_bytes
        self._arrived_at = now

    def late(self, size: int, now: float) -> None:
        """A question for this many bytes was not answered in time."""
        if now >= self._next_doubling:
            self._factor *= 2
            self._next_doubling = now + self.seconds(size) / 2

    def seconds(self, size: int) -> float:
        """For a question for this many bytes."""
        longest = RETRY_S + SLACK * self._in_flight * size / self._min_bytes_per_s
        rate = ASSUMED_BYTES_PER_S
        if self._num_bytes >= self._in_flight * size:
            # Not counted: the time since the last chunk, which may be the very silence that matters.
            rate = self._num_bytes / max(1e-3, self._arrived_at - self._started_at)
        return min(longest, RETRY_S + self._factor * SLACK * self._in_flight * size / rate)
