"""Beginnings are found, kept within memory, and change nothing but the work."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import Caller, alone, assert_same_draws, make_batcher, make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from shoal.engine.batching import Batcher
from shoal.engine.prefix import GRAIN, PrefixStore, shared

TOKENS = st.lists(st.integers(0, 1), max_size=5 * GRAIN).map(tuple)
SPACES = st.sampled_from(["", "adapter"])


def with_prefixes(directory: Path, *, tokens: int = 2000, budget: int | None = None) -> Batcher:
    batcher = make_batcher(directory, endless=True)
    batcher.prefixes = PrefixStore(tokens * batcher.cache.token_bytes)
    batcher.prefill_tokens = budget or batcher.prefill_tokens
    return batcher


def prompt_of(length: int, seed: int) -> list[int]:
    stream = random.Random(seed)
    return [stream.randrange(3, 200) for _ in range(length)]


@given(TOKENS, TOKENS)
def test_the_shared_beginning(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    assert shared(one, other) == length // GRAIN * GRAIN


@given(st.lists(st.tuples(SPACES, TOKENS), max_size=30), SPACES, TOKENS, st.integers(0, 200))
def test_a_store_keeps_to_its_budget_and_finds_the_longest(
    added: list[tuple[str, tuple[int, ...]]], space: str, asked: tuple[int, ...], budget: int
) -> None:
    store = PrefixStore(budget * 4)
    for own, ids in added:
        if store.wants(ids, 4, own):
            store.add(ids, torch.zeros(1, 1, 1, len(ids), 1), own)
            found = store.find(ids, own)
            assert found is not None and (found[0].space, found[0].ids) == (own, ids)
        assert store.bytes <= store.budget_bytes
    assert store.bytes == 4 * sum(len(ids) for _, ids in store._entries)
    best = max((shared(ids, asked) for own, ids in store._entries if own == space), default=0)
    found = store.find(asked, space)
    assert (found[1] if found else 0) == best
    assert found is None or found[0].space == space
    store.clear()
    assert store.bytes == 0 and store.find(asked, space) is None


def test_a_conversations_next_turn_computes_only_what_is_new(plain: Path, plain_reference: Any) -> None:
    batcher = with_prefixes(plain)
    caller = Caller(batcher)
    first = caller.ask(prompt_of(40, 1), max_tokens=30, seed=1)
    caller.run()
    turn = [*prompt_of(40, 1), *caller.done[first].token_ids, *prompt_of(20, 2)]
    before = batcher.prompt_tokens
    second = caller.ask(turn, max_tokens=20, seed=2)
    caller.run()
    assert batcher.reused_tokens == (40 + 29) // GRAIN * GRAIN
    assert batcher.prompt_tokens - before == len(turn) - batcher.reused_tokens
    assert_same_draws(plain_reference, turn, caller.done[second], alone(plain, turn, max_tokens=20, seed=2), True)


def test_beginnings_of_the_live_are_shared_too(plain: Path, plain_reference: Any) -> None:
    batcher = with_prefixes(plain)
    caller = Caller(batcher)
    head = prompt_of(50, 3)
    caller.ask(head, max_tokens=50, seed=0)
    batcher.step()
    asked = {caller.ask([*head, *prompt_of(5 + n, n)], max_tokens=10, seed=n): n for n in range(4)}
    caller.run()
    assert batcher.reused_tokens == 4 * 48
    for number, n in asked.items():
        prompt = [*head, *prompt_of(5 + n, n)]
        same = alone(plain, prompt, max_tokens=10, seed=n)
        assert_same_draws(plain_reference, prompt, caller.done[number], same, True)


def test_new_weights_forget_everything(tmp_path: Path) -> None:
    first, second = (make_checkpoint(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    batcher = with_prefixes(first)
    caller = Caller(batcher)
    prompt = prompt_of(64, 1)
    caller.ask(prompt, max_tokens=4)
    caller.run()
    assert batcher.prefixes is not None and batcher.prefixes.bytes
    batcher.model.load(load_file(second / "model.safetensors"))
    batcher.swapped(1)
    number = caller.ask(prompt, max_tokens=10, seed=1)
    caller.run()
    assert batcher.reused_tokens == 0
    assert caller.done[number].token_ids == alone(second, prompt, max_tokens=10, seed=1).token_ids


@pytest.mark.parametrize("seed", range(3))
def test_pieces_swaps_and_cancellations_lose_nobody(seed: int, plain: Path, plain_reference: Any) -> None:
    """Everything at once: prompts in pieces, shared beginnings, callers that leave, weights that are set anew."""
    stream = random.Random(seed)
    batcher = with_prefixes(plain, tokens=300, budget=stream.choice([16, 40, 100]))
    caller = Caller(batcher)
    asked: dict[int, tuple[list[int], dict[str, Any]]] = {}
    while len(asked) < 16:
        for _ in range(stream.choice([0, 0, 1, 3])):
            prompt = [
                *prompt_of(stream.choice([0, 20, 64]), 0),
                *prompt_of(stream.randrange(1, 70), stream.randrange(6)),
            ]
            params = {"max_tokens": stream.randrange(1, 20), "seed": len(asked)}
            asked[caller.ask(prompt, **params)] = (prompt, params)
        if caller.running and stream.random() < 0.15:
            stream.choice(caller.running).cancelled = True
        if stream.random() < 0.05:
            batcher.swapped(batcher.version + 1)  # the same weights: what is drawn stays what it was
        batcher.step()
        assert batcher.cache.bytes <= batcher.cache.budget_bytes
    done = caller.run()
    assert sorted(done) == sorted(asked)
    assert batcher.num_filling == 0
    for number, (prompt, params) in asked.items():
        completion = done[number]
        if completion.finish == "cancelled":
            continue
        assert completion.finish == "length"
        assert_same_draws(plain_reference, prompt, completion, alone(plain, prompt, **params), True)


def test_the_live_go_on_drawing_while_a_long_prompt_is_computed(plain: Path) -> None:
    batcher = with_prefixes(plain, budget=16)
    caller = Caller(batcher)
    caller.ask(prompt_of(8, 1), max_tokens=40)
    batcher.step()
    caller.ask(prompt_of(200, 2), max_tokens=2)
    steps = 0
    while batcher.num_filling or not steps:
        drawn = len(caller.running[0].ids)
        batcher.step()
        assert len(caller.running[0].ids) == drawn + 1
        steps += 1
    assert steps >= 200 // 16
    assert [len(c.token_ids) for _, c in sorted(caller.run().items())] == [40, 2]
