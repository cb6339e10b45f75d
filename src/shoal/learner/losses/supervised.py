"""Supervised fine-tuning: the negative log-likelihood of given tokens.

L = - Σ_t w_t log π(o_t | o_<t)        w_t = 1 / (trained tokens of the whole step)
"""

from __future__ import annotations

from torch import Tensor

from shoal.learner.losses.common import LossOutput, RatioStats


def supervised_loss(logprobs: Tensor, weights: Tensor, entropy: Tensor) -> LossOutput:
    """A micro-batch's share of the step's loss.

    Args:
        logprobs: log π of the given tokens, [N], with gradient.
        weights: from `normalisation.token_weights`, [N].
        entropy: of each distribution, [N], without gradient.
    """
    loss = -(weights * logprobs).sum()
    return LossOutput(loss, RatioStats(tokens=len(logprobs), entropy_sum=float(entropy.sum())))
