"""Is the cheapest fleet found, and do the ledger's dollars equal the bill?

    shoal bench activation --json
    shoal bench activation -- --only plans

`plans`: 1,000 random fleets of up to 30 machines, of mixed tariffs (by use, by the hour with hours paid already,
committed), prices near their rates, which is the hard case. What `planning.activation` picks is held against a solver
of another kind that is exact: all 2^n subsets up to 14 machines, dynamic programming over whole rates up to 30. And 200
fleets whose need depends on who is active (T_bcast is that of the slowest link), against all subsets: there the planner
iterates, and no optimum is promised; `self_dependent_worst` is its worst cost over the optimum.

`bill`: a real run of a tiny model, all processes real, whose owner rents machines by the run's own commands. What each
machine costs is computed from what those commands wrote down, and from when the machine ended; `bill_error` is how far
the run's dollars are from that bill. Two to four minutes.

    not_optimal, not_optimal_self_dependent    fleets whose plan costs more than the optimum
    bill_error                                 |ledger / bill − 1|, and `worst_machine_error` of any one machine
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from _bill import bill
from shoal.planning.activation import HEADROOM, Offer, activate
from shoal.planning.capacity import Load, target_rate

from _common import benchmark, emit

PARTS = ("plans", "bill")

FLEETS, SELF_DEPENDENT = 1000, 200
MOST_MACHINES, MOST_LISTED = 30, 14
"""Of a fleet; and of one whose subsets are all listed."""

SAME = 1e-9
"""Relative difference of two costs that are equal but for rounding."""

Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; all by default")
    parser.add_argument("--fleets", type=int, default=FLEETS)
    options = parser.parse_args()
    rows: Rows = []
    headline: dict[str, float] = {}
    for name in PARTS:
        if name in options.only:
            print(f"{name} …", file=sys.stderr, flush=True)
            found, numbers = plans(options.fleets) if name == "plans" else bill()
            rows += found
            headline |= numbers
    emit(rows, headline)


def plans(fleets: int) -> tuple[Rows, dict[str, float]]:
    """Plans against exact solvers."""
    rng = random.Random(11)
    wrong, seconds, sizes = 0, 0.0, []
    for number in range(fleets):
        if number % 100 == 0:
            print(f"  fleet {number} of {fleets}", file=sys.stderr, flush=True)
        listed = number < fleets // 4
        n = rng.randint(1, MOST_LISTED) if listed else rng.randint(MOST_LISTED + 1, MOST_MACHINES)
        offers = fleet(rng, n, whole=not listed)
        need = rng.uniform(0.05, 0.9) * math.fsum(o.rate for o in offers)
        started = time.process_time()
        plan = activate(offers, constant(need))
        seconds += time.process_time() - started
        costs, rates = [cost_of(o) for o in offers], [o.rate for o in offers]
        target = need * (1 + HEADROOM)
        best = by_listing(costs, rates, target) if listed else by_dynamic_programming(costs, rates, target)
        ours = math.fsum(cost_of(o) for o in offers if o.id in plan.active)
        covers = plan.rate >= target * (1 - SAME) or len(plan.active) == n
        wrong += not covers or ours > best * (1 + SAME) + SAME
        sizes.append(n)
    ratios = [self_dependent(rng) for _ in range(SELF_DEPENDENT)]
    dearer = [ratio for ratio in ratios if ratio > 1 + SAME]
    row = {
        "part": "plans",
        "fleets": fleets,
        "machines_mean": math.fsum(sizes) / len(sizes),
        "machines_most": max(sizes),
        "not_optimal": wrong,
        "seconds_planning": seconds,
        "self_dependent_fleets": len(ratios),
        "self_dependent_dearer": len(dearer),
        "self_dependent_worst": max(ratios),
        "self_dependent_mean": math.fsum(ratios) / len(ratios),
    }
    return [row], {
        "not_optimal": wrong,
        "seconds": seconds,
        "not_optimal_self_dependent": len(dearer),
        "self_dependent_worst": max(ratios),
    }


def constant(need: float) -> Callable[[Sequence[Offer]], float]:
    """A need that does not depend on who is active."""
    return lambda _: need


def fleet(rng: random.Random, n: int, *, whole: bool) -> list[Offer]:
    """Machines of mixed tariffs; `whole`: rates are whole numbers, so that dynamic programming is exact."""
    offers = []
    for number in range(n):
        rate = float(rng.randint(1, 400)) if whole else rng.uniform(0.05, 2.0)
        per_rate = rng.uniform(0.9, 1.1) if rng.random() < 0.7 else rng.uniform(0.2, 5.0)
        hourly = rng.random() < 0.4
        offers.append(
            Offer(
                f"m{number}",
                rate,
                price_usd_per_hour=rate * per_rate,
                billing="per_hour" if hourly else "per_use",
                committed=rng.random() < 0.1,
                paid_hours=rng.choice((0.0, 0.4, 1.0)) if hourly else 0.0,
                downlink_bytes_per_s=rng.choice((2.5e6, 12.5e6, 125e6)),
                egress_usd_per_hour=rng.choice((0.0, 0.1)),
            )
        )
    return offers


def cost_of(offer: Offer) -> float:
    """What having a machine active for the next hour adds to the bill: the tariffs of docs/capacity.md, said again."""
    if offer.committed:
        rent = 0.0
    elif offer.billing == "per_use":
        rent = offer.price_usd_per_hour
    else:
        rent = 0.0 if offer.paid_hours >= 1.0 else offer.price_usd_per_hour
    return rent + offer.egress_usd_per_hour


def by_listing(costs: Sequence[float], rates: Sequence[float], target: float) -> float:
    """The cheapest of all subsets that reach the target; of all machines where none does."""
    n = len(costs)
    chosen = np.arange(2**n)[:, None] >> np.arange(n) & 1
    fits = chosen @ np.array(rates) >= target * (1 - SAME)
    return float((chosen @ np.array(costs))[fits].min()) if fits.any() else math.fsum(costs)


def by_dynamic_programming(costs: Sequence[float], rates: Sequence[float], target: float) -> float:
    """The same for whole rates: best[r] is the least that reaching r costs."""
    needed = math.ceil(target * (1 - SAME))
    if math.fsum(rates) < needed:
        return math.fsum(costs)
    best = np.full(needed + 1, np.inf)
    best[0] = 0.0
    reached = np.arange(needed + 1)
    for cost, rate in zip(costs, rates, strict=True):
        best = np.minimum(best, best[np.maximum(0, reached - int(rate))] + cost)
    return float(best[needed])


def self_dependent(rng: random.Random) -> float:
    """A fleet whose T_bcast is that of its slowest link: the plan's cost over that of the best set that covers itself.

    1 where no set covers itself: then everybody works, and there is nothing to choose.
    """
    n = rng.randint(4, MOST_LISTED)
    offers = fleet(rng, n, whole=False)
    rollouts = rng.uniform(0.2, 0.6) * math.fsum(o.rate for o in offers) * 60.0

    def needed(active: Sequence[Offer]) -> float:
        slowest = min((o.downlink_bytes_per_s for o in active), default=125e6)
        return target_rate(Load(rollouts, train_s=60.0, bcast_s=50e6 / slowest, max_staleness=3, stall=1.0))

    plan = activate(offers, needed)
    best = math.inf
    for mask in range(1, 2**n):
        active = [offers[i] for i in range(n) if mask >> i & 1]
        cost = math.fsum(cost_of(o) for o in active)
        if cost < best and math.fsum(o.rate for o in active) >= needed(active) * (1 + HEADROOM) * (1 - SAME):
            best = cost
    if math.isinf(best) or best == 0:
        return 1.0
    return max(1.0, math.fsum(cost_of(o) for o in offers if o.id in plan.active) / best)


if __name__ == "__main__":
    benchmark(main)
