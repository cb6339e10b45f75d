"""The plan: nobody carries more than it can, everything is carried, and the time is the optimum's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.planning.dissemination import ANSWER_SHARE, HEADER_SHARE, SOURCE, HolderPlan, Plan, Receiver, carried, shares
from shoal.planning.spreading import fluid_s

rates = st.floats(1e3, 1e9)


@st.composite
def fleets(draw: st.DrawFn, least: int = 1) -> tuple[float, tuple[Receiver, ...]]:
    """A source's uplink and some receivers, of whom a few can't be connected to."""
    ups = draw(st.lists(st.one_of(st.just(0.0), rates), min_size=least, max_size=20))
    return draw(rates), tuple(Receiver(f"n{i}", up, draw(rates)) for i, up in enumerate(ups))


def best_s(num_bytes: float, source_up: float, receivers: Sequence[Receiver]) -> float:
    ups, downs = [r.up_bytes_per_s for r in receivers], [r.down_bytes_per_s for r in receivers]
    return fluid_s(num_bytes, source_up, ups, downs)


@given(fleets())
def test_the_fluid_plan_keeps_every_link_and_takes_the_optimum(fleet: tuple[float, tuple[Receiver, ...]]) -> None:
    """Each stripe goes once to its relay and N - 1 times from it; the source's own goes N times."""
    source_up, receivers = fleet
    count, optimum = len(receivers), best_s(1.0, source_up, receivers)
    parts = shares(source_up, receivers)
    own = 1.0 - sum(parts)
    assert -1e-9 <= own <= 1 + 1e-9 and all(part >= 0 for part in parts)
    slack = 1 + 1e-6
    assert sum(parts) + count * own <= source_up * optimum * slack + 1e-9
    for part, receiver in zip(parts, receivers, strict=True):
        assert part * (count - 1) <= receiver.up_bytes_per_s * optimum * slack + 1e-9
        assert receiver.down_bytes_per_s * optimum * slack >= 1.0


@given(fleets(), st.integers(0, 300))
def test_chunks_follow_the_shares(fleet: tuple[float, tuple[Receiver, ...]], num_chunks: int) -> None:
    source_up, receivers = fleet
    plan = Plan(source_up, receivers, num_chunks)
    assert len(plan.relays) == num_chunks
    counts = Counter(plan.relays)
    for number, part in enumerate(shares(source_up, plan.receivers)):
        assert abs(counts[number] - part * num_chunks) < 2 + len(receivers)
        assert part > 0 or counts[number] == 0


@given(fleets(least=2), st.integers(1, 60), st.data())
def test_all_ask_the_same_one_and_nobody_asks_itself(
    fleet: tuple[float, tuple[Receiver, ...]], num_chunks: int, data: st.DataObject
) -> None:
    source_up, receivers = fleet
    plan = Plan(source_up, receivers, num_chunks)
    shuffled = Plan(source_up, tuple(data.draw(st.permutations(receivers))), num_chunks)
    assert shuffled == plan
    gone = data.draw(st.sets(st.integers(0, len(receivers) - 1)))
    for chunk in range(num_chunks):
        asked = {r.name: plan.provider(chunk, r.name, gone) for r in plan.receivers}
        others = {provider for name, provider in asked.items() if provider != SOURCE}
        assert len(others) <= 1, "all wait for one and the same relay"
        for relay in others:
            assert relay not in gone and plan.receivers[relay].up_bytes_per_s > 0
            assert asked[plan.receivers[relay].name] == SOURCE, "and that one asks the source"
        assert plan.provider(chunk, "a late joiner", gone) in {*others, SOURCE}


def test_a_lost_relays_chunks_are_shared_by_uplink() -> None:
    receivers = tuple(Receiver(f"n{i}", up) for i, up in enumerate((100.0, 10.0, 20.0, 30.0, 40.0)))
    plan = Plan(1000.0, receivers, 20_000)
    lost = [chunk for chunk, relay in enumerate(plan.relays) if relay == 0]
    heirs = Counter(plan.provider(chunk, "x", {0}) for chunk in lost)
    for number in (1, 2, 3, 4):
        assert heirs[number] / len(lost) == pytest.approx(receivers[number].up_bytes_per_s / 100, rel=0.15)
    kept = [chunk for chunk in range(plan.num_chunks) if plan.relays[chunk] != 0]
    assert all(plan.provider(chunk, "x", {0}) == plan.provider(chunk, "x") for chunk in kept)


def test_a_known_network() -> None:
    """64 MiB to 8 nodes over 40 Mb/s: the source's own link is the bound, and all relay alike."""
    size, rate = 64 * 2**20, 40e6 / 8
    receivers = tuple(Receiver(f"n{i}", rate, rate) for i in range(8))
    assert best_s(size, rate, receivers) == pytest.approx(size / rate)
    assert shares(rate, receivers) == pytest.approx([1 / 8] * 8)
    assert Counter(Plan(rate, receivers, 512).relays) == dict.fromkeys(range(8), 64)
    assert shares(rate, receivers[:1]) == (0.0,) and shares(rate, ()) == ()


@given(fleets(least=2), st.integers(1, 300))
def test_no_relay_ends_later_than_it_must(fleet: tuple[float, tuple[Receiver, ...]], num_chunks: int) -> None:
    """By whole chunks: moving any one of them to another relay would end no sooner."""
    source_up, receivers = fleet
    plan = Plan(source_up, receivers, num_chunks)
    counts = Counter(relay for relay in plan.relays if relay != SOURCE)
    ups = {number: r.up_bytes_per_s for number, r in enumerate(plan.receivers) if r.up_bytes_per_s > 0}
    if not counts:
        return
    last = max(counts[number] / ups[number] for number in counts)
    assert all((counts[number] + 1) / up >= last * (1 - 1e-9) for number, up in ups.items())


def test_a_relay_has_time_to_pass_on_its_last_chunk() -> None:
    """With k of its n chunks given by k / n of the stream, none waits for the end."""
    receivers = tuple(Receiver(f"n{i:02}", 5.0 + i * 95.0 / 15) for i in range(16))
    plan = Plan(100.0, receivers, 512)
    assert set(range(16)) <= set(plan.relays[:40]), "all begin at once"
    for number in range(16):
        places = [place for place, relay in enumerate(plan.relays) if relay == number]
        assert places[-1] <= 512 * (1 - 1 / len(places)) + 16


@given(fleets())
def test_what_links_carry_of_the_snapshot(fleet: tuple[float, tuple[Receiver, ...]]) -> None:
    """Never more than they carry in all; and what a fast node acknowledges is nothing beside its uplink."""
    source_up, receivers = fleet
    own, left = carried(source_up, receivers)
    assert own == pytest.approx((1 - HEADER_SHARE) * source_up)
    assert [r.name for r in left] == [r.name for r in receivers]
    for before, after in zip(receivers, left, strict=True):
        assert 0 <= after.up_bytes_per_s <= (1 - HEADER_SHARE) * before.up_bytes_per_s
        assert after.down_bytes_per_s == before.down_bytes_per_s
        taken = min(source_up, before.down_bytes_per_s)
        assert after.up_bytes_per_s >= (1 - HEADER_SHARE) * before.up_bytes_per_s - ANSWER_SHARE * taken * 1.001


@given(fleets(least=0), st.integers(0, 300))
def test_holders_send_by_their_uplinks(fleet: tuple[float, tuple[Receiver, ...]], num_chunks: int) -> None:
    """All of it, to a node outside the plan, and nobody is done much later than the others."""
    source_up, receivers = fleet
    plan = HolderPlan(source_up, receivers, num_chunks)
    assert len(plan.relays) == num_chunks
    ups = {SOURCE: source_up, **{n: r.up_bytes_per_s for n, r in enumerate(plan.receivers) if r.up_bytes_per_s > 0}}
    counts = Counter(plan.relays)
    assert counts.keys() <= ups.keys()
    last = max((counts[number] / ups[number] for number in counts), default=0.0)
    assert all((counts[number] + 1) / up >= last * (1 - 1e-9) for number, up in ups.items())
    assert all(plan.provider(chunk, "late") == plan.relays[chunk] for chunk in range(num_chunks))
