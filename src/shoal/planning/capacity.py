"""How many rollouts a second keep a learner busy, and how often to publish: ECHO-2's overlap capacity model.

Deviations from the paper (arXiv 2602.02192, section on provisioning):
1. The paper lets workers pause while a snapshot spreads. Here a measured *stall fraction* f says how much of a
   dissemination a worker spends not generating: f = 1 is the paper's model, f = 0 is staging while generating.
2. A rollout takes `rollout_s` (D) from start to acceptance, and D delays what a version releases just as T_bcast does.
   With D = 0 every formula is the paper's.
3. The paper stops where its rule has no solution. `step_s` goes on: it is the length of a step for *any* rate,
   interval and bound, S = 0 (the sequential pull loop) and S = 1 included.

Words: R rollouts a step, T_train seconds a step, κ steps between publications, T_bcast seconds for a snapshot to reach
the active workers, Σμ_i their rollouts a second, S the bound on staleness.

    κ + ⌈(T_bcast + D) / T_train⌉ ≤ S                                              full overlap
    κR/Σμ_i + f·T_bcast ≤ κ·T_train     ⟹     Σμ_i ≥ κR / (κ·T_train − f·T_bcast)   provisioning rule

The derivation of `step_s` is in docs/capacity.md. In short, a step lasts as long as the slowest of three circles: the
learner's own work; the workers', who in κ steps make κR rollouts and stall for f·T_bcast; and the turn-around, because
the first step that only version x admits ends S − κ + 2 steps after x was made, and within that time x must spread, R
rollouts be made of it, and the step be trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ROUNDING = 1e-9
"""Slack for ratios that are whole numbers but for rounding."""

FASTEST = 1e4
"""A rate this many times the rule's stands for 'any number of workers'."""

FRESH_TOLERANCE = 1e-3
"""A smaller κ may make a step this much longer."""


@dataclass(frozen=True)
class Load:
    """What a run asks of its workers, in any one unit of rollouts (or groups of them)."""

    rollouts_per_step: float
    """R."""
    train_s: float
    """T_train."""
    bcast_s: float
    """T_bcast."""
    max_staleness: int
    """S."""
    stall: float = 0.0
    """f, from 0 (staged while generating) to 1 (the paper's pause)."""
    rollout_s: float = 0.0
    """D."""

    def __post_init__(self) -> None:
        assert self.rollouts_per_step > 0 and self.train_s > 0 and self.bcast_s >= 0 and self.rollout_s >= 0
        assert self.max_staleness >= 0 and 0 <= self.stall <= 1


def delay_steps(load: Load) -> int:
    """⌈(T_bcast + D) / T_train⌉: how many versions pass while a snapshot spreads and a rollout is made of it."""
    return math.ceil((load.bcast_s + load.rollout_s) / load.train_s - ROUNDING)


def publish_interval(load: Load) -> int:
    """κ = S − ⌈(T_bcast + D)/T_train⌉, and 1 where that is less."""
    return max(1, load.max_staleness - delay_steps(load))


def overlaps(load: Load, interval: int) -> bool:
    """Whether generation, dissemination and training overlap fully at the provisioning rule's rate."""
    return interval + delay_steps(load) <= load.max_staleness


def provision_rate(load: Load, interval: int) -> float:
    """The rule: Σμ_i = κR / (κ·T_train − f·T_bcast); infinite where f·T_bcast ≥ κ·T_train."""
    generating_s = load.train_s - load.stall * load.bcast_s / interval
    return load.rollouts_per_step / generating_s if generating_s > 0 else math.inf


def target_rate(load: Load) -> float:
    """Σμ_i to provision: the rule's at its κ; where it has no solution, what makes a batch while one is trained."""
    rate = provision_rate(load, publish_interval(load))
    return rate if math.isfinite(rate) else load.rollouts_per_step / load.train_s


def step_s(load: Load, interval: int, rate: float) -> float:
    """Seconds a step at `rate` = Σμ_i, publishing every `interval` = κ ≤ S + 1 steps: the longest of

        T_train                                                               the learner
        g + f·T_bcast/κ                                                       the workers, with g = R/Σμ_i
        (T_bcast + D + g + p·f·T_bcast + T_train) / (S − κ + 2)               the turn-around

    where p is the number of further dissemination pauses that fall into D + g. With S = 0 and κ = 1 that is
    T_bcast + D + R/Σμ_i + T_train: one after the other.
    """
    assert 1 <= interval <= load.max_staleness + 1, f"versions {interval} steps apart never satisfy S"
    if rate <= 0:
        return math.inf
    generation_s = load.rollouts_per_step / rate
    pause_s = load.stall * load.bcast_s
    shortest = max(load.train_s, generation_s + pause_s / interval)
    work_s = load.rollout_s + generation_s
    return max(shortest, min(_turnaround_s(load, interval, work_s, p) for p in range(load.max_staleness + 3)))


def _turnaround_s(load: Load, interval: int, work_s: float, pauses: int) -> float:
    """Step length at which the turn-around closes with so many pauses in it, and has no more of them."""
    pause_s = load.stall * load.bcast_s
    around_s = load.bcast_s + work_s + pauses * pause_s + load.train_s
    closes = around_s / (load.max_staleness - interval + 2)
    if interval * closes < load.bcast_s:
        # Snapshots spread one after the other: versions are skipped, and the effective κ is T_bcast / step.
        skipping = (load.bcast_s + around_s) / (load.max_staleness + 2)
        closes = max(closes, min(skipping, load.bcast_s / interval))
    # Between two pauses lie κ·step − f·T_bcast seconds of work.
    fits = (work_s / (pauses + 1) + pause_s) / interval if pause_s > 0 else 0.0
    return max(closes, fits)


def full_rate(load: Load, interval: int) -> float:
    """The least rate at which the learner never waits, infinite where no rate is enough.

    It is the rule's rate where the overlap is full. Where it is not, such as for S = 1, faster workers may make up for
    the delay.
    """
    rule = provision_rate(load, interval)
    enough = load.train_s * (1 + ROUNDING)
    if math.isinf(rule) or step_s(load, interval, FASTEST * rule) > enough:
        return math.inf
    low, high = rule, FASTEST * rule
    if step_s(load, interval, low) <= enough:
        return low
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if step_s(load, interval, middle) <= enough else (middle, high)
    return high


def utilisation(load: Load, interval: int, rate: float) -> float:
    """Share of the time that the learner trains, at `rate` = Σμ_i."""
    return load.train_s / step_s(load, interval, rate)


def freshest_interval(load: Load, rate: float) -> int:
    """The smallest κ whose steps are as short as with the rule's κ: it costs more publications and nothing else.

    The paper's κ is the largest that the bound allows. Where workers generate while a snapshot spreads (f → 0), fewer
    steps between versions make rollouts fresher at the same rate.
    """
    largest = publish_interval(load)
    target = step_s(load, largest, rate) * (1 + FRESH_TOLERANCE)
    spread = math.ceil(load.bcast_s / load.train_s - ROUNDING)
    candidates = [k for k in range(max(1, min(spread, largest)), largest) if step_s(load, k, rate) <= target]
    return min(candidates, default=largest)
