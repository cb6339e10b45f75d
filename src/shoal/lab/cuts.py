"""Which directions between nodes are cut: a set of pairs that events add to and heal.

Invariant: after `Heal` nothing is cut; until then cuts only accumulate. A node always reaches itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.lab.network import Cut, Event, Heal, Isolate, Network, Partition


@dataclass
class Cuts:
    """State of the cuts of one network."""

    network: Network
    blocked: set[tuple[str, str]] = field(default_factory=set)
    """(source, target): no packet passes from the one to the other."""

    def apply(self, event: Event) -> None:
        """Take in one event.

        Raises:
            ConfigError: it names a node that is not there.
        """
        self.network.check_event(event)
        match event:
            case Partition(groups=groups):
                sides = {name: side for side, group in enumerate(groups) for name in group}
                self.blocked |= {(a, b) for a in sides for b in sides if sides[a] != sides[b]}
            case Cut(source=source, target=target, one_way=one_way):
                self.blocked |= {(source, target)} if one_way else {(source, target), (target, source)}
            case Isolate(node=node):
                others = [other.name for other in self.network.nodes if other.name != node]
                self.blocked |= {(node, other) for other in others} | {(other, node) for other in others}
            case Heal():
                self.blocked.clear()

    def pairs(self) -> list[tuple[int, int]]:
        """The same by the nodes' places, sorted."""
        index = self.network.index
        return sorted((index(source), index(target)) for source, target in self.blocked)
