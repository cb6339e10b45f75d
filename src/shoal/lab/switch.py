"""The packet switch without its devices: packets and times in, packets and times out.

A packet comes from a node's device (`receive`), passes its NAT, its uplink, the way to its target, the target's
downlink and NAT, and is handed out when its time has come (`release`). Cuts are looked at twice, when a packet has
left the uplink and when it would arrive: what is under way when a cut falls is lost too.

Invariants: a packet that was received is released, waits in `pending`, or is counted under exactly one cause of loss;
a link sees its packets in the order of their (simulated) times, however irregularly `release` is called; equal
sequences of calls give equal results.
"""

from __future__ import annotations

import heapq
import random
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal.lab.impairment import Shaper, Way
from shoal.lab.nat import Nat
from shoal.lab.network import Network
from shoal.lab.statistics import LinkStatistics, NodeStatistics, Statistics, WayStatistics

MAX_PENDING = 1_000_000
"""Packets under way; more than that is a delay times a rate that no lab should ask of memory."""

ARRIVES, LEAVES = 0, 1
"""What happens next to a pending packet: it reaches the target's downlink, or the target."""


@dataclass(slots=True)
class Port:
    """A node's place at the switch."""

    name: str
    up: Shaper
    down: Shaper
    nat: Nat | None


@dataclass(slots=True)
class Lane:
    """One direction between two nodes, with what is cut of it."""

    target: int
    way: Way
    blocked: bool = False
    cut_packets: int = 0


Pending = tuple[float, int, int, Lane, bytes]
"""Time, serial number (which keeps equal times in order), what happens, where, the packet."""


@dataclass
class Switch:
    """All state of one packet lab."""

    network: Network
    unroutable_packets: int = 0
    overflow_packets: int = 0
    nat_untranslated_packets: int = 0
    _ports: list[Port] = field(init=False)
    _lanes: dict[tuple[int, int], Lane] = field(default_factory=dict)
    _blocked: frozenset[tuple[int, int]] = frozenset()
    _place: dict[bytes, int] = field(init=False)
    _pending: list[Pending] = field(default_factory=list)
    _serial: int = 0

    def __post_init__(self) -> None:
        network = self.network
        names = [node.name for node in network.nodes]
        self._place = {socket.inet_aton(network.public_address(name)): place for place, name in enumerate(names)}
        self._ports = []
        for node in network.nodes:
            up = Shaper(node.up_mbps, network.queue_bytes(node, node.up_mbps))
            down = Shaper(node.down_mbps, network.queue_bytes(node, node.down_mbps))
            nat = None
            if node.nat != "none":
                private, public = network.address(node.name), network.public_address(node.name)
                ports = random.Random(f"{network.seed} nat {node.name}")
                nat = Nat(socket.inet_aton(private), socket.inet_aton(public), node.nat, ports)
            self._ports.append(Port(node.name, up, down, nat))

    @property
    def next_s(self) -> float | None:
        """When `release` has something to do next."""
        return self._pending[0][0] if self._pending else None

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def set_cuts(self, pairs: Iterable[tuple[int, int]]) -> None:
        """These directions, and no others, are cut from now on."""
        self._blocked = frozenset(pairs)
        for key, lane in self._lanes.items():
            lane.blocked = key in self._blocked

    def forget_sessions(self, place: int) -> None:
        """The NAT before the node restarts."""
        nat = self._ports[place].nat
        if nat is not None:
            nat.forget()

    def receive(self, source: int, packet: bytes, now_s: float) -> None:
        """Take a packet from a node's device; `now_s` must not decrease from call to call."""
        if len(packet) < 20 or packet[0] >> 4 != 4:
            self.unroutable_packets += 1
            return
        port = self._ports[source]
        target = self._place.get(packet[16:20])
        if target is None or target == source:
            self.unroutable_packets += 1
            return
        if port.nat is not None:
            translated = port.nat.outbound(packet, now_s)
            if translated is None:
                self.nat_untranslated_packets += 1
                return
            packet = translated
        departure_s = port.up.offer(len(packet), now_s)
        if departure_s is None:
            return
        lane = self._lanes.get((source, target)) or self._open_lane(source, target)
        if lane.blocked:
            lane.cut_packets += 1
            return
        for arrival_s in lane.way.send(departure_s):
            self._push(arrival_s, ARRIVES, lane, packet)

    def release(self, until_s: float) -> list[tuple[int, bytes]]:
        """Every packet due by `until_s`, in order, as (place of the node, packet)."""
        pending = self._pending
        out: list[tuple[int, bytes]] = []
        while pending and pending[0][0] <= until_s:
            time_s, _, happens, lane, packet = heapq.heappop(pending)
            port = self._ports[lane.target]
            if happens == ARRIVES:
                if lane.blocked:
                    lane.cut_packets += 1
                    continue
                done_s = port.down.offer(len(packet), time_s)
                if done_s is None:
                    continue
                if done_s > until_s or (pending and pending[0][0] < done_s):
                    self._push(done_s, LEAVES, lane, packet)
                    continue
                time_s = done_s
            if port.nat is not None:
                translated = port.nat.inbound(packet, time_s)
                if translated is None:
                    continue
                packet = translated
            out.append((lane.target, packet))
        return out

    def statistics(self) -> Statistics:
        """What was counted; the caller adds what it alone knows."""
        nodes = {
            port.name: NodeStatistics(
                up=link_statistics(port.up),
                down=link_statistics(port.down),
                nat_refused_packets=port.nat.refused_packets if port.nat is not None else 0,
            )
            for port in self._ports
        }
        ways = [
            way_statistics(self._ports[source].name, self._ports[lane.target].name, lane.way, lane.cut_packets)
            for (source, _), lane in sorted(self._lanes.items(), key=lambda item: item[0])
        ]
        return Statistics(nodes=nodes, ways=ways, unroutable_packets=self.unroutable_packets)

    def _open_lane(self, source: int, target: int) -> Lane:
        """Made when first used: a large network has more pairs than conversations."""
        network = self.network
        a, b = self._ports[source].name, self._ports[target].name
        way = Way(network.impairment(a, b), network.reorder_hold_ms / 1e3, network.seed, f"{a}>{b}")
        lane = Lane(target, way, blocked=(source, target) in self._blocked)
        self._lanes[source, target] = lane
        return lane

    def _push(self, time_s: float, happens: int, lane: Lane, packet: bytes) -> None:
        if len(self._pending) >= MAX_PENDING:
            self.overflow_packets += 1
            return
        self._serial += 1
        heapq.heappush(self._pending, (time_s, self._serial, happens, lane, packet))


def link_statistics(link: Shaper) -> LinkStatistics:
    """The counts of a shaper as a record."""
    return LinkStatistics(link.packets, link.bytes, link.dropped_packets, link.queue_high_water_bytes)


def way_statistics(source: str, target: str, way: Way, cut_packets: int) -> WayStatistics:
    """The counts of a way as a record."""
    return WayStatistics(
        source,
        target,
        packets=way.packets,
        lost_packets=way.lost_packets,
        duplicated_packets=way.duplicated_packets,
        reordered_packets=way.reordered_packets,
        cut_packets=cut_packets,
    )
