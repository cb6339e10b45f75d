"""The nodes that have joined a run, as the coordinator knows them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shoal.protocol.roster import SwarmRole
from shoal.protocol.work import Arrived, Fetching


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
    fetching: Fetching | None = None
    """The version that is on its way to it."""
    arrived: Arrived | None = None
    """The version that came to it last."""
    seen: float = field(default_factory=time.monotonic)

    def came(self, arrived: Arrived, name_of: Callable[[str], str]) -> dict[str, Any]:
        """Note a version that came to it; gives what is to be told of that, with names for ids."""
        self.arrived = arrived
        fed = {name_of(source): num_bytes for source, num_bytes in arrived.by_source.items()}
        return {"name": self.name, "version": arrived.version, "seconds": arrived.seconds, "by_source": fed}
