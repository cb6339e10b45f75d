"""The sequential test keeps its promises: errors bounded however often one looks, effects found, order irrelevant."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_makers import make_entry, make_trial, noisy_trials

from shoal.errors import RecordError
from shoal.memory.admission import (
    FRACTIONS,
    AdmissionPolicy,
    decide,
    discovery_level,
    distinct,
    evidence,
    gain,
    log_e_value,
    lower_bound,
)
from shoal.memory.records import Run

POLICY = AdmissionPolicy()
GAINS = st.lists(st.floats(-1, 1), max_size=60)


@given(GAINS, st.floats(-0.9, 0.9))
def test_e_value_is_the_mixture_of_bets(gains: list[float], mean: float) -> None:
    slow = 0.0
    for fraction in FRACTIONS:
        wealth = 1.0
        for value in gains:
            wealth *= 1 + fraction * (value - mean) / (1 + mean)
        slow += wealth / len(FRACTIONS)
    assert math.exp(log_e_value(gains, mean)) == pytest.approx(slow, rel=1e-6)


@settings(max_examples=40)
@given(GAINS, st.randoms())
def test_evidence_does_not_depend_on_order(gains: list[float], draw: random.Random) -> None:
    shuffled = draw.sample(gains, len(gains))
    assert log_e_value(shuffled) == pytest.approx(log_e_value(gains), abs=1e-9)
    assert decide(shuffled, level=0.01, policy=POLICY) == decide(gains, level=0.01, policy=POLICY)


@given(st.floats(-0.95, 0.95), st.floats(0, 1))
def test_a_bet_is_fair_under_the_hypothesis(mean: float, spread: float) -> None:
    """One round on two values with exactly this mean multiplies the wealth by 1 on average."""
    low, high = mean - spread * (1 + mean), mean + spread * (1 - mean)
    if high - low < 1e-6:
        return
    chance = (mean - low) / (high - low)
    expected = chance * math.exp(log_e_value([high], mean)) + (1 - chance) * math.exp(log_e_value([low], mean))
    assert expected == pytest.approx(1.0, abs=1e-6)


@settings(max_examples=40)
@given(GAINS.filter(lambda g: len(g) > 3), st.floats(0.001, 0.5))
def test_lower_bound_inverts_the_test_and_lies_below_the_mean(gains: list[float], level: float) -> None:
    bound = lower_bound(gains, level)
    assert bound <= sum(gains) / len(gains) + 1e-6
    if -0.999 < bound < 0.999:
        assert log_e_value(gains, bound) == pytest.approx(-math.log(level), abs=1e-3)
    decision = decide(gains, level=level, policy=AdmissionPolicy(threshold=0.0, min_trials=1))
    assert (decision.verdict == "accept") <= (decision.lower_bound >= -1e-6)


def test_false_alarms_stay_below_the_level_although_one_looks_after_every_trial() -> None:
    draw = np.random.default_rng(0)
    level, runs = 0.1, 400
    alarms = 0
    for _ in range(runs):
        gains = (draw.random(300) < 0.5).astype(float) - (draw.random(300) < 0.5)
        wealth = np.cumsum(np.log1p(np.outer(FRACTIONS, gains)), axis=1)
        alarms += bool(np.max(np.logaddexp.reduce(wealth, axis=0) - math.log(len(FRACTIONS))) >= -math.log(level))
    assert 0 < alarms / runs <= level


def test_levels_of_all_candidates_together_are_at_most_the_rate() -> None:
    total = sum(discovery_level(n, 0, 1.0) for n in range(1, 200_000))
    assert 0.9 < total < 1
    assert discovery_level(10, 4, 0.05) == pytest.approx(5 * discovery_level(10, 0, 0.05))
    with pytest.raises(RecordError):
        discovery_level(0, 0, 0.05)


@pytest.mark.parametrize(("effect", "verdict"), [(0.4, "accept"), (0.0, "reject"), (-0.3, "reject")])
def test_what_helps_is_found_and_what_does_not_is_given_up(effect: float, verdict: str) -> None:
    right = 0
    for seed in range(6):
        trials = noisy_trials(effect, POLICY.max_trials, seed)
        gains = [gain(trial, POLICY) for trial in trials]
        said, count = "continue", 0
        while said == "continue":
            count += 20
            said = decide(gains[:count], level=discovery_level(5, 1, 0.05), policy=POLICY).verdict
        right += said == verdict
    assert right >= 5


def test_gain_is_the_papers_formula_over_its_bound() -> None:
    trial = make_trial(1, 0.25, 1.0)
    assert gain(trial, POLICY) == pytest.approx(0.75 / 1.12)
    slow = type(trial)(
        task=trial.task,
        sampling_seed=1,
        model="m",
        config="c",
        without=Run(reward=0, steps=10, tokens=100),
        with_memory=Run(reward=0, steps=20, tokens=50),
    )
    assert gain(slow, POLICY) == pytest.approx((-0.1 * 0.5 + 0.02 * 0.5) / 1.12)
    with pytest.raises(RecordError, match="span"):
        gain(make_trial(1, 0, 3), POLICY)


def test_a_repeated_trial_is_no_more_evidence_and_its_own_task_is_none() -> None:
    entry = make_entry("carry", source_task="sibling-3")
    trials = [make_trial(n, 0, 1) for n in range(6)]
    other = make_trial(9, 0, 1, family="elsewhere")
    counted, leaks = evidence(entry, [*trials, *trials, other])
    assert {t.task.id for t in counted} == {f"sibling-{n}" for n in (0, 1, 2, 4, 5)} and leaks == 0
    contradicting = make_trial(0, 1, 0)
    assert distinct([trials[0], contradicting]) == distinct([contradicting, trials[0]])
    assert len(distinct([trials[0], contradicting])) == 1


def test_an_entry_earns_nothing_on_tasks_whose_answer_it_holds() -> None:
    entry = make_entry("sibling 1 gives 48213")
    trials = [make_trial(n, 0, 1, answers=["48213" if n < 6 else str(60_000 + n)]) for n in range(8)]
    counted, leaks = evidence(entry, trials)
    assert (len(counted), leaks) == (2, 6)
    assert decide([1.0] * 2, level=0.5, policy=POLICY, num_leaks=6).reason == "leak"


def test_policy_refuses_nonsense() -> None:
    with pytest.raises(RecordError):
        AdmissionPolicy(min_trials=10, max_trials=5)
    with pytest.raises(RecordError):
        AdmissionPolicy(false_discovery_rate=0)
