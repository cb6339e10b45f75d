"""GSPO (arXiv 2507.18071, equations 5 and 7): GRPO with the ratio of the whole sequence.

    s_i(θ) = (π_θ(y_i | x) / μ(y_i | x))^(1/|y_i|) = exp( 1/|y_i| Σ_t log(π_θ(y_it) / μ(y_it)) )
    J(θ)   = E[ 1/G Σ_i min(s_i A_i, clip(s_i, 1 - ε_low, 1 + ε_high) A_i) ]

1. As in `losses.grpo`, the denominator is the behaviour policy μ unless `importance.type = "proximal"`.
2. |y_i| counts the trained tokens, so in an episode of several turns what the environment said is left out.
3. The 1/G Σ_i is the normalisation `grpo`; the others weigh a sequence by its tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.config.learner import GspoLoss
from shoal.learner.losses.common import LossOutput, TokenInputs, clipped_surrogate, importance, reduce


def sequence_mean(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Mean of `values` [N] over each sequence's tokens, [S]; 0 for a sequence without any."""
    total = values.new_zeros(num_sequences).index_add(0, sequence, values)
    count = values.new_zeros(num_sequences).index_add(0, sequence, torch.ones_like(values))
    return total / count.clamp(min=1)


def gspo_loss(inputs: TokenInputs, settings: GspoLoss, entropy: Tensor | None = None) -> LossOutput:
    """This micro-batch's share of the step's loss, -J. Each sequence must lie in it whole.

    `entropy` [N] goes into the statistics only.
    """
    log_ratio, tis_weight = importance(inputs, settings)
    ratio = torch.exp(sequence_mean(log_ratio, inputs.sequence, inputs.num_sequences))[inputs.sequence]
    losses, removed = clipped_surrogate(
        ratio, inputs.advantages, eps_low=settings.eps_low, eps_high=settings.eps_high, delta=settings.delta
    )
    return reduce(inputs, losses, removed, settings, tis_weight, entropy)
