"""What every acceptance rule answers, and the two distributions that they all compare.

For one drafted token y of a row, with target distribution p and draft distribution q over the vocabulary, a rule
gives a probability a(y) of accepting it, and the *residual* r: what the row's next token is drawn from if y (and every
sibling after it) is refused. One round's output at that position is then

    out(x) = q(x)·a(x) + (1 − Σ_y q(y)·a(y)) · r(x)

and a rule is lossless exactly where out = p. In a tree, a refused token's siblings are judged with r in the place of p.

Greedy rows are the same with points for distributions: p is 1 at the target's likeliest token. What a rule wants to
know of the target's doubt there it finds in the untempered distributions (`soft_…`).

Shapes: M positions judged together (one of each row that is still alive), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoal.engine.sampling import LOWEST_TEMPERATURE, truncate
from shoal.protocol.sampling import SamplingParams


@dataclass(frozen=True)
class Positions:
    """Where tokens are judged."""

    logits_MV: Tensor
    """The target's, fp32, as the model gave them."""
    p_MV: Tensor
    """What the token would be drawn from; behind a refused sibling, that one's residual."""
    q_MV: Tensor
    """What the drafted token was drawn from; a point where it was no draw."""
    soft_p_MV: Tensor
    """As p, but untempered for greedy rows, and the target's own behind a refused sibling."""
    soft_q_MV: Tensor
    """The drafter's distribution, untempered for greedy rows; a point where it has none."""
    tokens_M: Tensor
    greedy_M: Tensor

    def of_token(self, values_MV: Tensor) -> Tensor:
        """The drafted tokens' entries, [M]."""
        return values_MV.gather(1, self.tokens_M[:, None])[:, 0]


@dataclass(frozen=True)
class Judgement:
    """What a rule says."""

    accept_M: Tensor
    """Probability of accepting, in [0, 1]."""
    residual_MV: Tensor
    """r, up to a factor."""


class Rule(Protocol):
    """A rule, with its settings."""

    @property
    def name(self) -> str: ...

    @property
    def lossy(self) -> bool:
        """Whether what comes out may differ from what the target alone would say."""
        ...

    def judge(self, at: Positions) -> Judgement: ...


def distribution(logits_MV: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """What tokens are drawn from, and the same untempered for greedy rows: fp32, [M, V] each.

    Args:
        params: one entry a row.
    """
    x_MV = logits_MV.float() - logits_MV.float().amax(dim=-1, keepdim=True)
    scales = [max(p.temperature, LOWEST_TEMPERATURE) if p.temperature else 1.0 for p in params]
    if any(scale != 1.0 for scale in scales):
        x_MV = x_MV / torch.tensor(scales, device=x_MV.device)[:, None]
    for row, p in enumerate(params):
        if p.temperature > 0 and not p.is_exact:
            x_MV[row] = truncate(x_MV[row], p.top_k, p.top_p)
    soft_MV = torch.softmax(x_MV, dim=-1)
    greedy_M = torch.tensor([p.temperature == 0 for p in params], device=x_MV.device)
    return torch.where(greedy_M[:, None], point(x_MV.argmax(dim=-1), x_MV.shape[-1]), soft_MV), soft_MV


def point(tokens_M: Tensor, vocab_size: int) -> Tensor:
    """All probability on one token."""
    return torch.nn.functional.one_hot(tokens_M, vocab_size).float()


def entropy(p_MV: Tensor) -> Tensor:
    """Nats."""
    return torch.special.entr(p_MV).sum(dim=-1)
