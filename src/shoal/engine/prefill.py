"""Prompts on their way into the cache: computed in pieces, so that those who are alive keep drawing between them.

A *wave* is what was admitted together. Its leaders hold the distinct prompts, one row of the cache each; its followers
have the prompt of a leader and get a copy of its row in the end.

Invariants: a wave's rows stand behind those of the live sequences from `base` on and don't move until it is done; a
wave whose weights were swapped under it begins again; a piece computes at most the budget's padded tokens, or one
row's narrowest piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from shoal.engine.cache import KVCache
from shoal.engine.features import Features
from shoal.engine.model import Decoder
from shoal.engine.sequence import Sequence
from shoal.engine.speculation.drafting import FEATURE_TOKENS

PREFILL_WIDTH = 512
"""Longer prompts are computed in pieces of this many tokens, which bounds the activations' memory."""

NARROWEST = 16
"""Narrower pieces would cost as much time as this."""


@dataclass(eq=False)
class Wave:
    """Sequences whose prompts are being computed."""

    leaders: list[Sequence]
    followers: list[Sequence]
    base: int
    """Slot of the first leader's row."""
    version: int = -1
    """The policy version that computes it."""
    work: Iterator[int] = field(default_factory=lambda: iter(()))

    @property
    def members(self) -> list[Sequence]:
        return [*self.leaders, *self.followers]

    @property
    def num_slots(self) -> int:
        """Slots in use up to the last one that any member will take."""
        return self.base + len(self.leaders) + len(self.followers)

    @property
    def longest(self) -> int:
        return max(s.prompt_length for s in self.leaders)


def compute(
    model: Decoder,
    cache: KVCache,
    leaders: list[Sequence],
    reused: list[int],
    base: int,
    budget: int,
    depths: tuple[int, ...] = (),
) -> Iterator[int]:
    """Compute each leader's prompt from its first `reused` tokens on; yields the padded tokens of each piece.

    Leaders come in runs of equal `reused`, longest prompt first within a run: the rows that still have tokens in a
    later piece are then the first ones, and no row is padded past the longest prompt. Sets `prompt_hidden`, and
    `prompt_features` where hidden states of some `depths` are asked for.
    """
    first = base
    for start, run in groupby(zip(reused, leaders, strict=True), key=lambda pair: pair[0]):
        rows = [leader for _, leader in run]
        yield from _compute_run(model, cache, rows, start, first, budget, depths)
        first += len(rows)


def _compute_run(
    model: Decoder,
    cache: KVCache,
    rows: list[Sequence],
    start: int,
    first: int,
    budget: int,
    depths: tuple[int, ...],
) -> Iterator[int]:
    device = model.device
    for sequence in rows:
        sequence.prompt_features = None
    longest = rows[0].prompt_length
    ids = torch.tensor([[*s.prompt[start:], *[0] * (longest - s.prompt_length)] for s in rows], device=device)
    while start < longest:
        unfinished = sum(s.prompt_length > start for s in rows)
        width = min(PREFILL_WIDTH, max(NARROWEST, budget // unfinished), longest - start)
        offset = torch.full((unfinished,), start, device=device)
        last = [min(s.prompt_length - start, width) - 1 for s in rows[:unfinished]]
        at = torch.tensor(last, device=device)
        adapters = [s.adapter for s in rows[:unfinished]]
        observed = Features(depths) if depths else None
        hidden = model.forward(ids[:unfinished, :width], offset, cache, first, at, adapters, observe=observed)
        features_BTF = observed.rows() if observed else None
        for row, sequence in enumerate(rows[:unfinished]):
            if features_BTF is not None:
                _keep(sequence, features_BTF[row, : sequence.prompt_length - start])
            if sequence.prompt_length <= start + width:
                sequence.prompt_hidden = hidden[row, 0].clone()
        ids, start = ids[:, width:], start + width
        yield unfinished * width


def _keep(sequence: Sequence, features_TF: Tensor) -> None:
    """Add features of the prompt's next positions; the latest are kept."""
    known = sequence.prompt_features
    joined = features_TF if known is None else torch.cat((known, features_TF))
    sequence.prompt_features = joined[-FEATURE_TOKENS:].clone()
