"""Rates: never more than the bucket holds, and back to full after a pause."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.swarm.rate import RateLimiter


@given(st.lists(st.floats(0.0, 2.0), max_size=100), st.floats(0.5, 5.0), st.integers(1, 5))
def test_bound_over_every_span(pauses: list[float], rate_per_s: float, burst: int) -> None:
    limiter = RateLimiter(rate_per_s, burst)
    now, passed = 0.0, []
    for pause in pauses:
        now += pause
        if limiter.take(b"key", now):
            passed.append(now)
    for i, start in enumerate(passed):
        for j in range(i, len(passed)):
            assert j - i + 1 <= burst + (passed[j] - start) * rate_per_s + 1e-6


@given(st.integers(1, 20))
def test_full_after_a_pause(burst: int) -> None:
    limiter = RateLimiter(1.0, burst)
    assert [limiter.take(b"key", 0.0) for _ in range(burst + 1)] == [True] * burst + [False]
    assert all(limiter.take(b"key", float(burst)) for _ in range(burst))


def test_keys_are_apart_and_bounded() -> None:
    limiter = RateLimiter(1.0, 1, capacity=3)
    assert all(limiter.take(bytes([n]), 0.0) for n in range(10))
    assert len(limiter) == 3
    assert not limiter.take(bytes([9]), 0.0)


def test_clock_set_back() -> None:
    limiter = RateLimiter(1.0, 1)
    assert limiter.take(b"key", 1000.0)
    assert not limiter.take(b"key", 0.0)
    assert limiter.take(b"key", 1.0)
