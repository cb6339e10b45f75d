"""Semantic acceptance (DSD, arXiv 2511.11733): strict on tokens that matter, lenient on the others.

1. The paper's constants are not public: all are settings, found by calibration.
2. The paper leaves "disagree in distribution" open: here it is the total variation distance, ½ Σ|p − q|.
3. The paper is silent on greedy decoding. Here a greedy row decodes greedily from the same mixture that a sampled row
   draws from: it takes argmax m, with p and q untempered.

A token is *key* where target and draft disagree: |H(p) − H(q)| > δ_H, |max p − max q| > δ_1, or TV(p, q) > δ_d. Key
tokens have τ = 0. With the mixture m = (1 − τ)p + τq

    a(y) = min(1, m(y)/q(y))        r ∝ max(m − q, 0) = (1 − τ)·max(p − q, 0)        out = m

by the same line as in `strict`: so the output is off by exactly τ·(q − p), at most τ·δ_d in total variation.
A drafter without a distribution (prompt look-up) counts as certain: its q is a point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.engine.speculation.rules import Judgement, Positions, entropy, point


@dataclass(frozen=True)
class Semantic:
    """Lenient where target and draft agree about what kind of position it is.

    Args:
        tau: share of the draft's distribution where a token is not key.
        entropy_nats, top1, distance: δ_H, δ_1 and δ_d.
    """

    tau: float = 0.3
    entropy_nats: float = 1.0
    top1: float = 0.3
    distance: float = 0.5

    name = "semantic"
    lossy = True

    def is_key(self, p_MV: Tensor, q_MV: Tensor) -> Tensor:
        """Whether target and draft disagree, [M]."""
        return (
            ((entropy(p_MV) - entropy(q_MV)).abs() > self.entropy_nats)
            | ((p_MV.amax(dim=-1) - q_MV.amax(dim=-1)).abs() > self.top1)
            | (0.5 * (p_MV - q_MV).abs().sum(dim=-1) > self.distance)
        )

    def judge(self, at: Positions) -> Judgement:
        tau_M1 = torch.where(self.is_key(at.soft_p_MV, at.soft_q_MV), 0.0, self.tau)[:, None]
        m_MV = (1 - tau_M1) * at.p_MV + tau_M1 * at.q_MV
        soft_m_MV = (1 - tau_M1) * at.soft_p_MV + tau_M1 * at.soft_q_MV
        best_M = soft_m_MV.argmax(dim=-1)
        ratio_M = at.of_token(m_MV) / at.of_token(at.q_MV).clamp(min=torch.finfo(torch.float32).tiny)
        accept_M = torch.where(at.greedy_M, (best_M == at.tokens_M).float(), ratio_M.clamp(max=1.0))
        residual_MV = (m_MV - at.q_MV).clamp(min=0.0)
        return Judgement(accept_M, torch.where(at.greedy_M[:, None], point(best_M, residual_MV.shape[-1]), residual_MV))
