"""The key-value cache: one row of positions for each live sequence, grown on demand, within a byte budget.

A ragged static cache: slots × positions, where every slot has the same capacity but its own length. Live sequences
occupy slots 0…n−1 without gaps (the last one moves into a hole), so a pass reads one contiguous block. The capacity
follows the longest sequence at the moment: positions that nobody has reached cost neither memory nor time.

Invariants: `bytes ≤ budget` after every call (while it grows, one layer exists twice); a copy of a slot copies its
filled positions only, and those bit for bit; whatever was never written is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
        self.capacity = 0
        self.num_slots = 0
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

    def write(self, layer: int, first_slot: int, positions_BT: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, T, K, D] at their positions; gives all of those rows', [B, K, capacity, D]."""
        batch = k.shape[0]
        keys = self._keys[layer][first_slot : first_slot + batch]
        values = self._values[layer][first_slot : first_slot + batch]
        rows = torch.arange(batch, device=k.device)[:, None]
        keys[rows, :, positions_BT] = k
        values[rows, :, positions_BT] = v
        return keys, values

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot into another."""
        for store in (self._keys, self._values):
            for tensor in store:
                tensor[target, :, :length] = tensor[source, :, :length]

    def take(self, slot: int, length: int) -> Tensor:
        """A copy of a slot's first `length` positions, [2, layers, K, length, D]."""
        return torch.stack([torch.stack([t[slot, :, :length] for t in store]) for store in (self._keys, self._values)])

    def put(self, slot: int, state: Tensor) -> None:
        """Write what `take` gave to a slot's beginning."""
        for store, kept in zip((self._keys, self._values), state, strict=True):
            for tensor, layer in zip(store, kept, strict=True):
                tensor[slot, :, : layer.shape[1]] = layer

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
