"""How many completions are in the house at once, and when somebody who is turned away should come back.

Invariant: no more than `limit` completions are admitted; each that came in goes out, however it ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.serving.errors import ApiError

LONGEST_RETRY_S = 60


class Gate:
    """Counts completions from admission to end.

    Args:
        limit: completions drawn and waiting, together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside = 0
        self.turned_away = 0
        self._mean_s = 1.0

    @contextmanager
    def enter(self, count: int, clock_s: float) -> Iterator[_Stay]:
        """Admit `count` completions for as long as the block runs.

        Raises:
            ApiError: 429, with the time after which a place is likely; 400 where it would never fit.
        """
        if count > self.limit:
            raise ApiError(400, f"this server draws at most {self.limit} completions at once.", param="n")
        if self.inside + count > self.limit:
            self.turned_away += 1
            raise ApiError(
                429,
                "The server has as many requests as it takes. Try again later.",
                code="overloaded",
                retry_after_s=self.retry_after_s(),
            )
        self.inside += count
        stay = _Stay(clock_s)
        try:
            yield stay
        finally:
            self.inside -= count
            if stay.ended_s is not None:
                self._mean_s += 0.1 * (stay.ended_s - stay.started_s - self._mean_s)

    def retry_after_s(self) -> int:
        """A tenth of those inside should be gone after a tenth of the time that one takes."""
        return max(1, min(LONGEST_RETRY_S, math.ceil(self._mean_s / 10)))


class _Stay:
    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.ended_s: float | None = None

    def end(self, now_s: float) -> None:
        """Tell when it was over, so that others can be told how long one takes."""
        self.ended_s = now_s
