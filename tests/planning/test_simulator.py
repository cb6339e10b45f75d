"""Simulated runs: the conservation laws and the bound under everything at once, pacing, activation, money."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import RunError
from shoal.planning.scenario import Machine, Outcome, Scenario
from shoal.planning.simulator import simulate

HARD = st.builds(
    Scenario,
    machines=st.lists(
        st.builds(
            Machine,
            id=st.uuids().map(str),
            rate=st.floats(0.05, 0.5),
            slots=st.integers(1, 3),
            price_usd_per_hour=st.floats(0, 2),
            billing=st.sampled_from(("per_use", "per_hour")),
            committed=st.booleans(),
            region=st.sampled_from(("eu", "us")),
            uplink_bytes_per_s=st.sampled_from((1e6, 1e7)),
            downlink_bytes_per_s=st.sampled_from((1e6, 2e7)),
            losses_per_hour=st.sampled_from((0.0, 10.0)),
            absent_s=st.floats(1, 300),
        ),
        min_size=1,
        max_size=12,
    ).map(tuple),
    leases_per_step=st.integers(1, 8),
    max_staleness=st.integers(0, 5),
    train_s=st.floats(1, 60),
    steps=st.just(20),
    snapshot_bytes=st.sampled_from((0.0, 1e6, 1e8)),
    source_bytes_per_s=st.just(1e7),
    stall=st.sampled_from((0.0, 0.5, 1.0)),
    paced=st.booleans(),
    duration_sigma=st.floats(0, 0.6),
    straggler_share=st.floats(0, 0.1),
    train_sigma=st.floats(0, 0.5),
    day_amplitude=st.floats(0, 0.9),
    activation=st.booleans(),
    seed=st.integers(0, 2**32),
)


def check(scenario: Scenario, outcome: Outcome) -> None:
    counts = outcome.counts
    assert outcome.violations == 0 and all(age <= scenario.max_staleness for age in outcome.staleness)
    assert counts["leased"] == counts["accepted"] + counts["void"] + counts["running"]
    assert counts["accepted"] == counts["consumed"] + counts["swept"] + counts["buffered"]
    assert counts["consumed"] == scenario.steps * scenario.leases_per_step
    assert 0 < outcome.utilisation <= 1 + 1e-9 and 0 <= outcome.idle_usd <= outcome.usd + 1e-6


@settings(max_examples=30)
@given(scenario=HARD)
def test_whatever_happens_runs_end_and_their_books_balance(scenario: Scenario) -> None:
    outcome = simulate(scenario)
    check(scenario, outcome)
    again = simulate(scenario)
    assert again == outcome, "a seed decides everything"


def alike(rate: float, count: int, price: float = 0.0) -> tuple[Machine, ...]:
    return tuple(Machine(f"w{i}", rate / count, price_usd_per_hour=price) for i in range(count))


def test_pacing_makes_rollouts_fresher_and_costs_little() -> None:
    """Workers half again as fast as the learner: unpaced, everything is consumed at the bound."""
    scenario = Scenario(alike(1.5 * 64 / 60, 10), 64, 4, 60.0, 120, bcast_s=12.0, interval=1, paced=False)
    loose, paced = simulate(scenario), simulate(replace(scenario, paced=True))
    assert loose.mean_staleness > 3.9
    assert paced.mean_staleness < 1.5
    assert paced.utilisation > 0.985


def test_length_bias_of_the_sweep_is_measured() -> None:
    """Stragglers go stale more often than others, and the outcome says by how much."""
    scenario = Scenario(alike(1.5, 60), 64, 2, 60.0, 80, bcast_s=6.0, straggler_share=0.05, straggler_factor=8.0)
    outcome = simulate(scenario)
    assert outcome.counts["swept"] > 0
    assert outcome.mean_duration_swept_s > 1.5 * outcome.mean_duration_kept_s


def test_activation_takes_the_cheap_ones_and_the_ledger_agrees() -> None:
    """Twice the rate that is needed on offer, half of it dear: the dear ones stay away, dollars are rate × time."""
    needed = 32 / 60.0
    cheap = tuple(Machine(f"cheap{i}", needed / 8, price_usd_per_hour=0.2) for i in range(9))
    dear = tuple(Machine(f"dear{i}", needed / 8, price_usd_per_hour=2.0) for i in range(9))
    scenario = Scenario(
        (*dear, *cheap), 32, 4, 60.0, 80, bcast_s=6.0, activation=True, duration_sigma=0.0, learner_usd_per_hour=5.0
    )
    outcome = simulate(scenario)
    assert outcome.active_workers == pytest.approx(9.0)
    assert outcome.usd == pytest.approx((9 * 0.2 + 5.0) * outcome.elapsed_s / 3600, rel=0.01)
    assert outcome.idle_usd == pytest.approx(0.0)


def test_lost_workers_cost_time_not_work() -> None:
    machines = tuple(Machine(f"w{i}", 0.1, losses_per_hour=20.0, absent_s=60.0) for i in range(20))
    scenario = Scenario(machines, 32, 3, 20.0, 100, bcast_s=2.0)
    outcome = simulate(scenario)
    check(scenario, outcome)
    assert outcome.counts["void"] > 50


def test_a_fleet_that_gets_nowhere_is_said_so() -> None:
    """Every lease takes a hundred times as long as a machine stays."""
    machines = (Machine("w", 0.001, losses_per_hour=360.0, absent_s=1.0),)
    with pytest.raises(RunError, match="does not get beyond step 0"):
        simulate(Scenario(machines, 8, 1, 20.0, 10, duration_sigma=0.0))
