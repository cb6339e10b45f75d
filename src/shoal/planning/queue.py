"""The order in which groups are started, wait and are consumed: a windowed first-in-first-out queue.

Each group has a number, given when it is first drawn. A group is *pending* (to be leased, again after a lost lease),
*running*, *buffered* (finished) or gone (consumed or swept). A batch takes the R oldest buffered groups whose numbers
lie within `window` of the oldest group that is still open: so quick short rollouts cannot overtake slow long ones by
more than the window, and one slow group holds nobody up inside it. Open is what is pending, or running and not yet
bound to go stale: a group started under a version that is too old by now holds nobody up at all.

Invariants, tested by random walks: no group is consumed twice or after it was swept; nothing staler than S is
consumed; accepted = consumed + swept + buffered; a consumed batch has exactly R groups.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal.planning.staleness import is_fresh, may_start


@dataclass
class GroupQueue:
    """Numbers only: what a group holds is the caller's.

    Args:
        groups_per_step: R.
        max_staleness: S.
        window: look-ahead in groups, at least R.
    """

    groups_per_step: int
    max_staleness: int
    window: int
    next_number: int = 0
    pending: list[int] = field(default_factory=list)
    """Drawn before, to be leased again; oldest first."""
    running: set[int] = field(default_factory=set)
    buffered: dict[int, int] = field(default_factory=dict)
    """Finished groups: number -> version of the oldest token."""
    counts: Counter[str] = field(default_factory=Counter)
    _started: dict[int, int] = field(default_factory=dict)
    """Running groups: number -> version they were started under."""
    _oldest: list[int] = field(default_factory=list)
    """Heap of the numbers in `_started`, and of some that have left it."""

    @property
    def ahead(self) -> int:
        """Groups before the next new one that were not swept: consumed, buffered or running."""
        return self.counts["consumed"] + len(self.buffered) + len(self.running)

    def start(self, version: int, last_step: int) -> int | None:
        """The number of a group to start under `version`, or None while admission forbids it.

        Args:
            last_step: steps of the whole run; no more groups start than those can consume.
        """
        if self.pending:
            # Lost work was admitted once and goes to the front of the queue: making it wait could starve the learner.
            number = self.pending.pop(0)
        else:
            ahead = self.ahead
            if ahead >= last_step * self.groups_per_step:
                return None
            if not may_start(ahead, version, self.max_staleness, self.groups_per_step):
                return None
            number = self.next_number
            self.next_number += 1
        self.running.add(number)
        self._started[number] = version
        heapq.heappush(self._oldest, number)
        return number

    def lost(self, number: int) -> None:
        """A running group's lease ended without result: it waits to be leased again."""
        self.running.remove(number)
        self._started.pop(number, None)
        bisect.insort(self.pending, number)

    def finish(self, number: int, version: int) -> None:
        """A running group was accepted."""
        self.running.remove(number)
        self._started.pop(number, None)
        self.buffered[number] = version
        self.counts["accepted"] += 1

    def discard(self, numbers: Iterable[int]) -> list[int]:
        """Sweep these groups, whatever their version, if they are buffered; gives those that were."""
        gone = [number for number in numbers if self.buffered.pop(number, None) is not None]
        self.counts["swept"] += len(gone)
        return gone

    def take(self, step: int) -> tuple[list[int] | None, list[int]]:
        """The batch of the step that starts from version `step`, or None while too few are ready; and what was swept.

        The task of a swept group is not drawn again: a replacement is a new draw.
        """
        swept = [n for n, version in self.buffered.items() if not is_fresh(version, step, self.max_staleness)]
        for number in swept:
            del self.buffered[number]
        self.counts["swept"] += len(swept)
        last = self.oldest_open(step) + self.window
        ready = sorted(n for n in self.buffered if n < last)
        if len(ready) < self.groups_per_step:
            return None, swept
        batch = ready[: self.groups_per_step]
        for number in batch:
            del self.buffered[number]
        self.counts["consumed"] += len(batch)
        return batch, swept

    def oldest_open(self, step: int) -> int:
        """Number of the oldest group that may still be consumed at `step` or later but is not finished."""
        while self._oldest:
            version = self._started.get(self._oldest[0])
            if version is not None and is_fresh(version, step, self.max_staleness):
                break
            heapq.heappop(self._oldest)  # it ended, or it never gets fresh again
        running = self._oldest[0] if self._oldest else self.next_number
        return min(running, self.pending[0]) if self.pending else running
