"""Rates: only time under a lease counts, failures cost time, and planning does not trust a lucky first measurement."""

from __future__ import annotations

import pytest

from shoal.planning.rates import RateMeter


def test_idle_time_does_not_count() -> None:
    meter = RateMeter()
    now = 0.0
    for _ in range(20):
        meter.started("a", now)
        meter.ended("a", 8, now + 4.0)
        now += 100.0
    assert meter.rate("a") == pytest.approx(2.0, rel=0.05)
    assert meter.rate("b") is None and meter.total == meter.rate("a")


def test_overlapping_leases_share_their_time_and_failures_cost_it() -> None:
    meter = RateMeter()
    meter.started("a", 0.0)
    meter.started("a", 0.0)
    meter.ended("a", 8, 8.0)
    assert meter.rate("a") == pytest.approx(1.0, rel=0.02)
    meter.started("a", 8.0)
    meter.ended("a", 0, 16.0)
    meter.ended("a", 0, 16.0)
    assert meter.rate("a") == pytest.approx(0.5, rel=0.02)
    meter.left("a")
    meter.ended("a", 8, 17.0)
    assert meter.rate("a") is None and meter.total == 0.0


def test_who_is_given_less_does_not_seem_slower() -> None:
    meter = RateMeter()
    for _ in range(4):
        meter.started("a", 0.0)
    for _ in range(4):
        meter.ended("a", 8, 4.0)
    assert meter.rate("a") == pytest.approx(8.0, rel=0.02)
    for i in range(100):
        meter.started("a", 4.0 + 4 * i)
        meter.ended("a", 8, 8.0 + 4 * i)
    assert meter.rate("a") == pytest.approx(8.0, rel=0.02)


def test_old_work_is_forgotten() -> None:
    meter = RateMeter()
    now = 0.0
    for rate, until in ((1.0, 3000.0), (3.0, 6000.0)):
        while now < until:
            meter.started("a", now)
            now += 10.0
            meter.ended("a", int(10 * rate), now)
    assert meter.rate("a") == pytest.approx(3.0, rel=0.02)


def test_one_lucky_rollout_moves_the_expectation_little() -> None:
    meter = RateMeter()
    assert meter.expected("a", 0.5) == 0.5
    meter.started("a", 0.0)
    meter.ended("a", 1, 0.5)
    assert meter.rate("a") == pytest.approx(2.0, rel=0.01)
    assert 0.5 < meter.expected("a", 0.5) < 0.6
    for i in range(1000):
        meter.started("a", 1.0 + i)
        meter.ended("a", 2, 2.0 + i)
    assert meter.expected("a", 0.5) == pytest.approx(2.0, rel=0.1)
