"""What is simulated: machines, a run's demands, and what came of it. Data only; `planning/simulator` is the motion.

One unit of work is a *lease*: a group of rollouts, or one rollout, as the caller counts. Rates, R and staleness are in
that unit throughout.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from shoal.planning.activation import HEADROOM, Billing


@dataclass(frozen=True)
class Machine:
    """A simulated worker."""

    id: str
    rate: float
    """Leases a second with all slots taken."""
    slots: int = 1
    """Leases at once; each lasts slots / rate seconds on average."""
    price_usd_per_hour: float = 0.0
    billing: Billing = "per_use"
    committed: bool = False
    region: str = ""
    uplink_bytes_per_s: float = math.inf
    downlink_bytes_per_s: float = math.inf
    losses_per_hour: float = 0.0
    """How often it is taken away, as a spot instance is."""
    absent_s: float = 600.0
    """Mean time until one like it is there again."""


@dataclass(frozen=True)
class Scenario:
    """A run to be simulated."""

    machines: tuple[Machine, ...]
    leases_per_step: int
    """R."""
    max_staleness: int
    """S; 0 is the pull loop."""
    train_s: float
    """T_train."""
    steps: int
    """More than 2·(S + 2): beginning and end are not measured."""
    snapshot_bytes: float = 0.0
    source_bytes_per_s: float = math.inf
    hop_s: float = 0.0
    bcast_s: float | None = None
    """T_bcast, where it is given rather than modelled from bytes and links."""
    stall: float = 0.0
    """f."""
    interval: int | None = None
    """κ; absent: the provisioning rule's."""
    paced: bool = True
    window: int | None = None
    """Look-ahead of the queue; absent: wide enough for every lease that admission allows."""
    duration_sigma: float = 0.3
    """Spread of a lease's duration: of its logarithm. The mean stays."""
    straggler_share: float = 0.0
    straggler_factor: float = 5.0
    """A straggling lease takes this many times as long."""
    train_sigma: float = 0.0
    day_amplitude: float = 0.0
    """Links are slower and faster by up to this share in the course of a day, each region at its own hours."""
    detection_s: float = 5.0
    """A worker that is lost is noticed this long after."""
    activation: bool = False
    """Activate only the workers that the plan needs; otherwise all."""
    headroom: float = HEADROOM
    replan_steps: int = 20
    max_usd_per_hour: float = math.inf
    learner_usd_per_hour: float = 0.0
    egress_usd_per_byte: float = 0.0
    seed: int = 0

    @cached_property
    def rollout_s(self) -> float:
        """D: mean duration of a lease over all machines, weighted by how many each makes."""
        return sum(m.slots for m in self.machines) / sum(m.rate for m in self.machines)


@dataclass
class Outcome:
    """What a simulated run came to. Times in simulated seconds; what is `measured` excludes beginning and end."""

    steps: int = 0
    elapsed_s: float = 0.0
    interval: int = 1
    bcast_s: float = 0.0
    """Mean over the publications."""
    utilisation: float = 0.0
    """Share of the measured time in which the learner trained."""
    predicted_utilisation: float = 0.0
    """By `capacity.utilisation` at the mean rate that was active."""
    step_s: float = 0.0
    worker_utilisation: float = 0.0
    """Share of the active workers' slots that were busy, over the measured time."""
    staleness: Counter[int] = field(default_factory=Counter)
    """Consumed leases by staleness, measured part."""
    violations: int = 0
    """Consumed leases staler than S, of the whole run. Always 0."""
    counts: Counter[str] = field(default_factory=Counter)
    """leased, accepted, void, running; consumed, swept, buffered: the conservation laws' terms."""
    mean_duration_kept_s: float = 0.0
    mean_duration_swept_s: float = 0.0
    active_rate: float = 0.0
    """Σμ_i of the active workers, mean over time."""
    active_workers: float = 0.0
    usd: float = 0.0
    worker_usd: float = 0.0
    idle_usd: float = 0.0
    egress_usd: float = 0.0
    events: int = 0

    @property
    def mean_staleness(self) -> float:
        """Of what was consumed."""
        total = sum(self.staleness.values())
        return sum(k * n for k, n in self.staleness.items()) / total if total else 0.0

    @property
    def usd_per_step(self) -> float:
        """Dollars an optimizer step."""
        return self.usd / self.steps if self.steps else 0.0
