"""The key-value cache: one row of positions for each live sequence, grown on demand, within a byte budget.

A ragged static cache: slots × positions, where every slot has the same capacity but its own length. Live sequences
occupy slots 0…n−1 without gaps (the last one moves into a hole), so a pass reads one contiguous block. The capacity
follows the longest sequence at the moment: positions that nobody has reached cost neither memory nor time.

Invariants: `bytes ≤ budget` after every call (while it grows, one layer exists twice); a copy of a slot copies its
filled positions only, and those bit for bit; whatever was never written is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.engine.prefix import State

GROWTH_TOKENS = 32
"""Capacity is a multiple of this. Growing copies the cache, about 1 % of the time of as many decode steps."""


class KVCache:
    """Keys and values of up to `max_slots` sequences.

    Args:
        num_layers, num_kv_heads, head_dim: the model's.
        max_slots: sequences that may live at once.
        budget_bytes: the most memory the cache may take.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_slots: int,
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._heads, self._dim = num_kv_heads, head_dim
        self.max_slots = max_slots
        self.budget_bytes = budget_bytes
        self._dtype, self._device = dtype, device
        self.token_bytes = 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
        self._rows = torch.arange(max_slots, device=device)[:, None]
        self.capacity = 0
        self.num_slots = 0
        self.generation = 0
        """Rises when what `take` gave before is lost; never here."""
        self._keys = [self._empty(0, 0) for _ in range(num_layers)]
        self._values = [self._empty(0, 0) for _ in range(num_layers)]

    def fits(self, slots: int, tokens: int) -> bool:
        """Whether `slots` rows of `tokens` positions stay within the budget."""
        return slots <= self.max_slots and slots * _rounded(tokens) * self.token_bytes <= self.budget_bytes

    def reserve(self, slots: int, tokens: int, filled: int) -> None:
        """Make room for `slots` rows of `tokens` positions, keeping what the first `filled` rows hold of those.

        The caller has asked `fits`. A capacity that is more than twice what is needed is given back, since every
        pass reads all of it.
        """
        wanted = _rounded(tokens)
        roomy = wanted <= self.capacity <= 2 * wanted
        if slots <= self.num_slots and roomy:
            return
        capacity = self.capacity if roomy else wanted
        # Slots are doubled where the budget allows, so that sequences that join one by one don't each cause a copy.
        generous = max(self.num_slots, min(self.max_slots, 1 << (slots - 1).bit_length()))
        if self.fits(generous, capacity):
            slots = generous
        elif not self.fits(slots, capacity):
            capacity = wanted
        kept = min(self.capacity, capacity)
        for store in (self._keys, self._values):
            for layer, old in enumerate(store):
                store[layer] = self._empty(slots, capacity)
                store[layer][:filled, :, :kept] = old[:filled, :, :kept]
        self.num_slots, self.capacity = slots, capacity

    def write(
        self, layer: int, first_slot: int, positions_BT: Tensor, k: Tensor, v: Tensor, reach: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, T, K, D] at their positions; gives what those rows hold, [B, K, reach, D].

        Args:
            reach: how many positions are wanted; by default all there are.
        """
        batch = k.shape[0]
        keys = self._keys[layer][first_slot : first_slot + batch]
        values = self._values[layer][first_slot : first_slot + batch]
        rows = self._rows[:batch]
        keys[rows, :, positions_BT] = k
        values[rows, :, positions_BT] = v
        return keys[:, :, :reach], values[:, :, :reach]

    def rows_of(self, layer: int, first_slot: int, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of those slots themselves, to be read and written, [B, K, capacity, D]."""
        rows = slice(first_slot, first_slot + batch)
        return self._keys[layer][rows], self._values[layer][rows]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot into another."""
        for store in (self._keys, self._values):
            for tensor in store:
                tensor[target, :, :length] = tensor[source, :, :length]

    def settle(self, slot: int, start: int, nodes: Sequence[int]) -> None:
        """Of the entries from position `start` on, keep these in this order, and forget the others.

        A round's drafts lie in the order of their tree's nodes; `nodes` is the accepted path. A beginning of them (an
        accepted chain) costs nothing: what is behind a sequence's end is overwritten when it is reached.
        """
        if list(nodes) == list(range(len(nodes))):
            return
        source = [start + node for node in nodes]
        for store in (self._keys, self._values):
            for tensor in store:
                tensor[slot, :, start : start + len(source)] = tensor[slot, :, source]

    def holds(self, slot: int, ids: Sequence[int]) -> None:
        """Told after a round of drafts which tokens a slot's filled positions are of; a cache of keys needs no ids."""

    def take(self, slot: int, length: int) -> State:
        """A copy of a slot's first `length` positions, [2, layers, K, length, D]."""
        return torch.stack([torch.stack([t[slot, :, :length] for t in store]) for store in (self._keys, self._values)])

    def put(self, slot: int, state: State, ids: Sequence[int]) -> None:
        """Write the beginning of what `take` gave, which is of these ids, to a slot's beginning."""
        assert isinstance(state, Tensor)
        for store, kept in zip((self._keys, self._values), state, strict=True):
            for tensor, layer in zip(store, kept, strict=True):
                tensor[slot, :, : len(ids)] = layer[:, : len(ids)]

    def clear(self, slot: int) -> None:
        """Zero a slot: a masked position weighs nothing, but nothing times NaN is NaN."""
        for store in (self._keys, self._values):
            for tensor in store:
                tensor[slot].zero_()

    @property
    def bytes(self) -> int:
        """Memory taken now."""
        return self.num_slots * self.capacity * self.token_bytes

    def _empty(self, slots: int, capacity: int) -> Tensor:
        return torch.zeros(slots, self._heads, capacity, self._dim, dtype=self._dtype, device=self._device)


def _rounded(tokens: int) -> int:
    return -(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS
