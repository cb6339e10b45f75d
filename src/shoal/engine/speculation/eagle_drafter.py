"""Drafting with an EAGLE-3 head: the target's features where there are any, the head's own output beyond them.

A pair is what the head reads at one position: the target's features there and the token that follows. Each round feeds
the pairs of the tokens that became certain since the last one, and its own last pair again, so that there is always
one: that gives the first draft. Every further draft feeds the head's output and the draft before it. Keys of the latter
are forgotten with the round: `_filled` counts pairs only.
A sequence may begin amid its text: the head then sees what came after, and guesses a little worse.

Invariant: before a round, `_filled[slot]` plus the pairs that wait is the number of tokens it was told of, minus one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.engine.cache import KVCache
from shoal.engine.model import attend
from shoal.engine.speculation.drafter import Picker, move
from shoal.engine.speculation.drafts import Drafts
from shoal.engine.speculation.eagle_files import LoadedHead
from shoal.errors import CapacityError
from shoal.protocol.sampling import SamplingParams


class EagleDrafter:
    """A head that drafts.

    Args:
        max_slots, max_tokens: sequences that may live at once, and the tokens of all of them together.
        width: likeliest tokens proposed at each depth; above 1 gives trees.
    """

    def __init__(self, loaded: LoadedHead, max_slots: int, max_tokens: int, width: int = 1) -> None:
        head = loaded.head
        self._head, self._embedding_VH = head, loaded.embedding_VH
        self.depths = loaded.depths
        self._width = width
        self._ids_R = head.ids_R
        dtype, device = loaded.embedding_VH.dtype, loaded.embedding_VH.device
        token_bytes = 2 * head.num_kv_heads * head.head_dim * dtype.itemsize
        self._cache = KVCache(1, head.num_kv_heads, head.head_dim, max_slots, max_tokens * token_bytes, dtype, device)
        self._filled: list[int] = []
        self._tokens: list[list[int]] = []
        """Second halves of the pairs that wait, by slot."""
        self._features: list[list[Tensor]] = []

    def begin(self, slot: int, ids: Sequence[int], features_TF: Tensor | None) -> None:
        assert slot == len(self._filled) and features_TF is not None and len(features_TF) == len(ids) - 1
        self._filled.append(0)
        self._tokens.append(list(ids[1:]))
        self._features.append([features_TF])

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
        batch, waiting = len(gammas), [len(tokens) for tokens in self._tokens]
        width = max(waiting)
        given = [list(more) for more in beyond or [()] * batch]
        steps = max(len(more) + gamma for more, gamma in zip(given, gammas, strict=True))
        longest = max(self._filled) + width + steps
        if not self._cache.fits(batch, longest):
            raise CapacityError(
                f"the drafter's cache cannot hold {batch} sequences of {longest} tokens.", "Draft fewer at once."
            )
        # Rows that joined since the last round have no place in the cache yet.
        self._cache.reserve(batch, longest, min(batch, self._cache.num_slots))
        features_BTF = torch.nn.utils.rnn.pad_sequence([torch.cat(each) for each in self._features], batch_first=True)
        tokens_BT = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in self._tokens])
        at_B = torch.tensor(waiting, device=features_BTF.device) - 1
        start_B = torch.tensor(self._filled, device=features_BTF.device)
        output = self._step(self._head.fc(features_BTF), tokens_BT.to(at_B.device), start_B)
        output = output.gather(1, at_B[:, None, None].expand(-1, 1, output.shape[-1]))
        picker = Picker(params, self._width, self._head.vocab_size, probs, self._ids_R)
        skipped_B = torch.tensor([len(more) for more in given])
        rows_B = torch.arange(batch)
        for depth in range(steps):
            if depth:
                last_B = picker.spines[-1].clone()
                for row, more in enumerate(given):
                    if depth <= len(more):
                        last_B[row] = more[depth - 1]
                output = self._step(output, last_B[:, None], start_B + at_B + depth)
            at_depth_B = (depth - skipped_B).clamp(min=0, max=most - 1)
            picker.pick(self._head.logits(output[:, 0]), uniforms_BG[rows_B, at_depth_B])
        self._filled = [filled + new - 1 for filled, new in zip(self._filled, waiting, strict=True)]
        self._tokens = [tokens[-1:] for tokens in self._tokens]
        self._features = [[each[-1][-1:]] for each in self._features]
        return picker.drafts(gammas, skipped_B.tolist() if beyond else ())

    def took(self, slot: int, tokens: Sequence[int], features_KF: Tensor | None) -> None:
        assert features_KF is not None and len(features_KF) == len(tokens)
        self._tokens[slot] += tokens
        self._features[slot].append(features_KF)

    @torch.inference_mode()
    def leave(self, slot: int, last: int) -> None:
        if slot != last:
            if self._filled[last]:
                self._cache.copy(last, slot, self._filled[last])
            self._tokens[slot], self._features[slot] = self._tokens[last], self._features[last]
        move(self._filled, slot, last)
        del self._tokens[last:], self._features[last:]

    def _step(self, g_BTH: Tensor, tokens_BT: Tensor, start_B: Tensor) -> Tensor:
        positions_BT = start_B[:, None] + torch.arange(tokens_BT.shape[1], device=start_B.device)
        seen_B1TL = torch.arange(self._cache.capacity, device=start_B.device) <= positions_BT[:, None, :, None]
        bias_B1TL = torch.zeros(seen_B1TL.shape, dtype=g_BTH.dtype, device=g_BTH.device)
        bias_B1TL.masked_fill_(~seen_B1TL, float("-inf"))

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._cache.write(0, 0, positions_BT, k, v)
            return attend(q, keys, values, bias_B1TL)

        return self._head.step(g_BTH, F.embedding(tokens_BT, self._embedding_VH), positions_BT, attention)
