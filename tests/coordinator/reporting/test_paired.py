"""The confidence interval of a gain: published values, bounds, and how often it holds."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.coordinator.reporting.paired import paired_interval


@pytest.mark.parametrize(
    ("both", "only_first", "only_second", "neither", "low", "high"),
    [(36, 12, 2, 0, 0.0569, 0.3404), (20, 12, 2, 16, 0.0562, 0.3292)],
)
def test_published_values(both: int, only_first: int, only_second: int, neither: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998) 2635, method 10, on two of its example tables."""
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    assert paired_interval(second, first) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("p_before", "p_kept", "p_won"), [(0.3, 0.95, 0.6), (0.05, 0.5, 0.02), (0.5, 0.5, 0.5)])
def test_it_holds_the_true_gain_about_as_often_as_it_says(p_before: float, p_kept: float, p_won: float) -> None:
    """600 seeded experiments of 80 questions; the interval is known to be a little wide, never much too narrow."""
    rng = Random(7)
    truth = p_before * p_kept + (1 - p_before) * p_won - p_before
    held = 0
    for _ in range(600):
        before = [rng.random() < p_before for _ in range(80)]
        after = [rng.random() < (p_kept if was_right else p_won) for was_right in before]
        low, high = paired_interval(before, after)
        held += low <= truth <= high
    assert 0.92 <= held / 600 <= 0.995


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_paired_interval_is_ordered_bounded_and_symmetric(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    low, high = paired_interval(before, after)
    gain = (sum(after) - sum(before)) / len(pairs)
    assert -1 <= low <= gain + 1e-12
    assert gain - 1e-12 <= high <= 1
    assert low < high
    back = paired_interval(after, before)
    assert back == pytest.approx((-high, -low))
    with pytest.raises(ValueError, match="paired lists"):
        paired_interval(before, after[1:])
