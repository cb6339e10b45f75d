"""The nodes that have joined a run, as the coordinator knows them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from shoal.protocol.roster import SwarmRole


@dataclass
class Node:
    """A node that has joined."""

    node_id: str
    public_key: bytes
    name: str
    role: SwarmRole
    device: str
    joined_at: float
    alive: bool = True
    departed: bool = False
    """Where it is not alive: it said goodbye or was sent away, and did not just fall silent."""
    version: int = 0
    tokens_per_s: float = 0.0
    seen: float = field(default_factory=time.monotonic)
