"""What every drafter can do, and how one that computes logits picks its tokens.

Whoever drafts keeps its sequences in slots 0 … n − 1 (`drafting`); a drafter keeps its state by the same numbers and
moves it when told to. It is told of every token that became certain, and of nothing else: what it computed for refused
drafts it drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from shoal.engine.speculation.drafts import Drafts
from shoal.engine.speculation.rules import distribution
from shoal.engine.speculation.verify import draw
from shoal.protocol.sampling import SamplingParams


class Drafter(Protocol):
    """Proposes what the target may say next."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of the target whose incoming hidden states it needs, side by side as *features* (F wide)."""
        ...

    def begin(self, slot: int, ids: Sequence[int], features_TF: Tensor | None) -> None:
        """A sequence joins: its prompt and first token, and the features of the prompt's T positions."""
        ...

    def propose(
        self,
        gammas: Sequence[int],
        params: Sequence[SamplingParams],
        uniforms_BG: Tensor,
        *,
        probs: bool,
        beyond: Sequence[Sequence[int]] = (),
    ) -> Drafts:
        """Drafts for slots 0 … B − 1: at most `gammas` deep.

        Args:
            uniforms_BG: in [0, 1), fp64, for drafts that are drawn.
            probs: whether the drafter's distributions are asked for; always so where tokens are drawn.
            beyond: tokens of each slot that are not certain yet, behind which chains are asked for; absent: none.
        """
        ...

    def took(self, slot: int, tokens: Sequence[int], features_KF: Tensor | None) -> None:
        """These K tokens are certain now; features of the positions before each of them."""
        ...

    def leave(self, slot: int, last: int) -> None:
        """The sequence in `slot` is over, and that in slot `last` takes its place."""
        ...


@dataclass
class Picker:
    """Collects one round's tokens of drafters that compute logits step by step: drawn along a chain for sampled rows
    (then strict accepts as often as the distributions agree), the likeliest otherwise, alternatives beside them.

    Args:
        width: tokens at each depth, the chain's own included; above 1 all are the likeliest ones, none is drawn.
    """

    params: Sequence[SamplingParams]
    width: int
    vocab_size: int
    probs: bool
    ids_V: Tensor | None = None
    """Where the logits are of a reduced vocabulary: the target's id of each."""
    spines: list[Tensor] = field(default_factory=list)
    """The chains' tokens so far, [B] each."""
    _others: list[Tensor] = field(default_factory=list)
    _probs: list[Tensor] = field(default_factory=list)

    @property
    def drawn(self) -> bool:
        return self.width == 1 and any(p.temperature > 0 for p in self.params)

    def pick(self, logits_BV: Tensor, uniforms_B: Tensor) -> Tensor:
        """The next tokens of all chains, [B], as the target's ids."""
        if self.drawn or self.probs:
            p_BV, soft_BV = distribution(logits_BV, self.params)
            self._probs.append(self._widened(soft_BV))
        if self.drawn:
            spine_B = torch.tensor(draw(p_BV, uniforms_B), device=logits_BV.device)
            others_BK = spine_B[:, None][:, :0]
        else:
            top_BK = logits_BV.topk(min(self.width, logits_BV.shape[-1]), dim=-1).indices
            spine_B, others_BK = top_BK[:, 0], top_BK[:, 1:]
        if self.ids_V is not None:
            spine_B, others_BK = self.ids_V[spine_B], self.ids_V[others_BK]
        self.spines.append(spine_B)
        self._others.append(others_BK)
        return spine_B

    def drafts(self, gammas: Sequence[int], skipped: Sequence[int] = ()) -> Drafts:
        """What was picked, cut to each row's depth; for chains, without each row's first `skipped` picks."""
        probs_BGV = torch.stack(self._probs, dim=1) if self._probs else None
        spines_BG = torch.stack(self.spines, dim=1)
        if self.width == 1:
            first = skipped or [0] * len(gammas)
            rows = [spine[s : s + g] for spine, s, g in zip(spines_BG.tolist(), first, gammas, strict=True)]
            if any(first) and probs_BGV is not None:
                width = max(map(len, rows))
                probs_BGV = torch.nn.utils.rnn.pad_sequence(
                    [p_GV[s : s + width] for p_GV, s in zip(probs_BGV, first, strict=True)], batch_first=True
                )
            return Drafts.chains(rows, probs_BGV, drawn=self.drawn)
        return Drafts.combs(spines_BG, torch.stack(self._others, dim=1), gammas, probs_BGV)

    def _widened(self, soft_BV: Tensor) -> Tensor:
        if self.ids_V is None:
            return soft_BV
        whole_BV = soft_BV.new_zeros(soft_BV.shape[0], self.vocab_size)
        return whole_BV.index_copy_(1, self.ids_V, soft_BV)


def move(slots: list[int], slot: int, last: int) -> None:
    """Let the last entry of a list by slots take a place."""
    slots[slot] = slots[last]
    del slots[last:]
