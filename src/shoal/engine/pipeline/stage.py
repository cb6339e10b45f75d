"""One stage: some of a model's layers, one cache a lane, and nothing else.

Invariants: a lane's steps are computed in the order of their numbers, or not at all; a step that asks for rows or
positions that the lane's cache does not have, or has another epoch, is refused before anything is computed; the caches
never pass their budgets.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from shoal.engine.cache import KVCache
from shoal.engine.features import Features
from shoal.engine.model import Architecture, Decoder, Part
from shoal.engine.pipeline.wire import from_bytes, to_bytes
from shoal.engine.speculation.drafts import ancestors
from shoal.errors import RecordError
from shoal.protocol.stage import Assignment, CacheOp, Step

TRIAL_ROWS, TRIAL_TOKENS, TRIALS = 1, 64, 30
"""What a layer's speed is measured with: one row, with some history, so many times."""


class Stage:
    """The layers of one assignment, once `load` was given their tensors.

    Args:
        config: the model's `transformers` configuration.
    """

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device, assignment: Assignment) -> None:
        self.assignment = assignment
        num_layers = Architecture.from_config(config).num_layers
        if assignment.last > num_layers:
            raise RecordError(f"layers up to {assignment.last} are assigned, and the model has {num_layers}.")
        part = Part.stage(assignment.first, assignment.last, num_layers)
        self.decoder = Decoder(config, dtype, device, part)
        self._newest: dict[int, int] = {}
        """Each lane's last step."""
        self._kept: dict[int, dict[int, Tensor]] = {}
        """What each lane keeps aside (`CacheOp`)."""
        self.caches = [
            make_cache(self.decoder, assignment.last - assignment.first, assignment.lane_slots, assignment.lane_tokens)
            for _ in range(assignment.lanes)
        ]

    def renew(self, assignment: Assignment) -> None:
        """The same layers in a new epoch: weights stay, caches begin empty."""
        assert (assignment.first, assignment.last) == (self.assignment.first, self.assignment.last)
        self.assignment = assignment
        self._newest, self._kept = {}, {}
        self.caches = [
            make_cache(self.decoder, assignment.last - assignment.first, assignment.lane_slots, assignment.lane_tokens)
            for _ in range(assignment.lanes)
        ]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The layers' weights; raises `ModelError` where they are not what they should be."""
        self.decoder.load(tensors)

    @torch.inference_mode()
    def compute(self, step: Step, data: bytes) -> tuple[Step, bytes]:
        """What goes to the next stage, or to the requester.

        Raises:
            RecordError: the step is not for this stage, or asks for what the cache does not have.
        """
        started = time.perf_counter()
        mine, decoder = self.assignment, self.decoder
        if (step.epoch, step.stage) != (mine.epoch, mine.stage) or step.lane >= mine.lanes:
            raise RecordError("a step arrived that is not for this stage.")
        if step.number <= self._newest.get(step.lane, -1):
            raise RecordError("a lane's steps have come out of order.")
        rows, hidden_size = len(step.start), decoder.arch.hidden_size
        device = decoder.device
        seen = b""
        if decoder.part.embeds:
            x = from_bytes(data, torch.int32, (rows, step.width), device).long()
            if int(x.min()) < 0 or int(x.max()) >= decoder.arch.vocab_size:
                raise RecordError("a step has token ids that the model does not have.")
        else:
            size = rows * step.width * hidden_size * decoder.dtype.itemsize
            if len(data) != size * (1 + sum(depth < mine.first for depth in step.depths)):
                raise RecordError("a step's tensor has a wrong size.")
            x = from_bytes(data[:size], decoder.dtype, (rows, step.width, hidden_size), device)
            seen = data[size:]
        cache = self.caches[step.lane]
        kept = self._kept.setdefault(step.lane, {})
        for op in step.ops:
            apply(cache, kept, op)
        if sum(state.shape[-2] for state in kept.values()) > mine.prefix_tokens:
            raise RecordError("a step keeps more aside than there is room for.")
        if step.first_slot + rows > cache.num_slots or max(step.start) + step.width > cache.capacity:
            raise RecordError("a step writes beyond the cache.")
        self._newest[step.lane] = step.number
        start = torch.tensor(step.start, device=device)
        last = mine.stage == mine.num_stages - 1
        at = torch.tensor(step.at, device=device) if last and step.at else None
        observed = Features(tuple(depth - mine.first for depth in step.depths if mine.first <= depth < mine.last))
        tree = ancestors(torch.tensor(step.parents)).to(device) if step.parents else None
        observe = observed if observed.depths else None
        hidden = decoder.forward(x, start, cache, step.first_slot, at, tree_BTT=tree, observe=observe)
        sent = to_bytes(hidden) + seen + b"".join(map(to_bytes, observed.each()))
        done = msgspec.structs.replace(step, stage=step.stage + 1, busy_s=(*step.busy_s, time.perf_counter() - started))
        return done, sent


def apply(cache: KVCache, kept: dict[int, Tensor], op: CacheOp) -> None:
    """Do what the requester's stand-in did.

    Args:
        kept: what the lane keeps aside, by number.

    Raises:
        RecordError: it names rows or positions that are not there, or more than the budget.
    """
    match op.kind:
        case "reserve":
            if not cache.fits(op.a, op.b) or op.c > min(op.a, cache.num_slots):
                raise RecordError("a step reserves more cache than there is.")
            if op.a:
                cache.reserve(op.a, op.b, op.c)
        case "copy":
            if max(op.a, op.b) >= cache.num_slots or op.c > cache.capacity:
                raise RecordError("a step copies rows that are not there.")
            cache.copy(op.a, op.b, op.c)
        case "keep":
            if op.a >= cache.num_slots or not 0 < op.c <= cache.capacity:
                raise RecordError("a step keeps rows that are not there.")
            state = cache.take(op.a, op.c)
            assert isinstance(state, Tensor)
            kept[op.b] = state
        case "restore":
            if op.a >= cache.num_slots or op.b not in kept or not 0 < op.c <= kept[op.b].shape[-2]:
                raise RecordError("a step restores what is not kept.")
            cache.put(op.a, kept[op.b], range(op.c))
        case "drop":
            kept.pop(op.b, None)
        case "move":
            if op.a >= cache.num_slots or not op.c <= op.b < cache.capacity:
                raise RecordError("a step moves an entry that is not there.")
            cache.settle(op.a, op.c, [op.b - op.c])
        case "clear":
            if op.a >= cache.num_slots:
                raise RecordError("a step clears a row that is not there.")
            cache.clear(op.a)


def make_cache(decoder: Decoder, num_layers: int, slots: int, tokens: int) -> KVCache:
    """A cache of so many layers and tokens."""
    arch = decoder.arch
    token_bytes = 2 * num_layers * arch.num_kv_heads * arch.head_dim * decoder.dtype.itemsize
    return KVCache(
        num_layers, arch.num_kv_heads, arch.head_dim, slots, tokens * token_bytes, decoder.dtype, decoder.device
    )


@torch.inference_mode()
def layer_seconds(config: Any, dtype: torch.dtype, device: torch.device) -> float:
    """How long one layer takes here for one row: the quickest of a few tries, since others may use the machine."""
    decoder = Decoder(config, dtype, device, Part(0, 1, embeds=False, norms=False, heads=False))
    decoder.load({name: torch.zeros(shape, dtype=dtype) for name, shape in decoder.shapes.items()})
    cache = make_cache(decoder, 1, TRIAL_ROWS, TRIAL_TOKENS)
    cache.reserve(TRIAL_ROWS, TRIAL_TOKENS, 0)
    x = torch.zeros(TRIAL_ROWS, 1, decoder.arch.hidden_size, dtype=dtype, device=device)
    start = torch.full((TRIAL_ROWS,), TRIAL_TOKENS - 1, device=device)
    best = float("inf")
    for _ in range(TRIALS):
        started = time.perf_counter()
        to_bytes(decoder.forward(x, start, cache))
        best = min(best, time.perf_counter() - started)
    return best


def layer_bytes(config: Any, dtype: torch.dtype, lane_tokens: int) -> int:
    """Memory of one layer: its weights and its part of a cache of so many tokens."""
    decoder = Decoder(config, dtype, torch.device("meta"), Part(0, 1, embeds=False, norms=False, heads=False))
    arch = decoder.arch
    weights = sum(torch.Size(shape).numel() for shape in decoder.shapes.values())
    return (weights + 2 * lane_tokens * arch.num_kv_heads * arch.head_dim) * dtype.itemsize
