"""How sure a gain is: a confidence interval for two accuracies measured on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist


def paired_interval(before: Sequence[bool], after: Sequence[bool], confidence: float = 0.95) -> tuple[float, float]:
    """The confidence interval of `mean(after) - mean(before)`, as fractions, question by question paired.

    Newcombe's score interval for paired proportions (Statistics in Medicine 17, 1998, method 10): unlike the normal
    approximation it stays within -1..1 and does not shrink to a point where all questions agree.

    Raises:
        ValueError: the two lists differ in length or are empty.
    """
    n = len(before)
    if n == 0 or n != len(after):
        raise ValueError(f"paired lists of {n} and {len(after)} results")
    both = sum(b and a for b, a in zip(before, after, strict=True))
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    won = sum(a and not b for b, a in zip(before, after, strict=True))
    neither = n - both - lost - won
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p_after, p_before = (both + won) / n, (both + lost) / n
    low_after, high_after = _wilson(p_after, n, z)
    low_before, high_before = _wilson(p_before, n, z)

    margins = (both + won) * (lost + neither) * (both + lost) * (won + neither)
    agreement = float(both * neither - won * lost)
    if agreement > 0:  # the continuity correction that Newcombe applies to a positive association
        agreement = max(agreement - n / 2, 0)
    phi = agreement / sqrt(margins) if margins else 0.0

    def half_width(d_after: float, d_before: float) -> float:
        return sqrt(max(d_after**2 - 2 * phi * d_after * d_before + d_before**2, 0.0))

    gain = p_after - p_before
    below = half_width(p_after - low_after, high_before - p_before)
    above = half_width(high_after - p_after, p_before - low_before)
    return max(-1.0, gain - below), min(1.0, gain + above)


def interval(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share seen in `n` independent cases (Wilson 1927), as fractions."""
    return _wilson(share, n, NormalDist().inv_cdf((1 + confidence) / 2))


def _wilson(p: float, n: int, z: float) -> tuple[float, float]:
    centre = p + z * z / (2 * n)
    spread = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
