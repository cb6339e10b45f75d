"""How fast each worker is: rollouts a second with all slots taken, from what it was leased and what came of it.

A worker that waits for work because pacing or admission holds it is not slow. So what counts is time under leases, each
lease as the share of the most that the worker ever held at once: half full for two seconds is one second of work. That
takes a lease to last as long whatever runs beside it. An engine that is quicker when it is emptier is thus taken for
faster than it is while it is not full; whoever relies on it too much fills it, and then it is measured right. (Time
under any lease, however few, would be wrong the other way, and stay so: who is given less would seem slower.)

Old time is forgotten exponentially: after `MEMORY_S` seconds of work it weighs 1/e. Invariants: what failed takes time
and adds nothing; time in which nothing is leased changes nothing; a worker that has finished nothing yet has no rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

MEMORY_S = 600.0
"""Seconds of work after which a measurement weighs 1/e."""

PRIOR_ROLLOUTS = 8.0
"""What was expected of a worker weighs as much as this many rollouts. Whoever picks the best of many workers by a few
noisy measurements picks the lucky ones, and gets less than was measured."""


@dataclass(slots=True)
class _Meter:
    leases: int = 0
    most: int = 1
    """Leases held at once, at most."""
    since: float = 0.0
    lease_s: float = 0.0
    """Seconds times leases."""
    rollouts: float = 0.0

    def advance(self, now: float) -> None:
        if self.leases > 0 and now > self.since:
            kept = math.exp((self.since - now) / MEMORY_S)
            self.lease_s = self.lease_s * kept + self.leases * MEMORY_S * (1 - kept)
            self.rollouts *= kept
        self.since = max(self.since, now)

    @property
    def busy_s(self) -> float:
        """Seconds of work, all slots taken."""
        return self.lease_s / self.most


@dataclass
class RateMeter:
    """μ_i of every worker, and their sum."""

    _meters: dict[str, _Meter] = field(default_factory=dict)

    def started(self, node_id: str, now: float) -> None:
        """A lease was granted."""
        meter = self._meters.setdefault(node_id, _Meter(since=now))
        meter.advance(now)
        meter.leases += 1
        meter.most = max(meter.most, meter.leases)

    def ended(self, node_id: str, rollouts: int, now: float) -> None:
        """A lease ended, with so many accepted rollouts (0 where it was lost, void or for another purpose)."""
        meter = self._meters.get(node_id)
        if meter is None or meter.leases == 0:
            return
        meter.advance(now)
        meter.leases -= 1
        meter.rollouts += rollouts

    def left(self, node_id: str) -> None:
        """The worker is gone; should it come back it is measured afresh."""
        self._meters.pop(node_id, None)

    def rate(self, node_id: str) -> float | None:
        """μ_i in rollouts a second, or None while nothing was finished."""
        meter = self._meters.get(node_id)
        if meter is None or meter.rollouts <= 0 or meter.busy_s <= 0:
            return None
        return meter.rollouts / meter.busy_s

    def expected(self, node_id: str, advertised: float) -> float:
        """μ_i to plan with: what was measured, drawn towards what its owner says until there is enough of it."""
        meter = self._meters.get(node_id)
        if meter is None:
            return advertised
        return (meter.rollouts + PRIOR_ROLLOUTS) / (meter.busy_s + PRIOR_ROLLOUTS / advertised)

    @property
    def total(self) -> float:
        """Σμ_i over the workers that have a rate."""
        return sum(m.rollouts / m.busy_s for m in self._meters.values() if m.rollouts > 0 and m.busy_s > 0)
