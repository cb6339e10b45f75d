"""Which workers are active: the cheapest that keep the learner busy, and no change of mind for pennies.

Deviations from ECHO-2 (arXiv 2602.02192), which activates by price/μ until the rule is met:
1. The set is the optimum of the covering knapsack (`planning/covering`), of which ordering by price/μ is the greedy
   approximation.
2. What is needed depends on who is active, because T_bcast does: a set that turns out to need more than it has is
   solved again for that, so the need rises until it is met or everybody is active (`activate`).
3. Billing by the hour is in the optimum: an hourly machine that has been acquired costs nothing more until its paid
   hour ends, and one that is `committed` costs the same parked or active; what is released costs nothing.

Invariants: an active set covers what it itself needs times (1 + headroom), or the plan says that it does not
(`shortfall`); under `max_usd_per_hour` the plan never costs more than that, unless what is committed alone does; a plan
is changed only if it no longer covers, breaks the budget, or another is cheaper by more than `SWITCH_SHARE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.planning.covering import cheapest_cover, most_within

HEADROOM = 0.05
"""ε: how much more than the minimum is activated, so that one slow moment does not stop the learner."""

SWITCH_SHARE = 0.05
"""A covering set is replaced only by one that is this much cheaper, and one worker by another only if it is: a switch
costs a join and a fetch, and a rate that was measured well by chance is not worth one."""

HORIZON_HOURS = 1.0
"""How far ahead a plan counts what hourly machines will cost."""

MAX_ROUNDS = 32
"""Rounds of the fixed point; each raises the need by at least `ROUND_SHARE`, so few are ever used."""

ROUND_SHARE = 1e-3

Billing = Literal["per_use", "per_hour"]


@dataclass(frozen=True)
class Offer:
    """A worker that can be active."""

    id: str
    rate: float
    """μ_i, rollouts a second: measured, or what its owner says until then."""
    price_usd_per_hour: float
    billing: Billing = "per_use"
    committed: bool = False
    """Cannot be given back: costs the same parked or active."""
    paid_hours: float = 0.0
    """Billed by the hour: what is left of the hours already paid."""
    uplink_bytes_per_s: float = math.inf
    downlink_bytes_per_s: float = math.inf
    egress_usd_per_hour: float = 0.0
    """What sending it every snapshot costs."""

    @property
    def marginal_usd_per_hour(self) -> float:
        """What having it active costs more than not, averaged over the horizon."""
        if self.committed:
            return self.egress_usd_per_hour
        if self.billing == "per_use":
            return self.price_usd_per_hour + self.egress_usd_per_hour
        hours = math.ceil(max(0.0, HORIZON_HOURS - self.paid_hours))
        return self.price_usd_per_hour * hours / HORIZON_HOURS + self.egress_usd_per_hour


Needed = Callable[[Sequence[Offer]], float]
"""The rate that an active set must have, given that it is active: the provisioning rule at its own T_bcast."""


@dataclass(frozen=True)
class Plan:
    """Who is active."""

    active: frozenset[str]
    rate: float
    """Σμ_i of the active."""
    needed: float
    """What they need by the provisioning rule, without headroom; infinite where no rate is enough."""
    usd_per_hour: float
    """Prices of the active and of what is committed, and egress."""
    limited_by_budget: bool = False

    @property
    def shortfall(self) -> float:
        """Rate that is missing; 0 where the plan covers."""
        return max(0.0, self.needed - self.rate)


def activate(
    offers: Sequence[Offer],
    needed: Needed,
    *,
    headroom: float = HEADROOM,
    max_usd_per_hour: float = math.inf,
    incumbents: frozenset[str] = frozenset(),
) -> Plan:
    """The cheapest plan that covers its own need, or the best there is.

    Args:
        incumbents: workers that are active already and count as `SWITCH_SHARE` cheaper than they are.
    """
    costs = [o.marginal_usd_per_hour * (1 - SWITCH_SHARE if o.id in incumbents else 1) for o in offers]
    target = needed([]) * (1 + headroom)
    chosen: Sequence[Offer] = offers
    for _ in range(MAX_ROUNDS):
        picked = cheapest_cover(costs, [o.rate for o in offers], target)
        if picked is None:
            chosen = offers
            break
        chosen = [offers[i] for i in picked]
        own = needed(chosen) * (1 + headroom)
        if own <= target * (1 + ROUND_SHARE):
            break
        target = own
    plan = _plan(offers, chosen, needed)
    if plan.usd_per_hour <= max_usd_per_hour:
        return plan
    sunk = math.fsum(o.price_usd_per_hour for o in offers if o.committed)
    prices = [_active_usd_per_hour(o) for o in offers]
    within = most_within(prices, [o.rate for o in offers], max(0.0, max_usd_per_hour - sunk))
    return _plan(offers, [offers[i] for i in within], needed, limited_by_budget=True)


def replan(
    current: frozenset[str],
    offers: Sequence[Offer],
    needed: Needed,
    *,
    headroom: float = HEADROOM,
    max_usd_per_hour: float = math.inf,
) -> Plan:
    """The plan after rates, prices, needs or membership changed: the current one while it will do."""
    kept = _plan(offers, [o for o in offers if o.id in current], needed)
    best = activate(offers, needed, headroom=headroom, max_usd_per_hour=max_usd_per_hour, incumbents=current)
    covers = kept.active == current and kept.shortfall == 0 and kept.usd_per_hour <= max_usd_per_hour
    if covers and best.usd_per_hour >= kept.usd_per_hour * (1 - SWITCH_SHARE):
        return kept
    return best


def _plan(offers: Sequence[Offer], chosen: Sequence[Offer], needed: Needed, *, limited_by_budget: bool = False) -> Plan:
    sunk = math.fsum(o.price_usd_per_hour for o in offers if o.committed)
    return Plan(
        active=frozenset(o.id for o in chosen),
        rate=math.fsum(o.rate for o in chosen),
        needed=needed(chosen),
        usd_per_hour=sunk + math.fsum(map(_active_usd_per_hour, chosen)),
        limited_by_budget=limited_by_budget,
    )


def _active_usd_per_hour(offer: Offer) -> float:
    """What an active worker costs beside what is committed."""
    return offer.egress_usd_per_hour + (0.0 if offer.committed else offer.price_usd_per_hour)
