"""Weights follow use; pruning keeps the budget and its own cap; merging is careful."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_makers import make_entry

from shoal.errors import ConfigError
from shoal.memory.controller import (
    FADE_USES,
    MAX_PRUNE_SHARE,
    Budget,
    conflict,
    fade,
    make_room,
    may_merge,
    merge,
    prune,
    text_bytes,
)
from shoal.memory.evolution import ALPHA, BETA, HALF_LIFE_S, Standing, aged, evolve
from shoal.memory.state import Memory

NOW_US = 10**15


def make_memory(
    number: int, weight: float, *, uses: int = 0, utility: float = 0.0, ttl_s: float = 0.0, created_us: int = NOW_US
) -> Memory:
    entry = make_entry(f"memory number {number:04}", ttl_s=ttl_s)
    return Memory(
        entry=entry,
        members=(entry.id,),
        status="active",
        weight=weight,
        uses=uses,
        utility=utility,
        created_us=created_us,
        last=(created_us, "n", ""),
    )


def test_the_weight_moves_as_the_formula_says() -> None:
    after, fate = evolve(Standing(0.5), 0.4, 0.2)
    assert after.weight == pytest.approx(0.5 + ALPHA * 0.4 - BETA * 0.2) and fate == "stays"
    assert aged(0.8, HALF_LIFE_S) == pytest.approx(0.4) and aged(0.8, -5) == 0.8


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), max_size=80), st.floats(0, 1))
def test_standing_stays_in_bounds(uses: list[tuple[float, float]], weight: float) -> None:
    standing = Standing(weight)
    for utility, share in uses:
        standing, _ = evolve(standing, utility, share)
        assert 0 <= standing.weight <= 1 and -1 <= standing.utility <= 1
        assert math.isfinite(standing.loss) and math.isfinite(standing.gain)
    assert standing.uses == len(uses)


@pytest.mark.parametrize(("utility", "demoted_by", "removed_by"), [(-1.0, 11, 35), (-0.5, 16, 62)])
def test_what_always_loses_is_demoted_and_removed_in_time(utility: float, demoted_by: int, removed_by: int) -> None:
    standing, fates = Standing(1.0), []
    for _ in range(removed_by):
        standing, fate = evolve(standing, utility, 0.0)
        fates.append(fate)
    assert fates[demoted_by - 1] != "stays" and fates[-1] == "removed"


def test_what_helps_in_the_mean_is_not_demoted_by_bad_luck() -> None:
    draw = random.Random(0)
    demoted = 0
    for _ in range(40):
        standing, fates = Standing(0.3), set()
        for _ in range(500):
            standing, fate = evolve(standing, 0.5 if draw.random() < 0.7 else -0.5, 0.1)
            fates.add(fate)
        demoted += fates != {"stays"}
    assert demoted <= 2


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 20), st.floats(-1, 1), st.booleans()), max_size=40),
    st.integers(1, 30),
    st.integers(20, 1000),
    st.randoms(),
)
def test_passes_of_pruning_end_within_the_budget_and_never_take_much(
    drawn: list[tuple[float, int, float, bool]], entries: int, size: int, draw: random.Random
) -> None:
    memories = [
        make_memory(n, w, uses=uses, utility=u, ttl_s=1.0 if old else 0.0, created_us=NOW_US - 10**7)
        for n, (w, uses, u, old) in enumerate(drawn)
    ]
    budget = Budget(entries, size)
    assert prune(draw.sample(memories, len(memories)), budget, NOW_US) == prune(memories, budget, NOW_US)
    while chosen := prune(memories, budget, NOW_US):
        assert len(chosen) <= max(1, MAX_PRUNE_SHARE * len(memories))
        gone = {removed.entry for removed in chosen}
        memories = [memory for memory in memories if memory.id not in gone]
    assert len(memories) <= entries and sum(map(text_bytes, memories)) <= size
    assert not any(memory.expired(NOW_US) for memory in memories)


def test_only_what_use_has_not_confirmed_fades_when_passed_over() -> None:
    shown, unseen, proven = make_memory(1, 0.9), make_memory(2, 0.4), make_memory(3, 0.4, uses=9, utility=0.2)
    memories = [shown, unseen, proven]
    assert fade(memories, {shown.id: FADE_USES - 1}) == []
    (faded,) = fade(memories, {shown.id: FADE_USES})
    assert faded.entry == unseen.id
    assert fade(memories, {shown.id: FADE_USES, unseen.id: 1}) == []


def test_room_is_made_only_at_the_cost_of_worse_ones() -> None:
    memories = [make_memory(n, 0.1 * (n + 1)) for n in range(5)]
    newcomer = make_memory(9, 0.0)
    chosen = make_room(memories, newcomer, 0.35, Budget(entries=5), NOW_US)
    assert chosen is not None and [r.entry for r in chosen] == [memories[0].id]
    assert make_room(memories, newcomer, 0.05, Budget(entries=5), NOW_US) is None
    assert make_room(memories, newcomer, 0.05, Budget(entries=6), NOW_US) == []
    with pytest.raises(ConfigError):
        Budget(entries=0)


def test_only_like_memories_that_do_not_conflict_are_merged() -> None:
    first, second = make_memory(1, 0.5), make_memory(1, 0.5)
    assert not may_merge(first, second, 1.0), "one and the same"
    other = Memory(
        entry=make_entry("memory number 0001 again"), members=("x",), status="active", created_us=1, last=(1, "n", "")
    )
    assert may_merge(first, other, 0.95) and not may_merge(first, other, 0.8)
    assert merge(first, other) == merge(other, first)
    assert conflict("add the tens first", "do not add the tens first")
    assert conflict("use 3 digits", "use 4 digits") and not conflict("use 3 digits", "then use 3 digits")
