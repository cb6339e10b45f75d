"""Growth that a soak tells: a leak of any size shows, spikes and steps that are taken back do not."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from _soak_growth import MAX_SAMPLES, growth, sample, slope


def series(count: int, value: float, per_second: float = 0.0) -> list[tuple[float, float]]:
    return [(2.0 * n, value + per_second * 2.0 * n) for n in range(count)]


@settings(max_examples=30)
@given(
    count=st.integers(100, 150),
    value=st.floats(1.0, 1e4),
    share=st.floats(0.0, 0.5),
    noise=st.floats(0.0, 0.005),
    seed=st.integers(0, 1000),
)
def test_a_leak_shows_as_large_as_it_is(count: int, value: float, share: float, noise: float, seed: int) -> None:
    """`share`: of the value at the end of the first half, which leaks away during the second."""
    rng = random.Random(seed)
    half_s = count - 1.0
    points = [(2.0 * n, value * (1 + share * max(0.0, 2.0 * n - half_s) / half_s)) for n in range(count)]
    points = [(at_s, y * (1 + rng.uniform(-noise, noise))) for at_s, y in points]
    assert growth(points) == pytest.approx(share / (1 + share / 2), abs=0.03 + 2 * noise)


@given(st.integers(40, 100), st.data())
def test_spikes_are_no_growth(count: int, data: st.DataObject) -> None:
    points = series(count, 100.0)
    late = range(count // 2, count)
    for at in data.draw(st.sets(st.sampled_from(late), max_size=len(late) // 10)):
        points[at] = (points[at][0], 1000.0)
    assert growth(points) == 0.0


def test_what_was_reached_before_the_second_half_is_no_growth() -> None:
    points = [*series(50, 10.0), *[(100.0 + at_s, 500.0) for at_s, _ in series(50, 0.0)]]
    assert growth(points) == 0.0


def test_a_count_that_rises_from_nothing_is_growth() -> None:
    points = series(100, 0.0)
    assert growth(points) == 0.0
    assert growth([*points[:99], (198.0, 1.0)]) == 1.0


def test_many_samples_are_thinned() -> None:
    points = series(10 * MAX_SAMPLES, 5.0, per_second=0.25)
    assert slope(points) == pytest.approx(0.25)
    assert slope(points[:1]) == 0.0 and growth(points[:3]) == 0.0


def test_a_process_is_sampled_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    before = sample(os.getpid(), 1.0, [tmp_path])
    with (tmp_path / "another").open("w"):
        after = sample(os.getpid(), 2.0, [tmp_path])
    assert before.files == 1 and after.files == 2
    assert after.descriptors == before.descriptors + 1
    assert before.memory_mb > 1 and before.threads >= 1
