"""The two inequalities of the staleness bound, and that they agree with each other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.planning.staleness import is_fresh, may_start

SMALL = st.integers(0, 40)


@given(version=SMALL, step=SMALL, bound=SMALL)
def test_fresh_is_at_most_the_bound(version: int, step: int, bound: int) -> None:
    assert is_fresh(version, step, bound) == (step - version <= bound)


@given(ahead=st.integers(0, 400), version=SMALL, bound=SMALL, groups=st.integers(1, 9))
def test_what_may_start_is_consumed_in_time(ahead: int, version: int, bound: int, groups: int) -> None:
    """In order, R a step: the group with `ahead` before it is consumed at step ahead // R."""
    assert may_start(ahead, version, bound, groups) == is_fresh(version, ahead // groups, bound)


@given(version=SMALL, groups=st.integers(1, 9))
def test_zero_staleness_is_the_pull_loop(version: int, groups: int) -> None:
    """Version x's R groups may start after x · R others, and not one more until version x + 1."""
    started = [ahead for ahead in range((version + 3) * groups) if may_start(ahead, version, 0, groups)]
    assert started == list(range((version + 1) * groups))
    assert may_start(len(started), version + 1, 0, groups)
