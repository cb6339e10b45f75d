"""GRPO (DeepSeekMath, arXiv 2402.03300, equation 3), with DAPO's asymmetric clip (arXiv 2503.14476).

    J(θ) = E[ Σ_i Σ_t w_it ( min(ρ_it A_i, clip(ρ_it, 1 - ε_low, 1 + ε_high) A_i) - β KL_it(π_θ || ref) ) ]
    ρ_it = π_θ(o_it | q, o_i<t) / μ(o_it | q, o_i<t)

1. The paper's denominator is the policy before the update; here it is the behaviour policy μ, whose log-probabilities
   were recorded when the tokens were drawn, because rollouts come from other processes and may be several versions
   old. `importance.type = "proximal"` gives the paper's ratio, with min(π_prox/μ, C) as a weight.
2. w_it is 1 / (|o_i| · number of sequences) in the paper; `normalisation` chooses (see `losses.normalisation`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.config.learner import GrpoLoss
from shoal.learner.losses.common import LossOutput, TokenInputs, clipped_surrogate, importance, reduce


def grpo_loss(inputs: TokenInputs, settings: GrpoLoss, entropy: Tensor | None = None) -> LossOutput:
    """This micro-batch's share of the step's loss, -J; `entropy` [N] goes into the statistics only."""
    log_ratio, tis_weight = importance(inputs, settings)
    losses, removed = clipped_surrogate(
        torch.exp(log_ratio),
        inputs.advantages,
        eps_low=settings.eps_low,
        eps_high=settings.eps_high,
        delta=settings.delta,
    )
    return reduce(inputs, losses, removed, settings, tis_weight, entropy)
