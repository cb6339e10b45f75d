"""The covering knapsack: against brute force, against dynamic programming up to thirty items, and its limits."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.planning.covering import EXACT_ITEMS, cheapest_cover, fractional_cost, most_within

AMOUNTS = st.floats(0, 1e3).map(lambda x: round(x, 3))
ITEMS = st.lists(st.tuples(AMOUNTS, AMOUNTS), max_size=12)


def cost_of(chosen: list[int], values: list[float]) -> float:
    return math.fsum(values[i] for i in chosen)


def brute_force(costs: list[float], rates: list[float], needed: float) -> float:
    """Cheapest cover of all 2^n subsets."""
    n = len(costs)
    masks = np.arange(2**n)[:, None] >> np.arange(n) & 1
    fits = masks @ np.array(rates) >= needed * (1 - 1e-9)
    return float((masks @ np.array(costs))[fits].min(initial=math.inf))


def by_dynamic_programming(costs: list[float], rates: list[int], needed: int) -> float:
    """Cheapest cover for whole rates, however many items."""
    best = [0.0] + [math.inf] * needed
    for cost, rate in zip(costs, rates, strict=True):
        for reached in range(needed, 0, -1):
            best[reached] = min(best[reached], best[max(0, reached - rate)] + cost)
    return best[needed]


@given(items=ITEMS, share=st.floats(0, 1.2))
def test_small_fleets_by_brute_force(items: list[tuple[float, float]], share: float) -> None:
    costs, rates = [c for c, _ in items], [r for _, r in items]
    needed = share * math.fsum(rates)
    chosen = cheapest_cover(costs, rates, needed)
    if chosen is None:
        assert math.fsum(rates) < needed
        return
    assert len(set(chosen)) == len(chosen) and cost_of(chosen, rates) >= needed * (1 - 1e-8)
    expected = brute_force(costs, rates, needed) if items else 0.0
    assert cost_of(chosen, costs) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert cost_of(chosen, costs) >= fractional_cost(costs, rates, needed * (1 - 1e-8)) - 1e-6


def test_a_thousand_fleets_are_solved_exactly() -> None:
    """500 of up to 12 machines by brute force, 500 of 13 to 30 with whole rates by dynamic programming."""
    rng = random.Random(7)
    for fleet in range(1000):
        n = rng.randint(1, 12) if fleet < 500 else rng.randint(13, EXACT_ITEMS)
        rates = [rng.uniform(0.05, 2.0) if fleet < 500 else float(rng.randint(1, 12)) for _ in range(n)]
        # Prices near their rates: the hard case, in which ordering by price/rate says little.
        costs = [r * rng.uniform(0.9, 1.1) if rng.random() < 0.7 else rng.uniform(0.1, 5.0) for r in rates]
        needed = math.fsum(rates) * rng.uniform(0.05, 0.99)
        chosen = cheapest_cover(costs, rates, needed)
        assert chosen is not None
        if fleet < 500:
            expected = brute_force(costs, rates, needed)
        else:
            expected = by_dynamic_programming(costs, [int(r) for r in rates], math.ceil(needed))
        assert cost_of(chosen, costs) == pytest.approx(expected, rel=1e-9), f"fleet {fleet}"


@given(seed=st.integers(0, 2**32), n=st.integers(EXACT_ITEMS + 1, 300), share=st.floats(0.01, 0.99))
def test_large_fleets_stay_close_to_the_relaxation(seed: int, n: int, share: float) -> None:
    rng = random.Random(seed)
    rates = [rng.uniform(0.5, 4.0) for _ in range(n)]
    costs = [rng.uniform(0.1, 2.0) for _ in range(n)]
    needed = share * math.fsum(rates)
    chosen = cheapest_cover(costs, rates, needed)
    assert chosen is not None and cost_of(chosen, rates) >= needed * (1 - 1e-8)
    # The relaxation takes at most one item in part, so with that item whole it is a cover: never more than this.
    assert cost_of(chosen, costs) <= fractional_cost(costs, rates, needed) + max(costs) + 1e-9


@given(items=ITEMS, share=st.floats(0, 1.2))
def test_the_best_within_a_budget(items: list[tuple[float, float]], share: float) -> None:
    costs, rates = [c for c, _ in items], [r for _, r in items]
    budget = share * math.fsum(costs)
    chosen = most_within(costs, rates, budget)
    assert cost_of(chosen, costs) <= budget * (1 + 1e-9) + 1e-9
    n = len(items)
    masks = np.arange(2**n)[:, None] >> np.arange(n) & 1
    within = masks @ np.array(costs) <= budget if n else np.array([True])
    best = float((masks @ np.array(rates))[within].max()) if n else 0.0
    assert cost_of(chosen, rates) >= best * (1 - 1e-6) - 1e-6


def test_nothing_needed_and_too_much_needed() -> None:
    assert cheapest_cover([1.0], [1.0], 0.0) == []
    assert cheapest_cover([], [], 1.0) is None
    assert cheapest_cover([1.0] * 40, [1.0] * 40, 41.0) is None
    assert cheapest_cover([1.0] * 40, [1.0] * 40, 40.0) == list(range(40))
    assert cheapest_cover([1.0, 1.0], [0.0, 1.0], math.inf) is None
