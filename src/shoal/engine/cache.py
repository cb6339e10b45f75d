"""The key-value cache: one row of positions for each live sequence, grown on demand, within a byte budget.

A ragged static cache: slots × positions, where every slot has the same capacity but its own length. Live sequences
occupy slots 0…n−1 without gaps (the last one moves into a hole), so a decode step reads one plain slice.

Invariants: `bytes ≤ budget` at every moment, growth included in the arithmetic before anything is allocated; a copy
of a slot copies its filled positions only, and those bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH_TOKENS = 64
"""Capacity is a multiple of this, so that a sequence that grows token by token rarely reallocates."""


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
        self._layout = (num_layers, num_kv_heads, head_dim)
        self.max_slots = max_slots
        self.budget_bytes = budget_bytes
        self._dtype, self._device = dtype, device
        self.token_bytes = 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
        self.capacity = 0
        self.num_slots = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def fits(self, slots: int, tokens: int) -> bool:
        """Whether `slots` rows of `tokens` positions stay within the budget."""
        return slots <= self.max_slots and slots * _rounded(tokens) * self.token_bytes <= self.budget_bytes

    def reserve(self, slots: int, tokens: int, filled: int) -> None:
        """Make room for `slots` rows of `tokens` positions, keeping the first `filled` rows' contents.

        The caller has asked `fits` first.
        """
        if slots <= self.num_slots and tokens <= self.capacity:
            return
        wanted = (max(slots, self.num_slots), max(_rounded(tokens), self.capacity))
        slots, capacity = wanted if self.fits(*wanted) else (slots, _rounded(tokens))
        num_layers, heads, dim = self._layout
        kept = min(self.capacity, capacity)
        for layer in range(num_layers):
            for store in (self._keys, self._values):
                fresh = torch.zeros(slots, heads, capacity, dim, dtype=self._dtype, device=self._device)
                if layer < len(store):
                    fresh[:filled, :, :kept] = store[layer][:filled, :, :kept]
                    store[layer] = fresh
                else:
                    store.append(fresh)
        self.num_slots, self.capacity = slots, capacity

    def write(
        self, layer: int, first_slot: int, positions_BT: Tensor, k: Tensor, v: Tensor, reach: int
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, K, T, D] at their positions; gives views of all, [B, K, reach, D]."""
        batch = k.shape[0]
        keys = self._keys[layer][first_slot : first_slot + batch]
        values = self._values[layer][first_slot : first_slot + batch]
        rows = torch.arange(batch, device=k.device)[:, None]
        keys[rows, :, positions_BT] = k.transpose(1, 2)
        values[rows, :, positions_BT] = v.transpose(1, 2)
        return keys[:, :, :reach], values[:, :, :reach]

    def copy(self, source: int, targets: range | list[int], length: int) -> None:
        """Copy the first `length` positions of one slot into others."""
        for store in (self._keys, self._values):
            for tensor in store:
                for target in targets:
                    tensor[target, :, :length] = tensor[source, :, :length]

    @property
    def bytes(self) -> int:
        """Memory taken now."""
        return self.num_slots * self.capacity * self.token_bytes


def _rounded(tokens: int) -> int:
    return -(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS
