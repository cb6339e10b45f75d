"""Activation: it covers what it needs itself, costs no more than its rivals, respects budgets, and does not dither."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.planning.activation import SWITCH_SHARE, Offer, activate, replan

OFFERS = st.lists(
    st.builds(
        Offer,
        id=st.uuids().map(str),
        rate=st.floats(0.05, 5),
        price_usd_per_hour=st.floats(0.01, 5),
        billing=st.sampled_from(("per_use", "per_hour")),
        committed=st.booleans(),
        paid_hours=st.floats(0, 1),
    ),
    min_size=1,
    max_size=20,
)


def constant(rate: float) -> object:
    return lambda active: rate


def growing(base: float, per_worker: float) -> object:
    """T_bcast grows with the workers, and the need with it."""

    def needed(active: Sequence[Offer]) -> float:
        return base + per_worker * len(active)

    return needed


@given(offers=OFFERS, share=st.floats(0.01, 1.5), growth=st.floats(0, 0.05))
def test_a_plan_covers_what_it_needs_itself_or_says_so(offers: list[Offer], share: float, growth: float) -> None:
    needed = growing(share * math.fsum(o.rate for o in offers), growth)
    plan = activate(offers, needed)
    active = [o for o in offers if o.id in plan.active]
    assert plan.rate == pytest.approx(math.fsum(o.rate for o in active))
    assert plan.needed == needed(active)
    if plan.shortfall > 0:
        everybody = activate(offers, constant(math.inf))
        assert len(plan.active) == len(offers) == len(everybody.active), "only a fleet that is too small falls short"
    paid = math.fsum(o.price_usd_per_hour for o in offers if o.committed or o.id in plan.active)
    assert plan.usd_per_hour == pytest.approx(paid)


@given(offers=OFFERS, share=st.floats(0.1, 0.9), budget_share=st.floats(0, 1))
def test_a_budget_is_kept(offers: list[Offer], share: float, budget_share: float) -> None:
    needed = constant(share * math.fsum(o.rate for o in offers))
    full = activate(offers, needed)
    sunk = math.fsum(o.price_usd_per_hour for o in offers if o.committed)
    budget = budget_share * full.usd_per_hour
    plan = activate(offers, needed, max_usd_per_hour=budget)
    assert plan.usd_per_hour <= max(budget, sunk) * (1 + 1e-6)
    assert plan.limited_by_budget == (full.usd_per_hour > budget)
    committed = {o.id for o in offers if o.committed}
    if plan.limited_by_budget and sunk <= budget:
        assert committed <= plan.active, "what is paid for anyway works"


def test_hourly_machines_that_are_paid_for_come_first() -> None:
    """A parked machine that keeps costing is free to use; one with an hour left is, until the hour ends."""
    cheap = Offer("cheap", 1.0, 0.2)
    parked = Offer("parked", 1.0, 3.0, "per_hour", committed=True)
    paid = Offer("paid", 1.0, 3.0, "per_hour", paid_hours=1.0)
    plan = activate([cheap, parked, paid], constant(1.0), headroom=0.0)
    assert plan.active in ({"parked"}, {"paid"}) and plan.usd_per_hour >= 3.0
    assert activate([cheap, replace(paid, paid_hours=0.0)], constant(1.0), headroom=0.0).active == {"cheap"}


def test_plans_of_thirty_machines_of_mixed_tariffs_are_optimal() -> None:
    """Against dynamic programming over whole rates; `shoal bench activation` does so for a thousand fleets."""
    rng = random.Random(2)
    for _ in range(25):
        offers = [
            Offer(
                f"m{i}",
                float(rng.randint(1, 60)),
                rng.uniform(0.9, 1.1) * rng.randint(1, 60),
                billing=rng.choice(("per_use", "per_hour")),
                committed=rng.random() < 0.1,
                paid_hours=rng.choice((0.0, 1.0)),
            )
            for i in range(30)
        ]
        need = rng.randint(10, int(sum(o.rate for o in offers)))
        free = [o.committed or (o.billing == "per_hour" and o.paid_hours == 1.0) for o in offers]
        costs = [0.0 if nothing else o.price_usd_per_hour for o, nothing in zip(offers, free, strict=True)]
        best = [0.0] + [math.inf] * need
        for offer, cost in zip(offers, costs, strict=True):
            for reached in range(need, 0, -1):
                best[reached] = min(best[reached], best[max(0, reached - int(offer.rate))] + cost)
        plan = activate(offers, constant(need), headroom=0.0)
        ours = math.fsum(cost for o, cost in zip(offers, costs, strict=True) if o.id in plan.active)
        assert plan.shortfall == 0 and ours == pytest.approx(best[need])


def test_a_covering_plan_is_kept_unless_another_is_much_cheaper() -> None:
    old, new = Offer("old", 1.0, 1.00), Offer("new", 1.0, 1.0 - SWITCH_SHARE / 2)
    assert replan(frozenset({"old"}), [old, new], constant(1.0), headroom=0.0).active == {"old"}
    bargain = replace(new, price_usd_per_hour=1.0 - 2 * SWITCH_SHARE)
    assert replan(frozenset({"old"}), [old, bargain], constant(1.0), headroom=0.0).active == {"new"}
    assert replan(frozenset({"old", "gone"}), [old, new], constant(1.0), headroom=0.0).active <= {"old", "new"}
    assert replan(frozenset({"old"}), [old, new], constant(1.5), headroom=0.0).active == {"old", "new"}
    assert replan(frozenset({"old", "new"}), [old, new], constant(2.0), max_usd_per_hour=1.1).limited_by_budget


def test_noise_in_the_rates_moves_few_workers() -> None:
    """Rates measured with 2 % of noise, twenty times: the set stays what it was but for the margin."""
    rng = random.Random(3)
    offers = [Offer(f"w{i}", rng.uniform(0.5, 2), rng.uniform(0.2, 0.6)) for i in range(60)]
    plan = activate(offers, constant(20.0))
    moved = 0
    for _ in range(20):
        noisy = [replace(o, rate=o.rate * rng.gauss(1, 0.02)) for o in offers]
        after = replan(plan.active, noisy, constant(20.0))
        moved += len(after.active ^ plan.active)
        plan = after
    assert moved <= 4
