"""What the simulator's world is made of: links that snapshots arrive over, chance, and means over simulated time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shoal.planning.activation import Offer
from shoal.planning.billing import HOUR_S, Ledger
from shoal.planning.capacity import Load
from shoal.planning.rates import RateMeter
from shoal.planning.scenario import Machine, Scenario
from shoal.planning.spreading import common_s

DAY_S = 86_400.0

BLOCK = 65_536
"""Random numbers drawn at a time."""


class Work(NamedTuple):
    """A running lease."""

    lease: str
    number: int
    version: int
    worker: int
    life: int
    started_at: float
    stalled_s: float
    """What its link class had stalled in all when it started, or when its end was last put off."""


class Links:
    """Machines by *link class*: one region, and downlinks within a factor of √2 of each other.

    All of a class get a snapshot at the same time, when the slowest of them would.
    """

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        keys = [_link_key(machine) for machine in scenario.machines]
        classes = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.of = [classes[key] for key in keys]
        """The link class of each machine."""
        regions = list(dict.fromkeys(region for region, _ in classes))
        self._hours = [regions.index(region) / len(regions) for region, _ in classes]
        self._downlink = [math.inf] * len(classes)
        for link, machine in zip(self.of, scenario.machines, strict=True):
            self._downlink[link] = min(self._downlink[link], machine.downlink_bytes_per_s)
        self.held = [0] * len(classes)
        """Version that each class holds."""
        self.resumes_at = [0.0] * len(classes)
        """Until when it does not generate, because a snapshot spreads."""
        self.stalled_s = [0.0] * len(classes)
        """How long it has stalled for that reason in all."""

    def __len__(self) -> int:
        return len(self.held)

    def arrival_s(self, link: int, common_s: float, now: float) -> float:
        """Seconds until a snapshot published now has arrived; `common_s` is what all together take to pass it on."""
        s = self._scenario
        if s.bcast_s is not None:
            return s.bcast_s
        share = 1 + s.day_amplitude * math.sin(2 * math.pi * (now / DAY_S + self._hours[link]))
        return max(common_s, s.snapshot_bytes / (self._downlink[link] * share)) + s.hop_s


def _link_key(machine: Machine) -> tuple[str, float]:
    rate = machine.downlink_bytes_per_s
    return machine.region, math.inf if math.isinf(rate) else round(2 * math.log2(rate))


class Publications:
    """Snapshots on their way to the link classes: one at a time, and of those that wait only the newest follows."""

    def __init__(self, scenario: Scenario, links: Links, ledger: Ledger) -> None:
        self._scenario = scenario
        self._links = links
        self._ledger = ledger
        self._spreading = False
        self._next: int | None = None
        self.took_s: list[float] = []
        """Of each: until the last link class with an active worker had it."""

    @property
    def mean_s(self) -> float:
        """Mean time that a snapshot took; 0 before the first."""
        return sum(self.took_s) / len(self.took_s) if self.took_s else 0.0

    def arrival_s(self, link: int, active: Sequence[bool], now: float) -> float:
        """Seconds until a link class has what is published now, which the active machines pass on."""
        return self._links.arrival_s(link, self._common_s(active), now)

    def publish(self, version: int, active: Sequence[bool], now: float) -> list[tuple[int, float, float]]:
        """Begin to spread a version: of each link class the seconds that it stalls and until it has it.

        Nothing, if another version is spreading: then this one follows it.
        """
        if self._spreading:
            self._next = version
            return []
        links, common_s = self._links, self._common_s(active)
        used = {links.of[i] for i, is_active in enumerate(active) if is_active}
        last_s, spread = 0.0, []
        for link in range(len(links)):
            arrival_s = links.arrival_s(link, common_s, now)
            stall_s = self._scenario.stall * arrival_s
            if link in used:
                last_s = max(last_s, arrival_s)
            if stall_s > 0:
                links.stalled_s[link] += stall_s
                links.resumes_at[link] = now + stall_s
            spread.append((link, stall_s, arrival_s))
        self._spreading = True
        self.took_s.append(last_s)
        for machine, is_active in zip(self._scenario.machines, active, strict=True):
            if is_active and self._scenario.egress_usd_per_byte:
                self._ledger.sent(machine.id, self._scenario.snapshot_bytes)
        return spread

    def over(self) -> int | None:
        """All have the last version; gives the one to publish next, if any waits."""
        version, self._next, self._spreading = self._next, None, False
        return version

    def _common_s(self, active: Sequence[bool]) -> float:
        s = self._scenario
        if s.bcast_s is not None:
            return s.bcast_s
        uplinks = [m.uplink_bytes_per_s for m, is_active in zip(s.machines, active, strict=True) if is_active]
        return common_s(s.snapshot_bytes, s.source_bytes_per_s, uplinks)


def demand(s: Scenario, active: Sequence[Offer], train_s: float | None, slow_s: float) -> Load:
    """What the run asks of `active` workers, by what was measured of T_train and of slow leases, if anything was."""
    bcast_s = s.bcast_s
    if bcast_s is None:
        slowest = min((o.downlink_bytes_per_s for o in active), default=math.inf)
        common = common_s(s.snapshot_bytes, s.source_bytes_per_s, [o.uplink_bytes_per_s for o in active])
        bcast_s = max(common, s.snapshot_bytes / slowest) + s.hop_s
    # A batch waits for the slowest of its leases, so what was measured of the slow ones counts.
    rollout_s = max(s.rollout_s, slow_s)
    return Load(s.leases_per_step, train_s or s.train_s, bcast_s, s.max_staleness, s.stall, rollout_s)


def offers_of(
    s: Scenario, present: Sequence[bool], meter: RateMeter, ledger: Ledger, interval: int, now: float
) -> list[Offer]:
    """The machines that could be active, at the rates that are expected of them by now."""
    egress_usd_per_hour = s.egress_usd_per_byte * s.snapshot_bytes / (interval * s.train_s) * HOUR_S
    return [
        Offer(
            id=m.id,
            rate=meter.expected(m.id, m.rate),
            price_usd_per_hour=m.price_usd_per_hour,
            billing=m.billing,
            committed=m.committed,
            paid_hours=ledger.accounts[m.id].paid_hours_left(now),
            uplink_bytes_per_s=m.uplink_bytes_per_s,
            downlink_bytes_per_s=m.downlink_bytes_per_s,
            egress_usd_per_hour=egress_usd_per_hour,
        )
        for m, there in zip(s.machines, present, strict=True)
        if there
    ]


@dataclass
class Mean:
    """The mean of what was added; 0 of nothing."""

    total: float = 0.0
    number: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.number += 1

    @property
    def mean(self) -> float:
        return self.total / max(1, self.number)


@dataclass
class Means:
    """Time-weighted sums of what is active and busy, from `begin` to `end`; `weigh` comes before every change."""

    active_rate: float = 0.0
    num_active: int = 0
    num_slots: int = 0
    num_busy: int = 0
    began_at: float | None = None
    ended_at: float | None = None
    rate_s: float = 0.0
    active_s: float = 0.0
    slot_s: float = 0.0
    busy_s: float = 0.0
    _at: float = 0.0

    @property
    def measuring(self) -> bool:
        """Whether now counts."""
        return self.began_at is not None and self.ended_at is None

    def weigh(self, now: float) -> None:
        """Add the time since the last change."""
        if self.measuring:
            elapsed = now - self._at
            self.rate_s += elapsed * self.active_rate
            self.active_s += elapsed * self.num_active
            self.slot_s += elapsed * self.num_slots
            self.busy_s += elapsed * self.num_busy
        self._at = now

    def begin(self, now: float) -> None:
        """From now it counts."""
        self.weigh(now)
        self.began_at = now

    def end(self, now: float) -> None:
        """Until now it counted."""
        self.weigh(now)
        self.ended_at = now

    @property
    def measured_s(self) -> float:
        """How long it counted."""
        assert self.began_at is not None and self.ended_at is not None
        return self.ended_at - self.began_at


def step_s(s: Scenario, random: np.random.Generator) -> float:
    """What the next training step takes."""
    return s.train_s * (math.exp(s.train_sigma * random.standard_normal()) if s.train_sigma else 1.0)


def stretches(scenario: Scenario, random: np.random.Generator) -> Iterator[float]:
    """By how much each lease takes longer or shorter than the mean."""
    sigma = scenario.duration_sigma
    while True:
        drawn = np.exp(sigma * random.standard_normal(BLOCK) - sigma**2 / 2)
        if scenario.straggler_share:
            drawn[random.random(BLOCK) < scenario.straggler_share] *= scenario.straggler_factor
        yield from drawn.tolist()
