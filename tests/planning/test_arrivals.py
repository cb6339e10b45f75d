"""T_bcast and f: who is gone is not waited for, and what stands still is told from what goes on."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.planning.arrivals import KEPT, MAX_SPREADING, Arrivals

NODES = ("a", "b", "c")


def test_a_broadcast_lasts_until_the_last_worker_has_it() -> None:
    arrivals = Arrivals()
    assert arrivals.bcast_s is None
    arrivals.published(1, NODES, 10.0)
    arrivals.holds("a", 1, 11.0)
    arrivals.holds("b", 1, 14.0)
    assert arrivals.bcast_s is None
    arrivals.holds("c", 2, 13.5)
    assert arrivals.bcast_s == pytest.approx(3.5)
    assert (arrivals.held_by("c"), arrivals.held_by("nobody")) == (2, -1)


def test_a_newer_version_counts_for_older_ones_and_who_left_is_not_waited_for() -> None:
    arrivals = Arrivals()
    arrivals.published(1, NODES, 0.0)
    arrivals.published(2, NODES, 1.0)
    arrivals.left("c")
    arrivals.holds("a", 2, 3.0)
    arrivals.holds("b", 2, 5.0)
    assert arrivals.bcast_s == pytest.approx((5.0 + 4.0) / 2)


@pytest.mark.parametrize(("stalls", "expected"), [(True, 1.0), (False, 0.0)])
def test_the_stall_fraction_of_workers_that_pause_and_of_those_that_do_not(stalls: bool, expected: float) -> None:
    """Rollouts of one second; a version every 10 s, there after 4 s."""
    arrivals, version, working_s = Arrivals(), 0, 0.0
    for tick in range(1, 2000):
        now = tick / 10
        if tick % 100 == 0:
            version += 1
            arrivals.published(version, ["a"], now)
        if tick % 100 == 40:
            arrivals.holds("a", version, now)
        reached = arrivals.held_by("a") >= version
        if tick == 1:
            arrivals.started("a", now)
        working_s += 0.1 if reached or not stalls else 0.0
        if working_s >= 1.0:
            working_s = 0.0
            arrivals.ended("a", 1, now)
            arrivals.started("a", now)
    assert arrivals.stall == pytest.approx(expected, abs=0.15)
    assert arrivals.bcast_s == pytest.approx(4.0, abs=0.2)


events = st.lists(
    st.tuples(
        st.sampled_from(["publish", "hold", "start", "end", "leave"]), st.sampled_from(NODES), st.floats(0.0, 5.0)
    ),
    max_size=200,
)


@given(events)
def test_whatever_happens_both_numbers_stay_in_their_bounds(history: list[tuple[str, str, float]]) -> None:
    arrivals, now, version = Arrivals(), 0.0, 0
    for what, node, elapsed_s in history:
        now += elapsed_s
        match what:
            case "publish":
                version += 1
                arrivals.published(version, NODES, now)
            case "hold":
                arrivals.holds(node, version, now)
            case "start":
                arrivals.started(node, now)
            case "end":
                arrivals.ended(node, 1, now)
            case "leave":
                arrivals.left(node)
        assert 0 <= arrivals.stall <= 1
        took = arrivals.bcast_s
        assert took is None or (math.isfinite(took) and 0 <= took <= now)
        assert len(arrivals._spreading) <= MAX_SPREADING and len(arrivals._took) <= KEPT
