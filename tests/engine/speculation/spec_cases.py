"""What the tests of speculative decoding share."""

from __future__ import annotations

import torch
from torch import Tensor


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """p of Pearson's test; what is expected less than five times is counted together."""
    expected = probabilities.double() / probabilities.double().sum() * counts.sum()
    common = expected >= 5
    seen = torch.cat((counts[common], counts[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    seen, wanted = seen[wanted > 0].double(), wanted[wanted > 0]
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), statistic / 2))
