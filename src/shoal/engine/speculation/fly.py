"""Deferred rejection (FLy, arXiv 2511.22972, with the settings of its vLLM version): a lone mismatch where the target
is in doubt is forgiven if the tokens after it fit. A lossy baseline.

1. The paper speaks of mismatches with the likeliest token. Here, and in vLLM, with temperature a mismatch is a token
   that strict refused.
2. Chains only: in a tree "the tokens after it" are not one sequence.

A refused token at position i is kept if the target's entropy over its k likeliest tokens (renormalised, k = 3) is at
least h, p(y_i) > 0, W more drafts follow it, and strict would have accepted each of them. Otherwise the round ends at i
with strict's residual. With e(y) the chance of being kept,

    a(y) = min(1, p/q) + (1 − min(1, p/q))·e(y)        r ∝ max(p − q, 0)

so out is q where e = 1, and p where e = 0: at the last W positions of a round, or where the target is sure.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shoal.engine.speculation.rules import Judgement, Positions, entropy
from shoal.engine.speculation.strict import Strict


@dataclass(frozen=True)
class Fly:
    """Strict, with rejections that wait for what follows.

    Args:
        window: W.
        entropy_nats: h.
        top_k: k.
    """

    window: int = 3
    entropy_nats: float = 0.3
    top_k: int = 3

    name = "fly"
    lossy = True

    def judge(self, at: Positions) -> Judgement:
        return Strict().judge(at)

    def may_wait(self, at: Positions) -> Tensor:
        """Whether a refusal here may be forgiven, as far as the position itself goes, [M]."""
        top_MK = at.soft_p_MV.topk(min(self.top_k, at.soft_p_MV.shape[-1]), dim=-1).values
        doubt_M = entropy(top_MK / top_MK.sum(dim=-1, keepdim=True))
        return (doubt_M >= self.entropy_nats) & (at.of_token(at.soft_p_MV) > 0)


def forgiven(refused: list[bool], may_wait: list[bool], window: int) -> list[bool]:
    """Which of a chain's refusals are kept, given strict's answers at all its positions.

    A refusal needs `window` positions after it, all accepted; two mismatches within a window forgive neither's first.
    """
    return [
        refused[i] and may_wait[i] and i + window < len(refused) and not any(refused[i + 1 : i + 1 + window])
        for i in range(len(refused))
    ]
