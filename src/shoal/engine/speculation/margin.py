"""Margin-aware acceptance (MARS, arXiv 2601.15498): give way only where the target hardly prefers its first choice.

1. The paper's ratio of logits, z2/z1 > θ, moves when a constant is added to all logits, which changes no probability.
   It is kept (`form = "logits"`, θ = 0.9), only where z1, z2 > 0, as else it says nothing; beside it stand two forms
   that do not move: `ratio`, p2/p1 > θ, and `difference`, z1 − z2 < θ (p2/p1 = e^(z2−z1), at temperature 1).
   At θ = 0.9 the paper's form accepts p2/p1 ≥ 0.61 for z1 = 5, and ≥ 0.018 for z1 = 40.
2. With temperature the paper leaves the residual open. Here: where the margin is small, a draft that is one of the
   target's two likeliest is accepted; everything else is strict, residual included.

z1 ≥ z2 are the target's two largest logits, of tokens t1 and t2, and s says whether the margin is small:

    a(y) = 1                       if y = t1 or y = t2, and s              greedy: also y = t1
           min(1, p(y)/q(y))       else                                    greedy: else 0
    r    ∝ max(p − q, 0)                                                    greedy: t1
    out(x) = min(p, q)(x) + [s, x ∈ {t1, t2}]·max(q − p, 0)(x) + (Σ_y max(p − q, 0) − [s]·Σ_{t1, t2} max(q − p, 0))·r(x)

so out = p wherever s is false or q does not exceed p on t1, t2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.engine.speculation.rules import Judgement, Positions
from shoal.engine.speculation.strict import Strict

MarginForm = Literal["logits", "ratio", "difference"]


@dataclass(frozen=True)
class Margin:
    """Relaxed where the target's top two are close.

    Args:
        theta: the threshold: of z2/z1 or p2/p1 a lower bound, of z1 − z2 an upper one, in nats.
        form: what is compared with it.
    """

    theta: float = 0.9
    form: MarginForm = "logits"

    name = "margin"
    lossy = True

    def judge(self, at: Positions) -> Judgement:
        strict = Strict().judge(at)
        top = at.logits_MV.topk(2, dim=-1)
        among_M = (top.indices == at.tokens_M[:, None]).any(dim=-1)
        relaxed_M = among_M & is_small(top.values, self.theta, self.form)
        return Judgement(torch.where(relaxed_M, 1.0, strict.accept_M), strict.residual_MV)


def is_small(top_M2: Tensor, theta: float, form: MarginForm) -> Tensor:
    """Whether the margin between the two largest logits [M, 2] is small, [M]."""
    z1_M, z2_M = top_M2.unbind(dim=-1)
    if form == "logits":
        return (z2_M > 0) & (z2_M > theta * z1_M)
    if form == "ratio":
        return (z2_M - z1_M).exp() > theta
    return z1_M - z2_M < theta
