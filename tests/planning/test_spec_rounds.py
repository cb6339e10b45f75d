"""Round times, draft lengths and frames in flight: bounds, monotony, and the same answers as trying everything."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.planning.rounds import Curve, Ring, Site, paper_plain_s, paper_round_s, paper_saving_s, place
from shoal.planning.speculation import (
    Estimate,
    Pacer,
    Settings,
    best_gamma,
    expected_tokens,
    frames_in_flight,
    rate,
)

seconds = st.floats(1e-4, 2.0)
accepts = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@st.composite
def rings(draw: st.DrawFn) -> Ring:
    points = draw(st.dictionaries(st.integers(1, 20), seconds, min_size=1, max_size=5))
    draft = Curve.linear(draw(st.floats(0, 0.1)), draw(st.floats(0, 0.1)))
    return Ring(Curve.measured(points), draft, draw(st.integers(0, 8)), draw(st.floats(0, 0.2)))


@given(accepts, rings(), st.integers(0, 12), st.floats(1, 1.5))
def test_the_best_gamma_is_the_best_of_all(accept: list[float], ring: Ring, most: int, min_gain: float) -> None:
    rates = [expected_tokens(accept, g) / ring.round_s(g) for g in range(most + 1)]
    chosen = best_gamma(accept, ring, most, min_gain)
    first = rates.index(max(rates))
    assert chosen == (first if rates[first] >= min_gain * rates[0] else 0)


@given(accepts, st.integers(0, 16))
def test_expected_tokens(accept: list[float], gamma: int) -> None:
    by_outcome = 0.0  # the mean of accepted drafts, outcome by outcome
    reached = 1.0
    for depth in range(gamma):
        alpha = accept[min(depth, len(accept) - 1)]
        by_outcome += depth * reached * (1 - alpha)
        reached *= alpha
    by_outcome += gamma * reached
    found = expected_tokens(accept, gamma)
    assert found == pytest.approx(by_outcome + 1)
    assert 1 <= found <= gamma + 1
    assert expected_tokens(accept, gamma + 1) >= found
    better = [min(1.0, a + 0.1) for a in accept]
    assert expected_tokens(better, gamma) >= found - 1e-12


@given(st.floats(0.01, 0.99), st.integers(1, 16))
def test_expected_tokens_of_one_accept_rate_have_the_paper_s_form(alpha: float, gamma: int) -> None:
    assert expected_tokens([alpha], gamma) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))


@given(accepts, rings(), st.floats(0, 0.2))
def test_longer_links_never_shorten_what_is_drafted(accept: list[float], ring: Ring, more_s: float) -> None:
    # A delay is paid once a round: the longer it is, the more a round should carry.
    longer = Ring(ring.verify, ring.draft, max(1, ring.num_links), ring.link_s + more_s)
    same = Ring(ring.verify, ring.draft, max(1, ring.num_links), ring.link_s)
    short, long = best_gamma(accept, same), best_gamma(accept, longer)
    assert long >= short or rate(accept, longer, short) == pytest.approx(rate(accept, longer, long))


@given(rings(), st.integers(0, 16))
def test_rounds_take_longer_with_more_drafts(ring: Ring, gamma: int) -> None:
    assert ring.round_s(gamma + 1) >= ring.round_s(gamma) - 1e-12
    assert ring.round_s(gamma) >= ring.delay_s


@given(st.dictionaries(st.integers(0, 30), seconds, min_size=1, max_size=6), st.integers(0, 40), st.integers(0, 40))
def test_a_measured_curve_rises_and_keeps_what_was_measured_rising(points: dict[int, float], a: int, b: int) -> None:
    curve = Curve.measured(points)
    assert curve.at(min(a, b)) <= curve.at(max(a, b)) + 1e-12
    ordered = [points[tokens] for tokens in sorted(points)]
    if ordered == sorted(ordered):
        for tokens, value in points.items():
            assert curve.at(tokens) == pytest.approx(value)


@given(st.floats(1, 10), seconds, st.integers(1, 16), st.floats(0, 0.5))
def test_the_paper_s_formulas_agree_with_each_other(k: float, t0: float, stages: int, t1: float) -> None:
    saved = (paper_plain_s(k, t0, stages, t1) - paper_round_s(k, t0, stages, t1)) / k
    assert saved == pytest.approx(paper_saving_s(k, stages, t1), abs=1e-9)


@given(accepts, rings(), st.integers(1, 8), seconds)
def test_frames_in_flight_are_the_best_of_all(accept: list[float], ring: Ring, gamma: int, bottleneck: float) -> None:
    survives = math.prod(accept[min(d, len(accept) - 1)] for d in range(gamma + 1))

    def tokens_per_s(frames: int) -> float:
        return sum(survives**f for f in range(frames)) / max(ring.round_s(gamma), frames * bottleneck)

    found = frames_in_flight(accept, ring, gamma, bottleneck, 20)
    worth = [frames for frames in range(1, 21) if frames == 1 or survives ** (frames - 1) >= 0.1 * (1 - 1e-9)]
    assert found in worth
    assert tokens_per_s(found) == pytest.approx(max(map(tokens_per_s, worth)), rel=1e-6)
    if survives == 0:
        assert found == 1, "a frame that surely falls is never sent"


def test_frames_follow_the_accept_rate_not_the_room_in_the_pipe() -> None:
    ring = Ring(Curve.linear(0.04, 0.0), Curve.linear(0, 0.001), 3, 0.05)
    room = [frames_in_flight([a], ring, 4, 0.02) for a in (0.3, 0.8, 0.95, 1.0)]
    assert room == sorted(room) and room[:2] == [1, 3] and room[1] < room[2] <= room[3]
    assert room[3] == math.ceil(ring.round_s(4) / 0.02), "what is never wrong fills the pipe, and no more"


def test_a_drafter_is_placed_where_its_round_is_shortest() -> None:
    ring = Ring(Curve.linear(0.1, 0), Curve.linear(0, 0), 3, 0.05)
    near = Site("last", Curve.linear(0, 0.01), Curve.linear(0, 4))
    fast = Site("first", Curve.linear(0, 0.001), Curve.linear(0, 3456))
    assert place((near, fast), ring, 4, 25e6)[0] is fast
    site, seen = place((near, fast), ring, 4, 25e4)
    assert site is near, "the features take longer than the slower drafter"
    assert seen.round_s(4) == pytest.approx(0.04 + 0.1 + 0.15 + 16 / 25e4)
    assert place((near, near), ring, 4, 25e6)[0] is near


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_an_estimate_comes_near_what_happens(alpha: float) -> None:
    estimate, generator = Estimate(Settings()), random.Random(1)
    for _ in range(400):
        accepted = 0
        while accepted < 4 and generator.random() < alpha:
            accepted += 1
        estimate.took(4, accepted)
    assert all(0 <= a <= 1 for a in estimate.accept)
    assert estimate.accept[0] == pytest.approx(alpha, abs=0.2)


def run_batch(
    alphas: list[float], verify: Curve, draft: Curve, rounds: int, others: int = 0, delay_s: float = 0.0
) -> tuple[float, float, list[list[int]]]:
    """Tokens and seconds of a batch that a pacer paces, and its depths; drafts are right by fixed patterns."""
    pacer = Pacer()
    owed = [0.0] * len(alphas)
    tokens = seconds_ = 0.0
    chosen: list[list[int]] = []
    rows = list(range(len(alphas)))
    for _ in range(rounds):
        gammas = pacer.gammas(rows, others)
        accepted = [0] * len(alphas)
        for row, (alpha, gamma) in enumerate(zip(alphas, gammas, strict=True)):
            while accepted[row] < gamma:
                owed[row] += alpha
                if owed[row] < 1:
                    break
                owed[row] -= 1
                accepted[row] += 1
        widest = max(gammas)
        draft_s, verify_s = draft.at(widest) if widest else 0.0, verify.at(widest + 1)
        pacer.took(rows, gammas, accepted, draft_s, verify_s, delay_s, verify_s / 3, others)
        tokens += sum(accepted) + len(alphas) + others
        seconds_ += draft_s + verify_s + delay_s
        chosen.append(gammas)
    return tokens, seconds_, chosen


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("draft_s", [0.001, 0.3])
def test_a_batch_is_never_slower_than_plain_by_more_than_three_percent(
    alpha: float, slope: float, draft_s: float
) -> None:
    verify = Curve.linear(1.0, slope)
    tokens, seconds_, _ = run_batch([alpha] * 32, verify, Curve.linear(0, draft_s), 400)
    assert tokens / seconds_ >= 0.97 * 32 / verify.at(1)


def test_a_batch_drafts_for_all_its_rows_together() -> None:
    """One row's drafts slow down all rows: they are worth it for eight, not for one among many that never draft."""
    verify, draft = Curve.linear(1.0, 0.5), Curve.linear(0, 0.01)
    assert max(map(max, run_batch([0.95] * 8, verify, draft, 60)[2][-20:])) > 3
    assert max(map(max, run_batch([0.95], verify, draft, 60, others=15)[2][-20:])) == 0
    mixed = run_batch([0.95] * 8 + [0.02], verify, draft, 200)[2][-30:]
    assert all(gammas[0] > 3 and gammas[8] <= 1 for gammas in mixed if gammas[0])


def test_frames_fly_only_where_links_delay_answers() -> None:
    for delay_s, more in ((0.0, False), (0.2, True)):
        pacer = Pacer()
        for gamma in (0, 0, 1, 1, *[4] * 20):
            pacer.took([0], [gamma], [gamma], 0.001, 0.03, delay_s, 0.01)
        assert (pacer.frames(1, 4) > 1) == more
        assert pacer.frames(1, 0) == 1


def run_pacer(alpha: float, verify: Curve, draft: Curve, rounds: int = 300, **settings: int) -> list[int]:
    """The depths that a pacer chooses for one row, whose drafts are right with chance α."""
    pacer = Pacer(Settings(**settings))
    chosen = []
    generator = random.Random(7)
    for _ in range(rounds):
        gamma = pacer.gammas([0])[0]
        accepted = 0
        while accepted < gamma and generator.random() < alpha:
            accepted += 1
        pacer.took([0], [gamma], [accepted], draft.at(gamma) if gamma else 0.0, verify.at(gamma + 1))
        chosen.append(gamma)
    return chosen


def test_a_pacer_goes_off_where_nothing_is_accepted_and_tries_again_at_times() -> None:
    flat, cheap = Curve.linear(1.0, 0.02), Curve.linear(0, 0.02)
    on = run_pacer(1.0, flat, cheap)[-50:]
    assert on.count(8) >= 49 and on.count(8) + on.count(0) == 50, "a plain step at times, to compare with"
    off = run_pacer(0.0, flat, cheap, probe_every=40)
    assert sum(off[-82:]) <= 3 and any(off[-82:])
    assert set(run_pacer(1.0, flat, Curve.linear(0, 1.2), probe_every=1000)[-50:]) == {0}, "a slow drafter never pays"


@pytest.mark.parametrize("alpha", [0.2, 0.6, 0.95])
@pytest.mark.parametrize(("slope", "draft_s"), [(0.0, 0.001), (0.05, 0.05), (0.3, 0.2)])
def test_a_pacer_comes_near_the_best_fixed_depth(alpha: float, slope: float, draft_s: float) -> None:
    verify, draft = Curve.linear(1.0, slope), Curve.linear(0, draft_s)
    ring = Ring(verify, draft)
    chosen = run_pacer(alpha, verify, draft)[100:]
    seconds_ = sum(ring.round_s(g) for g in chosen)
    tokens = sum(expected_tokens([alpha], g) for g in chosen)
    best = max(rate([alpha], ring, g) for g in range(9))
    assert tokens / seconds_ >= 0.95 * best


def test_a_pacer_forgets_rows_that_ended() -> None:
    pacer = Pacer()
    pacer.took([1, 2], [0, 0], [0, 0], 0.0, 1.0)
    pacer.took([1, 2], [4, 4], [0, 4], 0.1, 1.1)
    first, second = pacer.gammas([1, 2])
    assert first <= second
    pacer.ended(1)
    assert pacer.gammas([1, 2])[0] == pacer.gammas([3, 2])[0], "a new row begins with what all have shown"
