"""Typical acceptance (Medusa, arXiv 2401.10774, section 2.3.1): any token that is not too unlikely for how sure the
target is. A lossy baseline.

1. Medusa's first token of a round is always the target's own, so a round never stands still; here that is the token
   drawn behind the last accepted one.
2. With temperature 0 Medusa asks for the exact match. Here a greedy row also takes typical tokens, judged by the
   untempered distribution: otherwise the row would just be strict.

    a(y) = 1 if p(y) > min(ε, δ·e^(−H(p))) else 0        r = p        out(x) = q(x)·a(x) + (1 − Σ_y q(y)·a(y))·p(x)

so the output leans to the draft by up to the mass of what is typical. Greedy rows refuse with the likeliest token.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.engine.speculation.rules import Judgement, Positions, entropy


@dataclass(frozen=True)
class Typical:
    """Accepts what the target finds plausible.

    Args:
        epsilon: ε, no token above it is refused.
        delta: δ.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    name = "typical"
    lossy = True

    def judge(self, at: Positions) -> Judgement:
        threshold_M = (self.delta * (-entropy(at.soft_p_MV)).exp()).clamp(max=self.epsilon)
        likeliest_M = at.soft_p_MV.argmax(dim=-1) == at.tokens_M
        accepted_M = (at.of_token(at.soft_p_MV) > threshold_M) | likeliest_M
        return Judgement(accepted_M.float(), at.p_MV)
