"""What a worker tells of the versions that come to it: how far one is, and from whom the last ones came.

Invariant: a version that came is told until a heartbeat that told it was answered; only the newest are kept.
"""

from __future__ import annotations

from collections import deque

from shoal.protocol.work import MAX_ARRIVALS, Arrived, Fetching


class Arrivals:
    """One worker's."""

    def __init__(self) -> None:
        self.fetching: Fetching | None = None
        """What is under way."""
        self._arrived: deque[Arrived] = deque(maxlen=MAX_ARRIVALS)

    def here(self, arrived: Arrived) -> None:
        """A version has come; nothing is told of one that was here already."""
        self.fetching = None
        if arrived.by_source:
            self._arrived.append(arrived)

    @property
    def untold(self) -> tuple[Arrived, ...]:
        """What the coordinator does not know yet."""
        return tuple(self._arrived)

    def told(self, those: tuple[Arrived, ...]) -> None:
        """The coordinator has answered to these."""
        for one in those:
            if one in self._arrived:
                self._arrived.remove(one)

    @property
    def share(self) -> str:
        """How much of the version under way is here, for people."""
        now = self.fetching
        return "" if now is None else f": {now.bytes_done:,} of {now.bytes_total:,} bytes"
