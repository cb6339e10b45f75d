"""Strict acceptance: speculative sampling as Leviathan et al. (2211.17192) and Chen et al. (2302.01318) proved it.

    a(y) = min(1, p(y) / q(y))        r ∝ max(p − q, 0)        out = p

Proof in one line: q·a = min(p, q), so 1 − Σ q·a = Σ max(p − q, 0), and min(p, q) + max(p − q, 0) = p. Greedy rows,
where p and q are points, accept exactly the target's likeliest token. For siblings that are a deterministic choice (q
a point) the second is judged with r, which is p without the first: recursive rejection, lossless for the same reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.engine.speculation.rules import Judgement, Positions


@dataclass(frozen=True)
class Strict:
    """The output's distribution is the target's."""

    name = "strict"
    lossy = False

    def judge(self, at: Positions) -> Judgement:
        ratio_M = at.of_token(at.p_MV) / at.of_token(at.q_MV).clamp(min=torch.finfo(torch.float32).tiny)
        return Judgement(ratio_M.clamp(max=1.0), (at.p_MV - at.q_MV).clamp(min=0.0))
