"""What a fleet can do under each staleness bound: how many workers, which κ, how busy the learner, what it costs.

The same functions that a run plans with (`capacity`, `activation`), applied to a fleet file instead of to measurements.
Invariant: nothing here is measured or simulated; `shoal plan --simulate` adds that beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.planning.activation import HEADROOM, Offer, Plan, activate
from shoal.planning.capacity import (
    Load,
    freshest_interval,
    full_rate,
    overlaps,
    publish_interval,
    step_s,
    target_rate,
)
from shoal.planning.fleet import BYTES_PER_MEGABIT, Fleet
from shoal.planning.spreading import fluid_s

HOUR_S = 3600.0


@dataclass(frozen=True)
class Advice:
    """One line of the table: a bound, and what it takes."""

    max_staleness: int
    interval: int
    """κ, the rule's."""
    freshest_interval: int
    """The smallest κ at which steps are as short."""
    overlaps: bool
    """Whether generation, dissemination and training overlap fully."""
    bcast_s: float
    needed_rate: float
    """Σμ by the provisioning rule."""
    full_rate: float
    """Σμ at which the learner never waits; infinite where none is enough."""
    workers: dict[str, int]
    """Machines to activate, by class."""
    rate: float
    """Σμ of those."""
    covered: bool
    """Whether the fleet has enough for the rule."""
    utilisation: float
    step_s: float
    usd_per_hour: float
    usd_per_step: float

    @property
    def num_workers(self) -> int:
        """Machines to activate."""
        return sum(self.workers.values())


@dataclass(frozen=True)
class Comparison:
    """The same steps on a co-located fleet, which generates, then trains."""

    step_s: float
    utilisation: float
    usd_per_step: float


def advise(
    fleet: Fleet, max_staleness: int, *, headroom: float = HEADROOM, max_usd_per_hour: float = math.inf
) -> Advice:
    """Plan `fleet` under one bound."""
    machines = fleet.machines()
    own_s = sum(m.slots for m in machines) / sum(m.rate for m in machines)
    rollout_s = own_s if fleet.run.rollout_s is None else fleet.run.rollout_s
    sent_bytes = fleet.run.snapshot_mb * 1e6
    egress_usd = sent_bytes * fleet.learner.egress_usd_per_gb / 1e9

    def load(active: Sequence[Offer]) -> Load:
        bcast_s = fleet.run.bcast_s
        if bcast_s is None:
            source = fleet.learner.uplink_mbps * BYTES_PER_MEGABIT
            ups, downs = [o.uplink_bytes_per_s for o in active], [o.downlink_bytes_per_s for o in active]
            bcast_s = fluid_s(sent_bytes, source, ups, downs)
        return Load(fleet.run.rollouts_per_step, fleet.run.train_s, bcast_s, max_staleness, fleet.run.stall, rollout_s)

    def needed(active: Sequence[Offer]) -> float:
        return target_rate(load(active))

    # Egress is paid per publication; how many there are depends on κ, which barely depends on who is active.
    interval = publish_interval(load([]))
    egress_usd_per_hour = egress_usd * HOUR_S / (interval * fleet.run.train_s)
    offers = [
        Offer(
            id=m.id,
            rate=m.rate,
            price_usd_per_hour=m.price_usd_per_hour,
            billing=m.billing,
            committed=m.committed,
            uplink_bytes_per_s=m.uplink_bytes_per_s,
            downlink_bytes_per_s=m.downlink_bytes_per_s,
            egress_usd_per_hour=egress_usd_per_hour,
        )
        for m in machines
    ]
    plan = activate(offers, needed, headroom=headroom, max_usd_per_hour=max_usd_per_hour)
    return _line(fleet, plan, load([o for o in offers if o.id in plan.active]))


def _line(fleet: Fleet, plan: Plan, load: Load) -> Advice:
    interval = publish_interval(load)
    step = step_s(load, interval, plan.rate)
    usd_per_hour = plan.usd_per_hour + fleet.learner.price_usd_per_hour
    return Advice(
        max_staleness=load.max_staleness,
        interval=interval,
        freshest_interval=freshest_interval(load, plan.rate),
        overlaps=overlaps(load, interval),
        bcast_s=load.bcast_s,
        needed_rate=plan.needed,
        full_rate=full_rate(load, interval),
        workers=dict(sorted(Counter(machine.rpartition("-")[0] for machine in plan.active).items())),
        rate=plan.rate,
        covered=plan.shortfall == 0,
        utilisation=load.train_s / step,
        step_s=step,
        usd_per_hour=usd_per_hour,
        usd_per_step=usd_per_hour * step / HOUR_S,
    )


def colocated(fleet: Fleet) -> Comparison | None:
    """What the co-located fleet of the file takes for a step, if there is one."""
    other = fleet.colocated
    if other is None:
        return None
    train_s = other.train_s or fleet.run.train_s
    step = train_s + fleet.run.rollouts_per_step / other.rollouts_per_s
    return Comparison(step, train_s / step, other.price_usd_per_hour * step / HOUR_S)
