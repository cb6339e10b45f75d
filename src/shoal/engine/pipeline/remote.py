"""Stand-ins for a decoder and its cache, whose layers are elsewhere.

Invariants: the stand-in cache takes the same decisions as the stages' caches, because it is one, of no layers; what it
did since the last step travels with the next one, in order; for each row it knows the ids that the stages' rows were
computed from, so that any of them can be computed again. A forward pass returns only with its result, however many
rings break under it, or raises `Interrupted`; a launched one (`Decoder.launch`) is lost with its ring, and what it was
drafted for is drafted anew behind the tokens that are certain. Head and stages have weights of the same version: a
lane goes over to a ring's when it begins to use it, and computes all of its rows again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from shoal.engine.cache import KVCache
from shoal.engine.features import Features, Passed
from shoal.engine.lora import Adapter
from shoal.engine.model import HEAD, Decoder
from shoal.engine.pipeline.ring import Interrupted, Result, Ring, RingBroken, Rings
from shoal.engine.pipeline.wire import split_bytes, to_bytes
from shoal.engine.prefix import Kept, State
from shoal.protocol.stage import MAX_VOIDS, CacheOp, Step

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
        self._kept = 0
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

    def take(self, slot: int, length: int) -> State:
        self._kept += 1
        self.ops.append(CacheOp("keep", slot, self._kept, length))
        return Kept(self._kept, length * self.token_bytes, self.generation)

    def put(self, slot: int, state: State, ids: Sequence[int]) -> None:
        assert isinstance(state, Kept) and state.generation == self.generation
        self.ops.append(CacheOp("restore", slot, state.key, len(ids)))
        self.rows[slot] = list(ids)

    def forgets(self, state: State) -> None:
        """What `take` gave is wanted no more."""
        if isinstance(state, Kept) and state.generation == self.generation:
            self.ops.append(CacheOp("drop", 0, state.key))

    def settle(self, slot: int, start: int, nodes: Sequence[int]) -> None:
        for at, node in enumerate(nodes):
            if at != node:  # ascending, so no entry is overwritten before it has moved
                self.ops.append(CacheOp("move", slot, start + node, start + at))

    def holds(self, slot: int, ids: Sequence[int]) -> None:
        self.rows[slot] = list(ids)

    def wrote(self, ids: Sequence[Sequence[int]], start: Sequence[int], first_slot: int) -> None:
        """The stages compute these, in the order of these calls and of what else is done to the cache."""
        for slot, (row, at) in enumerate(zip(ids, start, strict=True), start=first_slot):
            known = self.rows.setdefault(slot, [])
            known += [0] * (at - len(known))  # where a frame begins behind guesses; `holds` tells what became of them
            known[at:] = row

    def begin_again(self) -> None:
        """The stages' caches are empty: say how large they are to be, and nothing else."""
        self.generation += 1
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
        self._version = 0
        self.on_weights: Callable[[int], None] = lambda version: None
        """Told on the lane's thread that from now on all is computed with weights of this version."""
        self._number = 0
        self._voids: list[int] = []
        """Steps that nobody waits for any more, not yet told to the stages."""
        self.rebuilt_tokens = 0
        """Computed again since the start, because stages were lost or layers moved."""
        self.stage_s: tuple[float, ...] = ()
        """What each stage took to compute the last step."""
        self.round_s = 0.0
        """What the last step took from being sent to its result."""

    def share(self, other: Decoder) -> None:
        """Use another's head, which is only read."""
        self._head, self._embedding = other._head, other._embedding

    def adopt(self, ring: Ring | None) -> None:
        """Go over to the weights that a ring's stages have."""
        if ring is not None and ring.weights is not None and ring.weights.version != self._version:
            self.share(ring.weights.head)
            self._version = ring.weights.version
            self.on_weights(self._version)

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
        assert isinstance(cache, RemoteCache) and not any(adapters) and tree_BTT is None
        depths = observe.depths if isinstance(observe, Features) else ()
        ids, start = x_BT.tolist(), start_B.tolist()
        at = () if at_B is None else tuple(at_B.tolist())
        while True:
            ring = self._ring(cache)
            if ring is None:
                continue
            try:
                step, done = self._send(ring, cache, ids, start, first_slot, at, depths=depths)
                passed = self._wait(ring, step, done, depths)
            except RingBroken:
                self._epoch = 0
                continue
            cache.wrote(ids, start, first_slot)
            if observe is not None and passed.features_BTF is not None:
                for depth, hidden in zip(depths, passed.features_BTF.chunk(len(depths), dim=-1), strict=True):
                    observe(depth, hidden)
            return passed.hidden_BTH

    def launch(
        self,
        x_BT: Tensor,
        start_B: Tensor,
        cache: KVCache,
        *,
        adapters: Sequence[Adapter | None] = (),
        parents_BN: Tensor | None = None,
        depths: tuple[int, ...] = (),
    ) -> tuple[Callable[[], Passed | None], Callable[[], None]]:
        assert isinstance(cache, RemoteCache) and not any(adapters)
        ids, start = x_BT.tolist(), start_B.tolist()
        try:
            if (ring := self._ring(cache)) is None:
                return (lambda: None), (lambda: None)
            parents = () if parents_BN is None else parents_BN.tolist()
            step, done = self._send(ring, cache, ids, start, 0, (), parents, depths)
        except RingBroken:
            self._epoch = 0
            return (lambda: None), (lambda: None)
        cache.wrote(ids, start, 0)

        def land() -> Passed | None:
            try:
                passed = self._wait(ring, step, done, depths)
            except RingBroken:
                self._epoch = 0
                return None
            # It came from stages that have been replaced since: later steps went to others, which know nothing of it.
            return passed if self._epoch == ring.epoch else None

        def void() -> None:
            ring.drop(step)
            if not step.ops:  # what a step does to the caches has to be done
                self._voids.append(step.number)

        return land, void

    def _ring(self, cache: RemoteCache) -> Ring | None:
        """The present ring, with the lane's rows computed on it; none if it broke meanwhile.

        Raises:
            Interrupted: there has been none for too long.
        """
        ring = self._rings.present()
        if ring.epoch != self._epoch:
            try:
                self._rebuild(ring, cache)
            except RingBroken:
                self._epoch = 0
                return None
        return ring

    def _send(
        self,
        ring: Ring,
        cache: RemoteCache,
        ids: Sequence[Sequence[int]],
        start: Sequence[int],
        first_slot: int,
        at: Sequence[int],
        parents: Sequence[Sequence[int]] = (),
        depths: tuple[int, ...] = (),
    ) -> tuple[Step, Future[Result]]:
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
            parents=tuple(map(tuple, parents)),
            depths=tuple(sorted(set(depths))),
            voids=tuple(self._voids[-MAX_VOIDS:]),
            ops=tuple(cache.ops),
        )
        done = ring.send(step, to_bytes(torch.tensor(ids, dtype=torch.int32)))
        self._voids.clear()
        cache.ops.clear()
        return step, done

    def _wait(self, ring: Ring, step: Step, done: Future[Result], depths: tuple[int, ...] = ()) -> Passed:
        try:
            result = ring.wait(step, done)
        except Interrupted:
            self._epoch = 0
            raise
        self.round_s, self.stage_s = result.seconds, result.step.busy_s
        rows, hidden_size = len(step.start), self.arch.hidden_size
        each = (rows, step.width, hidden_size)
        shapes = [(rows, 1, hidden_size) if step.at else each, *([each] * len(step.depths))]
        hidden, *seen = split_bytes(result.data, self.dtype, shapes, self.device)
        at_depth = dict(zip(step.depths, seen, strict=True))
        compute_s = sum(self.stage_s)
        return Passed(
            hidden,
            torch.cat([at_depth[depth] for depth in depths], dim=-1) if depths else None,
            compute_s,
            max(self.stage_s, default=0.0),
            max(0.0, self.round_s - compute_s),
        )

    def _rebuild(self, ring: Ring, cache: RemoteCache) -> None:
        """Compute every row of the lane again, on stages whose caches are empty."""
        self.adopt(ring)
        cache.begin_again()
        rows = [cache.rows.get(slot, []) for slot in range(max(cache.rows, default=-1) + 1)]
        longest = max(map(len, rows), default=0)
        at = 0
        while at < longest:
            count = max(slot for slot, ids in enumerate(rows) if len(ids) > at) + 1
            width = min(longest - at, max(NARROWEST, REBUILD_TOKENS // count))
            piece = [_padded(ids[at : at + width], width) for ids in rows[:count]]
            self._wait(ring, *self._send(ring, cache, piece, [at] * count, 0, [0] * count))
            self.rebuilt_tokens += sum(len(ids[at : at + width]) for ids in rows[:count])
            at += width
        self._epoch = ring.epoch


def _padded(ids: list[int], width: int) -> list[int]:
    return ids + [0] * (width - len(ids))
