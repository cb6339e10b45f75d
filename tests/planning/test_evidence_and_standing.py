"""Evidence and standing as pure state machines: bounds, monotony, and what honest and lying workers come to."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.planning.evidence import OTHER, TOLERANCES, Surprise, objection, tolerance_of
from shoal.planning.standing import (
    EXCLUDE_AT,
    FIRST_EXCLUSION_S,
    LONGEST_EXCLUSION_S,
    Standing,
    rate_that_deters,
)

numbers = st.floats(0, 10, allow_nan=False)


@given(st.integers(1, 5000), numbers, numbers, numbers)
def test_more_evidence_never_acquits(tokens: int, difference: float, displacement: float, more: float) -> None:
    tolerance = tolerance_of("cpu", "bf16")
    if objection(tokens, difference, displacement, tolerance):
        assert objection(tokens, difference + more, displacement, tolerance)
        assert objection(tokens, difference, displacement + more, tolerance)
        assert objection(4 * tokens, difference, displacement, tolerance), "the same mean over more tokens"
    else:
        assert not objection(tokens, difference, displacement, tolerance.scaled(1 + more))


def test_nothing_computed_nothing_rejected() -> None:
    assert objection(0, 9.0, 9.0, TOLERANCES["cpu", "fp32"]) == ""
    assert tolerance_of("cuda:0", "bf16") == OTHER != tolerance_of("cpu", "bf16")


@pytest.mark.parametrize("temperature", [1.0, 0.8, 1.25])
def test_surprise_knows_the_temperature(temperature: float) -> None:
    """Draws from a softmax at T, told at T = 1: only T = 1 stays within the limit, however often one looks."""
    rng = random.Random(3)
    surprise, caught = Surprise(), False
    for _ in range(20_000):
        logits = [rng.gauss(0, 1.5) for _ in range(12)]
        total = math.log(math.fsum(map(math.exp, logits)))
        logs = [x - total for x in logits]
        (drawn,) = rng.choices(range(12), [math.exp(x / temperature) for x in logits])
        mean = math.fsum(math.exp(x) * x for x in logs)
        variance = math.fsum(math.exp(x) * x * x for x in logs) - mean**2
        surprise.add(logs[drawn] - mean, variance)
        caught = caught or bool(surprise.objection)
    assert caught == (temperature != 1.0)
    assert surprise.variance < 2 * 4000
    if temperature != 1.0:
        assert (surprise.z > 0) == (temperature < 1.0)


Act = st.one_of(
    st.tuples(st.just("pass"), st.integers(1, 16)),
    st.tuples(st.just("fail"), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 5000)),
)


@given(st.integers(0, 100), st.floats(0, 1), st.lists(Act, max_size=200))
def test_whatever_happens_the_bounds_hold(probation: int, sample: float, acts: list[tuple[str, int]]) -> None:
    standing, now = Standing(probation, sample), 0.0
    until = 0.0
    for what, count in acts:
        before = standing.suspicion
        match what:
            case "pass" if standing.state(now) != "excluded":
                standing.pass_(count, now)
                assert standing.suspicion <= before
            case "fail":
                was_out = standing.state(now) == "excluded"
                if standing.fail(now):
                    assert not was_out and standing.excluded_until is not None
                    until = standing.excluded_until
                    assert FIRST_EXCLUSION_S <= until - now <= LONGEST_EXCLUSION_S
            case "wait":
                now += count
            case _:
                pass
        assert standing.suspicion >= 0
        assert sample - 1e-9 <= standing.share(now) <= 1 + 1e-9
        assert (standing.state(now) == "excluded") == (now < until)
        if standing.state(now) == "trusted":
            assert standing.suspicion < 1 and standing.passed >= probation


def test_an_honest_worker_is_never_excluded_and_one_failure_costs_a_probation() -> None:
    """A thousand workers of 1000 groups each, one episode in a thousand falsely rejected."""
    rng = random.Random(0)
    for _ in range(200):
        standing = Standing(64, 0.1)
        for _ in range(1000):
            if rng.random() < 0.004:
                assert not standing.fail(0.0)
                assert standing.state(0.0) == "probation" or standing.suspicion < 1
            else:
                standing.pass_(4, 0.0)
        assert standing.suspicion < EXCLUDE_AT


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_a_liar_is_excluded_soon_again_and_for_longer(share: float) -> None:
    """One that lies in so many of its groups."""
    rng = random.Random(1)
    standing, now, spans, groups = Standing(64, 0.1), 0.0, [], 0
    while len(spans) < 4:
        groups += 1
        if rng.random() >= share:
            standing.pass_(4, now)
        elif standing.fail(now):
            assert standing.excluded_until is not None
            spans.append(standing.excluded_until - now)
            now = standing.excluded_until
    assert groups < 4 * 40 / share
    assert spans == [FIRST_EXCLUSION_S * 2**n for n in range(4)]


def test_a_good_hour_is_forgiven() -> None:
    standing = Standing(0, 0.1)
    for _ in range(3):
        standing.fail(0.0)
    assert standing.exclusions == 1 and standing.state(599.0) == "excluded" and standing.state(600.0) == "trusted"
    standing.pass_(1, 601.0)
    assert standing.exclusions == 1
    standing.pass_(1, 600.0 + 3600.0)
    assert standing.exclusions == 0


@given(st.floats(0, 100), st.floats(0.01, 100), st.floats(0, 0.99))
def test_the_rate_that_deters(gain: float, penalty: float, rate: float) -> None:
    expected = (1 - rate) * gain - rate * penalty
    assert (expected <= 1e-9) == (rate >= rate_that_deters(gain, penalty) - 1e-9) or math.isclose(
        expected, 0, abs_tol=1e-6
    )
