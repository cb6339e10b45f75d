"""What the sum over tokens is divided by, named as TRL names it; every denominator is that of the whole step.

    grpo     1 / (|o_i| · sequences)        mean over each sequence, then over sequences (DeepSeekMath)
    bnpo     1 / tokens                     mean over the tokens of the batch
    dapo     1 / tokens                     mean over the tokens of the step (DAPO)
    dr_grpo  1 / (sequences · constant)     sum over a constant length, free of length bias (Dr. GRPO)

1. TRL averages `grpo`, `bnpo` and `dr_grpo` over micro-batches, so there `bnpo` depends on how the step was cut. Here
   a micro-batch is chosen by memory, so `bnpo`'s batch is the whole step, and it equals `dapo`.

Invariant: the weights depend on the step, never on its micro-batches; so a step's losses and gradients are the same
however it is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.config.learner import Normalisation


@dataclass(frozen=True)
class Denominators:
    """Counts over the whole step. Groups skipped for want of advantage count: skipping changes time, not results."""

    sequences: int
    tokens: int
    constant_length: int
    """`dr_grpo` only: the token limit of a response."""


def token_weights(
    normalisation: Normalisation, lengths: NDArray[np.int64], denominators: Denominators
) -> NDArray[np.float64]:
    """One weight a token, [N].

    Args:
        normalisation: TRL's name.
        lengths: [N], for each token the number of trained tokens of its sequence.
        denominators: of the whole step.
    """
    if normalisation == "grpo":
        return np.asarray(1.0 / (lengths * float(denominators.sequences)), dtype=np.float64)
    if normalisation == "dr_grpo":
        assert denominators.constant_length > 0, "dr_grpo needs a constant length"
        return np.full(len(lengths), 1.0 / (denominators.sequences * float(denominators.constant_length)))
    return np.full(len(lengths), 1.0 / denominators.tokens)
