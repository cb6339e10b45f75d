"""Shapers and ways in simulated time: rates hold over every interval, queues are bounded, fate is seeded."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.lab.impairment import Shaper, Way
from shoal.lab.network import Impairment

arrivals = st.lists(st.tuples(st.floats(0, 0.02), st.integers(20, 1500)), min_size=1, max_size=200)
"""Time since the packet before, and size."""

rates = st.floats(0.1, 1000)


@given(arrivals, rates, st.integers(1500, 60_000))
def test_no_interval_carries_more_than_the_rate(packets: list[tuple[float, int]], rate: float, queue: int) -> None:
    link = Shaper(rate, queue)
    now, passed = 0.0, []
    for gap, size in packets:
        now += gap
        done = link.offer(size, now)
        if done is not None:
            assert done >= now + size / (rate * 125_000) - 1e-9
            passed.append((done, size))
    for first in range(len(passed)):
        sent = 0
        for done, size in passed[first + 1 :]:
            sent += size
            assert sent <= (done - passed[first][0]) * rate * 125_000 * (1 + 1e-9) + 1e-3
    assert [done for done, _ in passed] == sorted(done for done, _ in passed)


@given(arrivals, rates, st.integers(1500, 60_000))
def test_queue_is_that_of_a_plain_simulation(packets: list[tuple[float, int]], rate: float, queue: int) -> None:
    link = Shaper(rate, queue)
    now, waiting, dropped, accepted = 0.0, 0.0, 0, 0
    for gap, size in packets:
        now += gap
        waiting = max(0.0, waiting - gap * rate * 125_000)
        if abs(waiting + size - queue) < 2:  # rounding may decide either way
            return
        room = link.has_room(size, now)
        taken = link.offer(size, now) is not None
        assert taken == room == (waiting + size < queue)
        if taken:
            waiting += size
            accepted += size
        else:
            dropped += 1
    assert link.dropped_packets == dropped and link.bytes == accepted
    assert link.packets + dropped == len(packets)
    assert link.queue_high_water_bytes <= queue


def test_a_busy_link_is_never_idle() -> None:
    link = Shaper(8.0, 10**9)  # a byte each microsecond
    assert [link.offer(1000, 0.0) for _ in range(3)] == pytest.approx([0.001, 0.002, 0.003])
    assert link.offer(1000, 0.0025) == pytest.approx(0.004)
    assert link.offer(1000, 1.0) == pytest.approx(1.001)


def test_a_link_without_rate_passes_everything_at_once() -> None:
    link = Shaper(None, 1)
    assert [link.offer(1500, 0.5) for _ in range(100)] == [0.5] * 100
    assert link.packets == 100 and link.dropped_packets == 0


impairments = st.builds(
    Impairment,
    delay_s=st.floats(0.05, 1),
    jitter_s=st.floats(0, 0.05),
    loss=st.floats(0, 1),
    duplicate=st.floats(0, 1),
    reorder=st.floats(0, 1),
)
times = st.lists(st.floats(0, 0.1), min_size=1, max_size=100)


def fates(impairment: Impairment, seed: int, gaps: list[float], name: str = "a>b") -> list[tuple[float, ...]]:
    way = Way(impairment, 0.005, seed, name)
    now, out = 0.0, []
    for gap in gaps:
        now += gap
        out.append(way.send(now))
    assert way.packets == len(gaps) == way.lost_packets + sum(bool(fate) for fate in out)
    assert way.duplicated_packets == sum(len(fate) == 2 for fate in out)
    return out


@given(impairments, st.integers(0, 9), times, times)
def test_the_same_seed_does_the_same_to_the_nth_packet(
    impairment: Impairment, seed: int, gaps: list[float], others: list[float]
) -> None:
    one, again = fates(impairment, seed, gaps), fates(impairment, seed, gaps)
    assert one == again
    # Which are lost and doubled does not depend on when they come.
    shifted = fates(impairment, seed, others)
    assert [len(fate) for fate in one[: len(others)]] == [len(fate) for fate in shifted[: len(gaps)]]


def test_seeds_and_directions_differ() -> None:
    half = Impairment(loss=0.5)
    gaps = [0.01] * 200
    kept = [[bool(f) for f in fates(half, seed, gaps, name)] for seed, name in ((1, "a>b"), (2, "a>b"), (1, "b>a"))]
    assert kept[0] != kept[1] and kept[0] != kept[2] and kept[1] != kept[2]


@given(impairments, times)
def test_delay_lies_within_its_jitter_and_order_is_kept(impairment: Impairment, gaps: list[float]) -> None:
    calm = Impairment(delay_s=impairment.delay_s, jitter_s=impairment.jitter_s, loss=impairment.loss)
    now, latest = 0.0, 0.0
    for gap, fate in zip(gaps, fates(calm, 3, gaps), strict=True):
        now += gap
        for arrival in fate:
            assert arrival >= max(now + calm.delay_s - calm.jitter_s - 1e-9, latest)
            assert arrival <= max(now + calm.delay_s + calm.jitter_s + 1e-9, latest)
            latest = arrival


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_shares_are_those_asked_for(share: float) -> None:
    num = 40_000
    way = Way(Impairment(delay_s=0.01, loss=share, duplicate=share, reorder=share), 0.005, 11, "a>b")
    for serial in range(num):
        way.send(serial * 1e-3)
    margin = 5 * (share * (1 - share) / num) ** 0.5
    assert way.lost_packets / num == pytest.approx(share, abs=margin)
    assert way.duplicated_packets / num == pytest.approx(share * (1 - share), abs=margin)
    assert way.reordered_packets / num == pytest.approx(share * (1 - share), abs=margin)


def test_a_held_back_packet_is_overtaken() -> None:
    way = Way(Impairment(delay_s=0.01, reorder=0.2), 0.005, 5, "a>b")
    order = [arrival for serial in range(100) for arrival in way.send(serial * 0.001)]
    overtaken = sum(later < earlier for earlier, later in itertools.pairwise(order))
    assert 0 < overtaken <= way.reordered_packets
