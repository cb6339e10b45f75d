"""How long a published version takes to reach the workers (T_bcast), and how much of that they stand still (f).

    published ──▶ a worker holds it … ──▶ the last active one holds it        T_bcast, the median of `KEPT` publications

A worker is *being reached* from a publication until it says that it holds a version at least as new. f compares how
much it finishes for a second under a lease in that time with what it finishes in other times:

    f = 1 − (finished while being reached) / (expected by the other times' rate),    between 0 and 1

f = 1 is a worker that finishes nothing until it is reached (ECHO-2's pause), f = 0 one that does not notice. What a
worker says of its version is a claim: one that lies makes publications rarer or its own share of work smaller, and
nothing staler. What is said with a delay, such as by heartbeats, makes T_bcast longer by as much.

Invariants: a worker that is gone is not waited for; at most `MAX_SPREADING` publications are followed at once; with
little seen, f stays near 0.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

KEPT = 9
"""T_bcast is the median of this many publications."""

MAX_SPREADING = 16
"""Where more are on their way, the oldest has taken as long as it has by then."""

PRIOR_ROLLOUTS = 2.0
"""Against a verdict from one or two rollouts, so many are taken to have been finished as expected."""


@dataclass(slots=True)
class _Seen:
    """One worker."""

    version: int = -1
    leases: int = 0
    since: float = 0.0
    lease_s: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Under leases: in other times, and while being reached."""
    finished: list[float] = field(default_factory=lambda: [0.0, 0.0])


@dataclass
class Arrivals:
    """T_bcast and f, as they were measured. Times are seconds on any one monotonic clock."""

    newest: int = -1
    _workers: dict[str, _Seen] = field(default_factory=dict)
    _spreading: dict[int, tuple[float, set[str]]] = field(default_factory=dict)
    """Publications on their way: when they began, and who is not reached yet."""
    _took: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    @property
    def bcast_s(self) -> float | None:
        """T_bcast, once a version has reached everybody."""
        return statistics.median(self._took) if self._took else None

    @property
    def stall(self) -> float:
        """f."""
        got = expected = 0.0
        for seen in self._workers.values():
            if seen.lease_s[0] > 0:
                got += seen.finished[1]
                expected += seen.lease_s[1] * seen.finished[0] / seen.lease_s[0]
        return min(1.0, max(0.0, 1 - (got + PRIOR_ROLLOUTS) / (expected + PRIOR_ROLLOUTS)))

    def published(self, version: int, workers: Iterable[str], now: float) -> None:
        """A version is out; `workers` are those who should have it."""
        if version <= self.newest:
            return
        for seen in self._workers.values():
            self._advance(seen, now)
        self.newest = version
        waiting = {node_id for node_id in workers if self._seen(node_id, now).version < version}
        if waiting:
            self._spreading[version] = (now, waiting)
        if len(self._spreading) > MAX_SPREADING:
            began_at, _ = self._spreading.pop(min(self._spreading))
            self._took.append(now - began_at)

    def holds(self, node_id: str, version: int, now: float) -> None:
        """A worker says what it holds."""
        seen = self._seen(node_id, now)
        if version <= seen.version:
            return
        self._advance(seen, now)
        seen.version = version
        self._reached(node_id, version, now)

    def held_by(self, node_id: str) -> int:
        """The newest version that a worker said it holds; -1 for none."""
        seen = self._workers.get(node_id)
        return seen.version if seen is not None else -1

    def started(self, node_id: str, now: float) -> None:
        """A worker was granted a lease."""
        seen = self._seen(node_id, now)
        self._advance(seen, now)
        seen.leases += 1

    def ended(self, node_id: str, rollouts: float, now: float) -> None:
        """A lease ended, with so many accepted rollouts."""
        seen = self._workers.get(node_id)
        if seen is None or seen.leases == 0:
            return
        self._advance(seen, now)
        seen.leases -= 1
        seen.finished[seen.version < self.newest] += rollouts

    def left(self, node_id: str) -> None:
        """A worker is gone, or needs no new versions any more; it is waited for no longer."""
        self._workers.pop(node_id, None)
        for version, (_, waiting) in list(self._spreading.items()):
            waiting.discard(node_id)
            if not waiting:
                del self._spreading[version]  # who was reached last, and when, is not known

    def _reached(self, node_id: str, version: int, now: float) -> None:
        for older in [v for v in self._spreading if v <= version]:
            began_at, waiting = self._spreading[older]
            if node_id in waiting:
                waiting.remove(node_id)
                if not waiting:
                    del self._spreading[older]
                    self._took.append(now - began_at)

    def _seen(self, node_id: str, now: float) -> _Seen:
        return self._workers.setdefault(node_id, _Seen(since=now))

    def _advance(self, seen: _Seen, now: float) -> None:
        seen.lease_s[seen.version < self.newest] += seen.leases * max(0.0, now - seen.since)
        seen.since = max(seen.since, now)
