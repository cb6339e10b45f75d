"""The cheapest set of workers whose rates add up to what is needed: a covering knapsack.

    minimise Σ c_i x_i    subject to    Σ μ_i x_i ≥ needed,    x_i ∈ {0, 1}

Up to `EXACT_ITEMS` items the answer is exact, by meeting in the middle: all subsets of either half are listed, and for
each of one half the cheapest of the other that closes the gap is found by bisection; 2^15 each, whatever the numbers.
Beyond, items are ordered by c/μ and only the `EXACT_ITEMS` around the break, where greedy choice errs, are chosen
exactly; those before are taken, those after left. The relaxation (`fractional_cost`) bounds what that can lose.

Invariants: the answer covers, or is None because everything together does not; costs and rates are not negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

EXACT_ITEMS = 30

TOLERANCE = 1e-9
"""Relative slack of a sum of rates, for rounding."""

Floats = NDArray[np.float64]


def cheapest_cover(costs: Sequence[float], rates: Sequence[float], needed: float) -> list[int] | None:
    """Indices of the cheapest items whose rates sum to `needed`, in rising order; None where all do not."""
    assert len(costs) == len(rates) and all(c >= 0 for c in costs) and all(r >= 0 for r in rates)
    needed *= 1 - TOLERANCE
    if needed <= 0:
        return []
    if not math.fsum(rates) >= needed:
        return None
    useful = [i for i in range(len(rates)) if rates[i] > 0]
    useful.sort(key=lambda i: (costs[i] / rates[i], -rates[i]))
    first = 0
    if len(useful) > EXACT_ITEMS:
        reached, broken = 0.0, 0
        while broken < len(useful) and reached + rates[useful[broken]] < needed:
            reached += rates[useful[broken]]
            broken += 1
        first = min(max(0, broken - EXACT_ITEMS // 2), len(useful) - EXACT_ITEMS)
    taken, core = useful[:first], useful[first : first + EXACT_ITEMS]
    rest = needed - math.fsum(rates[i] for i in taken)
    chosen = _exact(np.array([costs[i] for i in core]), np.array([rates[i] for i in core]), rest)
    # By construction the core closes the gap; where rounding says otherwise, all of it does.
    return sorted(taken + (core if chosen is None else [core[i] for i in chosen]))


def most_within(costs: Sequence[float], rates: Sequence[float], budget: float) -> list[int]:
    """Indices of items with the highest total rate whose costs sum to at most `budget`.

    Its complement is a covering problem: give up the least rate whose costs make up for what is too much.
    """
    total = math.fsum(costs)
    too_much = min(total, max(0.0, total - budget) * (1 + 2 * TOLERANCE))  # kept on the side of the budget
    dropped = cheapest_cover(rates, costs, too_much)
    gone = set(dropped if dropped is not None else range(len(costs)))
    return [i for i in range(len(costs)) if i not in gone]


def fractional_cost(costs: Sequence[float], rates: Sequence[float], needed: float) -> float:
    """Cost where items may be taken in part: no cover is cheaper."""
    cost = 0.0
    for i in sorted((i for i in range(len(rates)) if rates[i] > 0), key=lambda i: costs[i] / rates[i]):
        if needed <= rates[i]:
            return cost + costs[i] * max(0.0, needed) / rates[i]
        cost, needed = cost + costs[i], needed - rates[i]
    return math.inf if needed > 0 else cost


def _exact(costs: Floats, rates: Floats, needed: float) -> list[int] | None:
    middle = len(costs) // 2
    cost_a, rate_a = _subset_sums(costs[:middle]), _subset_sums(rates[:middle])
    cost_b, rate_b = _subset_sums(costs[middle:]), _subset_sums(rates[middle:])
    order = np.argsort(rate_a, kind="stable")
    rate_a, cost_a = rate_a[order], cost_a[order]
    # cheapest[i]: which of those that are at least as fast as the i-th is the cheapest
    lowest = np.minimum.accumulate(cost_a[::-1])[::-1]
    first = np.searchsorted(rate_a, needed - rate_b, side="left")
    closes = first < len(rate_a)
    if not closes.any():
        return None
    total = np.where(closes, cost_b + lowest[np.minimum(first, len(rate_a) - 1)], np.inf)
    best = int(np.argmin(total))
    start = int(first[best])
    subset_a = int(order[start + int(np.argmin(cost_a[start:]))])
    in_a = [i for i in range(middle) if subset_a >> i & 1]
    return in_a + [middle + i for i in range(len(costs) - middle) if best >> i & 1]


def _subset_sums(values: Floats) -> Floats:
    """The sum of every subset; bit i of the index says whether value i is in it."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    return sums
