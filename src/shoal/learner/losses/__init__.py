"""Policy-gradient losses: pure functions of per-token tensors, one paper a module.

All of them take the trained tokens of one micro-batch as flat vectors (one entry a token, no padding: what is masked
is simply absent) and per-token weights that already hold the normalisation of the *whole* step
(`normalisation.token_weights`). So the losses of a step's micro-batches add up to the loss of the step, however it
was cut. `common` holds what they share: the inputs, the clipped surrogate, the KL penalty and the raw statistics.
"""

from shoal.learner.losses.common import LossOutput, RatioStats, TokenInputs
from shoal.learner.losses.grpo import grpo_loss
from shoal.learner.losses.gspo import gspo_loss
from shoal.learner.losses.normalisation import token_weights

__all__ = ["LossOutput", "RatioStats", "TokenInputs", "grpo_loss", "gspo_loss", "token_weights"]
