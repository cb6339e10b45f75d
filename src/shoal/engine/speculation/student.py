"""A smaller model drafts: any checkpoint with the target's tokenizer, or a student distilled from it.

It has a key-value cache of its own. After a round it holds keys of drafts that were refused; they are simply forgotten,
since the decoder overwrites a position when it is reached again. So the cache is cut to the accepted length without
touching it: `_filled` falls.

Invariants: all positions before `_filled[slot]` hold keys of certain tokens, those behind it keys of `_drafted[slot]`;
at least one token is fed each round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.engine.cache import KVCache
from shoal.engine.model import Decoder
from shoal.engine.speculation.drafter import Picker, move
from shoal.engine.speculation.drafts import Drafts
from shoal.errors import CapacityError, ModelError
from shoal.protocol.sampling import SamplingParams


class StudentDrafter:
    """A decoder that drafts.

    Args:
        cache: its own, with as many slots as the target's.
        width: likeliest tokens proposed at each depth; above 1 gives trees.
        target_vocab_size: the target's; a drafter whose vocabulary is padded further never proposes the padding.

    Raises:
        ModelError: the drafter's vocabulary is smaller than the target's, so it has another tokenizer.
    """

    depths: tuple[int, ...] = ()

    def __init__(self, decoder: Decoder, cache: KVCache, target_vocab_size: int, width: int = 1) -> None:
        own = decoder.arch.vocab_size
        if own < target_vocab_size:
            raise ModelError(
                f"the drafter has {own} tokens and the target {target_vocab_size}.",
                "A drafter needs the target's tokenizer.",
            )
        self._decoder, self._cache, self._width = decoder, cache, width
        self._vocab_size = target_vocab_size
        self._ids: list[list[int]] = []
        self._filled: list[int] = []
        self._drafted: list[list[int]] = []
        """Drafts of the last round whose keys are in the cache, by slot."""

    def begin(self, slot: int, ids: Sequence[int], features_TF: Tensor | None) -> None:
        assert slot == len(self._ids)
        self._ids.append(list(ids))
        self._filled.append(0)
        self._drafted.append([])

    @torch.inference_mode()
    def propose(
        self,
        gammas: Sequence[int],
        params: Sequence[SamplingParams],
        uniforms_BG: Tensor,
        *,
        probs: bool,
        beyond: Sequence[Sequence[int]] = (),
    ) -> Drafts:
        most = max(gammas)
        if most == 0:
            return Drafts.chains([[] for _ in gammas])
        batch, device = len(gammas), self._decoder.device
        texts = [[*ids, *more] for ids, more in zip(self._ids, beyond or [()] * batch, strict=True)]
        # At least one token is fed: its hidden state is what the first draft comes of.
        first = [min(filled, len(text) - 1) for text, filled in zip(texts, self._filled, strict=True)]
        new = [text[at:] for text, at in zip(texts, first, strict=True)]
        width = max(map(len, new))
        longest = max(max(first) + width, max(map(len, texts)) + most)
        if not self._cache.fits(batch, longest):
            raise CapacityError(
                f"the drafter's cache cannot hold {batch} sequences of {longest} tokens.", "Draft fewer at once."
            )
        # Rows that joined since the last round have no place in the cache yet.
        self._cache.reserve(batch, longest, min(batch, self._cache.num_slots))
        picker = Picker(params, self._width, self._vocab_size, probs)
        x_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids in new], device=device)
        at_B = torch.tensor([len(ids) - 1 for ids in new], device=device)
        start_B = torch.tensor(first, device=device)
        hidden = self._decoder.forward(x_BT, start_B, self._cache, at_B=at_B)
        start_B = torch.tensor([len(text) for text in texts], device=device)
        for depth in range(most):
            if depth:
                hidden = self._decoder.forward(picker.spines[-1][:, None], start_B + depth - 1, self._cache)
            logits_BV = self._decoder.logits(hidden[:, 0])[:, : self._vocab_size]
            picker.pick(logits_BV, uniforms_BG[:, depth])
        drafts = picker.drafts(gammas)
        self._filled = [len(ids) for ids in self._ids]
        spines = torch.stack(picker.spines, dim=1).tolist()
        self._drafted = [
            [*text[len(ids) :], *row[: most - 1]] for text, ids, row in zip(texts, self._ids, spines, strict=True)
        ]
        return drafts

    def took(self, slot: int, tokens: Sequence[int], features_KF: Tensor | None) -> None:
        right = 0
        for drafted, token in zip(self._drafted[slot], tokens, strict=False):
            if drafted != token:
                break
            right += 1
        self._ids[slot] += tokens
        # The newest token stays to be fed, whatever the cache holds: its hidden state is what the next round needs.
        self._filled[slot] = min(self._filled[slot] + right, len(self._ids[slot]) - 1)
        self._drafted[slot] = []

    @torch.inference_mode()
    def leave(self, slot: int, last: int) -> None:
        if slot != last:
            # Its last drafts may turn out to be right: their keys come along.
            if held := self._filled[last] + len(self._drafted[last]):
                self._cache.copy(last, slot, held)
            self._ids[slot], self._drafted[slot] = self._ids[last], self._drafted[last]
        move(self._filled, slot, last)
        del self._ids[last:], self._drafted[last:]
