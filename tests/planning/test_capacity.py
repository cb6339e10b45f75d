"""The capacity model: the paper's cases by hand, its limits, monotony; and that simulated runs agree with it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.planning.capacity import (
    Load,
    delay_steps,
    freshest_interval,
    full_rate,
    overlaps,
    provision_rate,
    publish_interval,
    step_s,
    utilisation,
)
from shoal.planning.scenario import Machine, Scenario
from shoal.planning.simulator import simulate

LOADS = st.builds(
    Load,
    rollouts_per_step=st.floats(1, 4096),
    train_s=st.floats(0.1, 600),
    bcast_s=st.floats(0, 600),
    max_staleness=st.integers(0, 12),
    stall=st.floats(0, 1),
    rollout_s=st.floats(0, 600),
)


def test_the_papers_rule() -> None:
    """κ = S − 1 where T_bcast ≤ T_train; Σμ ≥ κR/(κ·T_train − T_bcast)."""
    load = Load(128, 60.0, 18.0, 6, stall=1.0)
    assert publish_interval(load) == 5 and overlaps(load, 5)
    assert provision_rate(load, 5) == pytest.approx(5 * 128 / (5 * 60 - 18))
    assert publish_interval(replace(load, bcast_s=61.0)) == 4
    assert math.isinf(provision_rate(replace(load, bcast_s=60.0), 1)), "feasible only if T_bcast < κ·T_train"
    assert provision_rate(replace(load, stall=0.0), 1) == pytest.approx(128 / 60.0)


def test_whole_ratios_are_not_rounded_up() -> None:
    assert delay_steps(Load(1, 0.1, 0.3, 9)) == 3


def test_the_sequential_loop_and_the_bound_of_one() -> None:
    """S = 0 is one after the other; with S = 1 a version's delay shows in every second step."""
    rate = 128 / 60.0
    load = Load(128, 60.0, 18.0, 0, rollout_s=6.0)
    assert step_s(load, 1, rate) == pytest.approx(18 + 6 + 60 + 60)
    one = replace(load, max_staleness=1)
    assert not overlaps(one, publish_interval(one))
    assert step_s(one, 1, rate) == pytest.approx((18 + 6 + 60 + 60) / 2)
    assert full_rate(one, 1) == pytest.approx(128 / (60 - 18 - 6)), "faster workers make up for the delay"
    assert math.isinf(full_rate(replace(one, bcast_s=60.0), 1)), "nothing makes up for a delay as long as the step"
    assert math.isinf(full_rate(load, 1))


@given(load=LOADS)
def test_the_rule_suffices_where_generation_overlaps(load: Load) -> None:
    """At the rule's rate and κ the learner never waits, if snapshots are staged."""
    load = replace(load, stall=0.0)
    interval = publish_interval(load)
    if overlaps(load, interval) and interval * load.train_s >= load.bcast_s:
        assert utilisation(load, interval, provision_rate(load, interval)) == pytest.approx(1.0)
        assert full_rate(load, interval) == pytest.approx(provision_rate(load, interval))


@given(load=LOADS, rate=st.floats(1e-3, 1e3), factor=st.floats(1, 10))
def test_more_of_what_helps_never_hurts(load: Load, rate: float, factor: float) -> None:
    interval = publish_interval(load)
    step = step_s(load, interval, rate)
    assert load.train_s <= step < math.inf and utilisation(load, interval, rate) <= 1
    rounding = 1 + 1e-9
    assert step_s(load, interval, rate * factor) <= step * rounding
    assert step_s(replace(load, max_staleness=load.max_staleness + 1), interval, rate) <= step * rounding
    assert step_s(replace(load, bcast_s=load.bcast_s / factor), interval, rate) <= step * rounding
    assert step_s(load, interval, 0.0) == math.inf
    assert freshest_interval(load, rate) <= interval
    if math.isfinite(enough := full_rate(load, interval)):
        assert utilisation(load, interval, enough) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("share", [0.8, 1.0])
@pytest.mark.parametrize(
    ("bound", "bcast_share", "stall"),
    [(0, 0.3, 0), (1, 0.3, 0), (1, 0.9, 0), (2, 0.3, 0), (2, 0.3, 1), (3, 0.9, 0), (6, 0.9, 0), (6, 0.3, 1)],
)
def test_simulated_runs_agree(bound: int, bcast_share: float, stall: float, share: float) -> None:
    """The formula knows nothing of queues, windows and random durations; the simulation is made of them."""
    load = Load(64, 60.0, 60.0 * bcast_share, bound, stall, rollout_s=6.0)
    rate = share * provision_rate(load, publish_interval(load))
    workers = max(1, round(rate * load.rollout_s))
    machines = tuple(Machine(str(i), rate / workers) for i in range(workers))
    scenario = Scenario(
        machines, 64, bound, load.train_s, steps=80, bcast_s=load.bcast_s, stall=stall, paced=False, seed=bound
    )
    outcome = simulate(scenario)
    assert outcome.violations == 0
    assert outcome.utilisation == pytest.approx(outcome.predicted_utilisation, abs=0.03)
