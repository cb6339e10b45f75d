"""How often the nodes of a swarm tell of themselves and compare notes."""

from __future__ import annotations

from typing import NamedTuple

from shoal.protocol.roster import MAX_TTL_S

UNHURRIED_NODES = 20
"""In larger swarms each tells itself less often in proportion, so that what a node hears does not grow with their
number. Who dies is missed by liveliness, and what changes is told at once, whatever the pace."""


class Pace(NamedTuple):
    """How often things happen, in seconds."""

    refresh_s: float = 10.0
    """One's own record is told again at least so often, in a swarm of up to `UNHURRIED_NODES`."""
    ttl_s: float = 30.0
    """How long the others believe it: three refreshes."""
    settle_s: float = 1.0
    """Changes of one's own record within this time are told as one; equal to what others accept in the long run."""
    sync_s: float = 2.0
    """Notes are compared so often, give or take half."""
    deadline_s: float = 3.0
    """No exchange takes longer."""
    heal_s: float = 0.3
    """How long to wait after nodes came back, until the network carries again, and for the others to come too."""
    join_peers: int = 3
    warn_s: float = 0.5
    """Within this time after finding an equivocator the proof is published, unless somebody else did it first."""


DEFAULT_PACE = Pace()


def slowdown(pace: Pace, num_nodes: int) -> float:
    """By how much longer a node of a swarm of this size waits before it tells itself again, and asks to be believed."""
    return min(MAX_TTL_S / pace.ttl_s, max(1.0, num_nodes / UNHURRIED_NODES))
