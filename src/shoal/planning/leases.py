"""Who is acting on what, until when: leases as a state machine.

Invariants, tested by random walks:
- conservation, counted in rollouts, at all times:  leased = accepted + rejected + void + expired + running;
- a lease ends exactly once: finished, void (its worker left or failed), or expired (no progress before its deadline);
- what ended can't be submitted again: a late or repeated submission changes nothing.

A lease's deadline moves only when its worker reports *progress* (more tokens than before), so a worker that is alive
but stuck loses its leases as surely as a dead one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

KEEP_ENDED = 10_000
"""Ended leases remembered, so that late submissions are told what happened; older ones are simply unknown."""


@dataclass
class Holding:
    """One running lease."""

    lease_id: str
    node_id: str
    rollouts: int
    duration_s: float
    deadline: float
    progress: int = 0


@dataclass
class LeaseBook:
    """All leases of a run. Times are seconds on any one monotonic clock."""

    running: dict[str, Holding] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    ended: dict[str, str] = field(default_factory=dict)
    _held_by: dict[str, dict[str, Holding]] = field(default_factory=dict)
    """The same running leases by node, so that a loss costs no walk over all of them; without those that wait for a
    verdict."""

    def grant(self, lease_id: str, node_id: str, rollouts: int, duration_s: float, now: float) -> None:
        """Open a lease; its id has never been used."""
        assert lease_id not in self.running and lease_id not in self.ended, f"lease {lease_id} was granted before"
        assert rollouts > 0
        holding = Holding(lease_id, node_id, rollouts, duration_s, now + duration_s)
        self.running[lease_id] = holding
        self._held_by.setdefault(node_id, {})[lease_id] = holding
        self.counts["leased"] += rollouts

    def progress(self, lease_id: str, node_id: str, tokens: int, now: float) -> bool:
        """Note a heartbeat; False tells the worker to drop the lease."""
        holding = self.running.get(lease_id)
        if holding is None or holding.node_id != node_id:
            return False
        if tokens > holding.progress:
            holding.progress = tokens
            if lease_id in self._held_by.get(node_id, {}):  # else it waits for its verdict, and not for its worker
                holding.deadline = now + holding.duration_s
        return True

    def hold(self, lease_id: str, now: float, duration_s: float) -> None:
        """What a lease is for was handed in, and its verdict waits: it outlives its worker, and ends by `finish`, or
        after `duration_s`."""
        holding = self.running[lease_id]
        holding.deadline = now + duration_s
        self._held_by[holding.node_id].pop(lease_id)

    def finish(self, lease_id: str, node_id: str, *, accepted: int, rejected: int, void: int) -> bool:
        """Close a lease by its submission; False if it is not this node's to close."""
        holding = self.running.get(lease_id)
        if holding is None or holding.node_id != node_id:
            return False
        assert accepted + rejected + void == holding.rollouts, "every rollout of a lease has one verdict"
        self._end(holding, "finished")
        self.counts["accepted"] += accepted
        self.counts["rejected"] += rejected
        self.counts["void"] += void
        return True

    def expire(self, now: float) -> list[Holding]:
        """End every lease whose deadline has passed."""
        late = [h for h in self.running.values() if h.deadline <= now]
        for holding in late:
            self._end(holding, "expired")
            self.counts["expired"] += holding.rollouts
        return late

    def void_node(self, node_id: str) -> list[Holding]:
        """End every lease of a node that left or died."""
        lost = list(self._held_by.get(node_id, {}).values())
        for holding in lost:
            self._end(holding, "void")
            self.counts["void"] += holding.rollouts
        return lost

    @property
    def num_running(self) -> int:
        """Rollouts under running leases."""
        return sum(h.rollouts for h in self.running.values())

    @property
    def is_conserved(self) -> bool:
        """The conservation law above."""
        c = self.counts
        return c["leased"] == c["accepted"] + c["rejected"] + c["void"] + c["expired"] + self.num_running

    def _end(self, holding: Holding, how: str) -> None:
        del self.running[holding.lease_id]
        held = self._held_by.get(holding.node_id, {})
        held.pop(holding.lease_id, None)  # what waits for its verdict is no longer among them
        if not held:
            self._held_by.pop(holding.node_id, None)
        self.ended[holding.lease_id] = how
        while len(self.ended) > KEEP_ENDED:
            del self.ended[next(iter(self.ended))]
