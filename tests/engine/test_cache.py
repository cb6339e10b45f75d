"""The cache keeps what was written, copies exactly, and never takes more than its budget."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.cache import GROWTH_TOKENS, KVCache

LAYERS, HEADS, DIM = 2, 2, 3
TOKEN_BYTES = 2 * LAYERS * HEADS * DIM * 4


def make_cache(slots: int, tokens: int) -> KVCache:
    budget = tokens * TOKEN_BYTES
    return KVCache(LAYERS, HEADS, DIM, slots, budget, torch.float32, torch.device("cpu"))


def written(cache: KVCache, slot: int, length: int) -> list[float]:
    """The mark at each of a slot's positions, after checking that all its numbers agree with it."""
    marks = []
    for position in range(length):
        values = [
            float(x)
            for layer in range(LAYERS)
            for store in (cache._keys, cache._values)
            for x in store[layer][slot, :, position].flatten()
        ]
        first = values[0]
        signs = [1.0] * (HEADS * DIM) + [-1.0] * (HEADS * DIM)
        assert values == [first * sign * (layer + 1) for layer in range(LAYERS) for sign in signs]
        marks.append(first)
    return marks


class Rows:
    """Sequences that come, grow and go as in the batcher, with plain lists as the truth."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.rows: list[list[float]] = []
        self.most: list[int] = []
        self.mark = 0.0

    def append(self, first_slot: int, counts: list[int]) -> None:
        width = max(counts)
        start = [len(self.rows[first_slot + i]) for i in range(len(counts))]
        positions = torch.tensor(start)[:, None] + torch.arange(width)
        marks = torch.zeros(len(counts), width)
        for i, count in enumerate(counts):
            for t in range(width):
                self.mark += 1
                marks[i, t] = self.mark
                if t < count:
                    self.rows[first_slot + i].append(self.mark)
        block = marks[:, :, None, None].expand(-1, -1, HEADS, DIM)
        for layer in range(LAYERS):
            keys, values = self.cache.write(layer, first_slot, positions, block * (layer + 1), block * -(layer + 1))
            assert keys.shape == values.shape == (len(counts), HEADS, self.cache.capacity, DIM)
            assert keys.is_contiguous() and values.is_contiguous()

    def join(self, prompt: int, more: int) -> bool:
        if not self.cache.fits(len(self.rows) + 1, max([prompt + more, *self.most])):
            return False
        filled = len(self.rows)
        self.rows.append([])
        self.most.append(prompt + more)
        self.cache.reserve(len(self.rows), max(prompt, *map(len, self.rows)), filled)
        self.append(filled, [prompt])
        return True

    def decode(self) -> None:
        for slot in [i for i, row in enumerate(self.rows) if len(row) >= self.most[i]][::-1]:
            self.leave(slot)
        if self.rows:
            self.cache.reserve(len(self.rows), max(map(len, self.rows)) + 1, len(self.rows))
            self.append(0, [1] * len(self.rows))

    def leave(self, slot: int) -> None:
        moved, most = self.rows.pop(), self.most.pop()
        if slot < len(self.rows):
            self.rows[slot], self.most[slot] = moved, most
            self.cache.copy(len(self.rows), slot, len(moved))

    def check(self) -> None:
        assert self.cache.bytes <= self.cache.budget_bytes
        real = sum(t.numel() * t.element_size() for t in (*self.cache._keys, *self.cache._values))
        assert real == self.cache.bytes
        for slot, row in enumerate(self.rows):
            assert written(self.cache, slot, len(row)) == row


actions = st.one_of(
    st.tuples(st.just("join"), st.integers(1, 90), st.integers(1, 60)),
    st.tuples(st.just("decode"), st.integers(1, 8), st.just(0)),
    st.tuples(st.just("leave"), st.integers(0, 9), st.just(0)),
)


@given(st.lists(actions, max_size=25), st.integers(1, 6), st.integers(GROWTH_TOKENS, 600))
def test_sequences_keep_their_values_within_the_budget(
    todo: list[tuple[str, int, int]], slots: int, tokens: int
) -> None:
    rows = Rows(make_cache(slots, tokens))
    for action, number, more in todo:
        if action == "join":
            rows.join(number, more)
        elif action == "decode":
            for _ in range(number):
                rows.decode()
                rows.check()
        elif rows.rows:
            rows.leave(number % len(rows.rows))
        rows.check()


@given(st.integers(1, 40), st.integers(1, 4000), st.integers(1, 40), st.integers(0, 100_000))
def test_fits_is_the_arithmetic_of_what_reserve_takes(slots: int, tokens: int, most: int, budget: int) -> None:
    cache = make_cache(most, 0)
    cache.budget_bytes = budget * TOKEN_BYTES
    rounded = -(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS
    assert cache.fits(slots, tokens) == (slots <= most and slots * rounded <= budget)


def test_a_capacity_that_is_no_longer_needed_is_given_back() -> None:
    cache = make_cache(4, 4000)
    cache.reserve(2, 900, 0)
    assert cache.capacity >= 900
    cache.reserve(2, 40, 2)
    assert cache.capacity <= 2 * 64


def test_room_is_given_up_where_a_new_row_needs_it() -> None:
    cache = make_cache(4, 2 * GROWTH_TOKENS)
    cache.reserve(1, 2 * GROWTH_TOKENS, 0)
    assert cache.fits(2, GROWTH_TOKENS)
    cache.reserve(2, GROWTH_TOKENS, 1)
    assert (cache.num_slots, cache.capacity) == (2, GROWTH_TOKENS)


def test_joining_one_by_one_rarely_reallocates() -> None:
    cache = make_cache(64, 64 * 32)
    taken = set()
    for slots in range(1, 65):
        cache.reserve(slots, 20, slots - 1)
        taken.add(cache.num_slots)
    assert len(taken) <= 8


def test_clear_leaves_zeros() -> None:
    cache = make_cache(2, 200)
    cache.reserve(2, 10, 0)
    nan = torch.full((2, 1, HEADS, DIM), float("nan"))
    for layer in range(LAYERS):
        cache.write(layer, 0, torch.tensor([[3], [3]]), nan, nan)
    cache.clear(1)
    for store in (*cache._keys, *cache._values):
        assert store[0].isnan().any() and not store[1].any()
