"""Stand-ins for a decoder and its cache, whose layers are elsewhere.

Invariants: the stand-in cache takes the same decisions as the stages' caches, because it is one, of no layers; what it
did since the last step travels with the next one, in order; for each row it knows the ids that the stages' rows were
computed from, so that any of them can be computed again. A forward pass returns only with its result, however many
rings break under it, or raises `Interrupted`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.engine.cache import KVCache
from shoal.engine.lora import Adapter
from shoal.engine.model import HEAD, Decoder
from shoal.engine.pipeline.ring import Interrupted, Ring, RingBroken, Rings
from shoal.engine.pipeline.wire import from_bytes, to_bytes
from shoal.protocol.stage import CacheOp, Step

REBUILD_TOKENS = 2048
"""Padded tokens computed in one step when rows are computed again."""

NARROWEST = 16


class RemoteCache(KVCache):
    """One lane's cache: no layers, but all of the decisions, and the ids of every row."""

    def __init__(self, model: Decoder, max_slots: int, tokens: int) -> None:
        arch = model.arch
        super().__init__(0, arch.num_kv_heads, arch.head_dim, max_slots, 0, model.dtype, model.device)
        # What a token takes on all stages together. Each has room for as many tokens, so all decide alike.
        self.token_bytes = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * model.dtype.itemsize
        self.budget_bytes = tokens * self.token_bytes
        self.ops: list[CacheOp] = []
        """Not yet told to the stages."""
        self.rows: dict[int, list[int]] = {}
        """Ids of each slot's filled positions; padding that a longer row brought is among them, and does no harm."""

    def reserve(self, slots: int, tokens: int, filled: int) -> None:
        super().reserve(slots, tokens, filled)
        self.ops.append(CacheOp("reserve", slots, tokens, filled))
        for slot in [slot for slot in self.rows if slot >= filled]:
            del self.rows[slot]
        for ids in self.rows.values():
            del ids[self.capacity :]

    def copy(self, source: int, target: int, length: int) -> None:
        self.ops.append(CacheOp("copy", source, target, length))
        self.rows[target] = self.rows.get(source, [])[:length]

    def clear(self, slot: int) -> None:
        self.ops.append(CacheOp("clear", slot))
        self.rows.pop(slot, None)

    def wrote(self, ids: Sequence[Sequence[int]], start: Sequence[int], first_slot: int) -> None:
        """The stages have computed these."""
        for slot, (row, at) in enumerate(zip(ids, start, strict=True), start=first_slot):
            known = self.rows.setdefault(slot, [])
            known[at:] = row

    def begin_again(self) -> None:
        """The stages' caches are empty: say how large they are to be, and nothing else."""
        slots, tokens = self.num_slots, self.capacity
        self.num_slots = self.capacity = 0
        self.ops = []
        if slots:
            super().reserve(slots, tokens, 0)
            self.ops.append(CacheOp("reserve", slots, tokens, 0))


class RemoteDecoder(Decoder):
    """A decoder that has the head only: hidden states come from the ring.

    Args:
        lane: whose batch this is; one thread calls `forward`.
    """

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device, rings: Rings, lane: int) -> None:
        super().__init__(config, dtype, device, HEAD)
        self._rings = rings
        self._lane = lane
        self._epoch = 0
        self._number = 0
        self.rebuilt_tokens = 0
        """Computed again since the start, because stages were lost or layers moved."""
        self.stage_s: tuple[float, ...] = ()
        """What each stage took to compute the last step."""
        self.round_s = 0.0
        """What the last step took from being sent to its result."""

    def share(self, other: RemoteDecoder) -> None:
        """Use another's head, which is only read."""
        self._head, self._embedding = other._head, other._embedding

    @torch.inference_mode()
    def forward(
        self,
        x_BT: Tensor,
        start_B: Tensor,
        cache: KVCache,
        first_slot: int = 0,
        at_B: Tensor | None = None,
        adapters: Sequence[Adapter | None] = (),
        tree_BTT: Tensor | None = None,
        observe: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        assert isinstance(cache, RemoteCache) and not any(adapters)
        assert tree_BTT is None and observe is None, "stages verify no drafts"
        ids, start = x_BT.tolist(), start_B.tolist()
        at = () if at_B is None else tuple(at_B.tolist())
        while True:
            ring = self._rings.present()
            try:
                if ring.epoch != self._epoch:
                    self._rebuild(ring, cache)
                hidden = self._round(ring, cache, ids, start, first_slot, at)
            except RingBroken:
                self._epoch = 0
                continue
            except Interrupted:
                self._epoch = 0
                raise
            cache.wrote(ids, start, first_slot)
            return hidden

    def _round(
        self,
        ring: Ring,
        cache: RemoteCache,
        ids: Sequence[Sequence[int]],
        start: Sequence[int],
        first_slot: int,
        at: Sequence[int],
    ) -> Tensor:
        self._number += 1
        step = Step(
            epoch=ring.epoch,
            lane=self._lane,
            number=self._number,
            stage=0,
            width=len(ids[0]),
            start=tuple(start),
            first_slot=first_slot,
            at=tuple(at),
            ops=tuple(cache.ops),
        )
        started = time.perf_counter()
        done, data = ring.round(step, to_bytes(torch.tensor(ids, dtype=torch.int32)))
        self.round_s = time.perf_counter() - started
        cache.ops.clear()
        self.stage_s = done.busy_s
        shape = (len(start), 1 if at else step.width, self.arch.hidden_size)
        return from_bytes(data, self.dtype, shape, self.device)

    def _rebuild(self, ring: Ring, cache: RemoteCache) -> None:
        """Compute every row of the lane again, on stages whose caches are empty."""
        cache.begin_again()
        rows = [cache.rows.get(slot, []) for slot in range(max(cache.rows, default=-1) + 1)]
        longest = max(map(len, rows), default=0)
        at = 0
        while at < longest:
            count = max(slot for slot, ids in enumerate(rows) if len(ids) > at) + 1
            width = min(longest - at, max(NARROWEST, REBUILD_TOKENS // count))
            piece = [_padded(ids[at : at + width], width) for ids in rows[:count]]
            self._round(ring, cache, piece, [at] * count, 0, [0] * count)
            self.rebuilt_tokens += sum(len(ids[at : at + width]) for ids in rows[:count])
            at += width
        self._epoch = ring.epoch


def _padded(ids: list[int], width: int) -> list[int]:
    return ids + [0] * (width - len(ids))
