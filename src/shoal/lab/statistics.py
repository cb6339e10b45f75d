"""What a lab counted: records, the same for both backends."""

from __future__ import annotations

import msgspec


class LinkStatistics(msgspec.Struct, frozen=True):
    """One direction of an access link; bytes are those of IP packets (packet lab) or of streams (proxy lab)."""

    packets: int
    bytes: int
    dropped_packets: int
    """For want of room in the queue."""
    queue_high_water_bytes: int


class NodeStatistics(msgspec.Struct, frozen=True):
    """A node's two links, and the packets that its NAT did not let in."""

    up: LinkStatistics
    down: LinkStatistics
    nat_refused_packets: int = 0


class WayStatistics(msgspec.Struct, frozen=True):
    """One direction between two nodes, where anything passed or was cut."""

    source: str
    target: str
    packets: int
    lost_packets: int
    duplicated_packets: int
    reordered_packets: int
    cut_packets: int


class Statistics(msgspec.Struct, frozen=True):
    """A whole lab.

    Attributes:
        unroutable_packets: to no node's address, multicast and IPv6 among them: dropped.
        device_drops: packets that the kernel dropped before the switch could read them. Above 0 the switch was too
            slow, and queues and losses are not what was asked.
        late_max_s: the most by which the switch handed on a packet too late.
        cpu_s: processor time of the switch.
        uncaptured_packets: those that a capture had no room for.
    """

    nodes: dict[str, NodeStatistics]
    ways: list[WayStatistics]
    unroutable_packets: int = 0
    device_drops: int = 0
    late_max_s: float = 0.0
    cpu_s: float = 0.0
    uncaptured_packets: int = 0
