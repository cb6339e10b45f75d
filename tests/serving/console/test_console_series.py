"""Curves of bounded size lose no value from their mean and range."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serving.console.series import MAX_POINTS, Series


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(1, 40))
def test_mean_and_range_of_all_values_stay(values: list[float], repeats: int) -> None:
    series = Series()
    given_ = [value for _ in range(repeats) for value in values]
    for x, value in enumerate(given_):
        series.add(x, value)
    assert len(series.points) <= MAX_POINTS
    assert len(series) == len(given_)
    mean = sum(point.mean * point.count for point in series.points) / len(given_)
    assert mean == pytest.approx(sum(given_) / len(given_), abs=1e-6 * (1 + max(map(abs, given_))))
    assert min(point.low for point in series.points) == min(given_)
    assert max(point.high for point in series.points) == max(given_)
    xs = [point.x for point in series.points]
    assert xs == sorted(set(xs))
    assert all(point.count == series.points[0].count for point in series.points[:-1])
    assert series.points[-1].count <= series.points[0].count


def test_a_long_run_stays_small() -> None:
    series = Series()
    for x in range(100_000):
        series.add(x, math.sin(x / 1000))
    assert MAX_POINTS / 2 <= len(series.points) <= MAX_POINTS
    assert series.points[0].x == 0
    assert series.points[-1].x <= 99_999


def test_what_comes_again_replaces_what_was() -> None:
    series = Series()
    for x, y in [(1, 1.0), (2, 2.0), (3, 3.0), (2, 5.0), (math.nan, 1.0), (4, math.inf), (5, 6.0)]:
        series.add(x, y)
    assert [(point.x, point.mean) for point in series.points] == [(1, 1.0), (2, 5.0), (5, 6.0)]
    assert series.last == 6.0
    assert math.isnan(Series().last)
