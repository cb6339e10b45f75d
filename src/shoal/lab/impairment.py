"""What a link and a path do to packets: the arithmetic alone, with time as an argument.

Deviations: 1. The usual token bucket lets a burst pass at line speed; this one is one packet deep, so that a link's
rate holds over every interval. It is kept as a virtual clock (the time at which the link falls free), which is exact
however late its owner calls. 2. Jitter does not reorder, as packets of one path share its queues; reordering is a
cause of its own.

Invariants, property-tested: over any interval a shaper lets pass at most rate x time + one packet; its queue never
holds more than it may; everything offered is sent or counted as dropped; the fate of the n-th packet of a path
depends on the seed, the path's name and n alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from shoal.lab.network import BYTES_PER_MEGABIT, Impairment


@dataclass(slots=True)
class Shaper:
    """One direction of an access link: a rate and the bounded first-in-first-out queue before it.

    Args:
        rate_mbps: bits of IP packets; `None` is unlimited.
        queue_bytes: what may wait, the packet being sent included.
    """

    rate_mbps: float | None
    queue_bytes: int
    packets: int = 0
    bytes: int = 0
    dropped_packets: int = 0
    queue_high_water_bytes: int = 0
    _free_at_s: float = 0.0
    _bytes_per_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._bytes_per_s = 0.0 if self.rate_mbps is None else self.rate_mbps * BYTES_PER_MEGABIT

    def offer(self, size: int, now_s: float) -> float | None:
        """When the last bit of a packet that comes now has left the link; `None`: the queue is full, it is dropped."""
        rate = self._bytes_per_s
        if rate == 0.0:
            self.packets += 1
            self.bytes += size
            return now_s
        start_s = self._free_at_s
        if start_s <= now_s:
            start_s = now_s
            queued = size
        else:
            queued = int((start_s - now_s) * rate) + size
        if queued > self.queue_bytes:
            self.dropped_packets += 1
            return None
        if queued > self.queue_high_water_bytes:
            self.queue_high_water_bytes = queued
        self.packets += 1
        self.bytes += size
        self._free_at_s = start_s = start_s + size / rate
        return start_s

    def has_room(self, size: int, now_s: float) -> bool:
        """Whether `offer` would take the packet."""
        queued = int(max(0.0, self._free_at_s - now_s) * self._bytes_per_s) + size
        return self._bytes_per_s == 0.0 or queued <= self.queue_bytes


@dataclass(slots=True)
class Way:
    """One direction between two nodes: delay, jitter, loss, duplication, reordering.

    Args:
        seed: the network's.
        name: of this direction, such as `a>b`; each has its own random numbers.
    """

    impairment: Impairment
    reorder_hold_s: float
    seed: int
    name: str
    packets: int = 0
    lost_packets: int = 0
    duplicated_packets: int = 0
    reordered_packets: int = 0
    _last_arrival_s: float = 0.0
    _random: random.Random = field(init=False, repr=False)
    _certain: bool = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.seed} {self.name}")
        one = self.impairment
        self._certain = not (one.jitter_s or one.loss or one.duplicate or one.reorder)

    def send(self, departure_s: float) -> tuple[float, ...]:
        """When the packet that leaves at `departure_s` arrives: no time if lost, two if duplicated."""
        self.packets += 1
        one = self.impairment
        if self._certain:
            return (departure_s + one.delay_s,)
        # Every packet draws four numbers, needed or not: the fate of the n-th does not depend on those before it.
        lost, doubled, late, shift = (self._random.random() for _ in range(4))
        if lost < one.loss:
            self.lost_packets += 1
            return ()
        arrival_s = departure_s + one.delay_s + (2.0 * shift - 1.0) * one.jitter_s
        if late < one.reorder:
            self.reordered_packets += 1
            arrival_s += self.reorder_hold_s
        else:
            self._last_arrival_s = arrival_s = max(arrival_s, self._last_arrival_s)
        if doubled < one.duplicate:
            self.duplicated_packets += 1
            return (arrival_s, arrival_s)
        return (arrival_s,)
