"""Is what a worker claims of its tokens what its policy, seed and temperature give? Numbers in, a reason out.

Three tests, all of the same teacher-forced pass over the claimed tokens (`learner/claims`), n tokens an episode:

    difference    d = mean |log μ_claimed − log π|          > a + b/√n    other log-probabilities than the policy's
    displacement  e = mean distance(u_k, [c_k, c_k + p_k))  > a' + b'/√n  other tokens than the seed draws
    surprise      z = Σ (log π + H) / √(Σ Var[log π])       |z| > Z_LIMIT over many episodes: another distribution

u_k is the k-th random number of the episode's leased seed, [c_k, c_k + p_k) the part of [0, 1) for which inverting the
cumulative distribution of π gives the claimed token: the sampler's own rule (`engine/sampling`). So `displacement` is a
full replay: it is zero exactly if a replay from the seed draws these tokens, and a token that rounding moved over an
edge costs only as much as it was moved. Two engines that round differently disagree by little in each of them; b/√n
leaves room for the chance that a short episode has few, bad tokens.

Invariants: pure; more of any number never turns a rejection into an acceptance; with nothing computed, nothing is
rejected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

Z_LIMIT = 6.0
"""Of the surprise test: it is looked at after every episode, and an honest worker passes a thousand million of them."""

LEAST_VARIANCE = 50.0
"""Nats²: below it the sum is of too few tokens to be near a normal distribution."""

FORGET_VARIANCE = 4000.0
"""Sums are halved beyond this, so that an honest past does not cover for what is done now."""


class Bound(NamedTuple):
    """How large a mean over n tokens may be."""

    base: float
    spread: float

    def at(self, tokens: int) -> float:
        return self.base + self.spread / math.sqrt(max(tokens, 1))


class Tolerance(NamedTuple):
    """What honest workers of one class differ from the learner by."""

    difference: Bound
    displacement: Bound

    def scaled(self, factor: float) -> Tolerance:
        """The same, wider by a factor."""
        return Tolerance(*(Bound(bound.base * factor, bound.spread * factor) for bound in self))


TOLERANCES: dict[tuple[str, str], Tolerance] = {
    ("cpu", "fp32"): Tolerance(Bound(1e-3, 5e-3), Bound(1e-3, 5e-3)),
    ("cpu", "bf16"): Tolerance(Bound(0.06, 0.45), Bound(0.01, 0.05)),
}
"""By device and number format; measured by `shoal bench trust -- --only honest embedded`, with room: in bf16 a prefill
and a decode of the embedded model differ by 0.04 on average."""

OTHER = Tolerance(Bound(0.12, 0.9), Bound(0.02, 0.1))
"""Of a class that was never measured (a GPU's kernels, another format): twice the widest that was."""


def tolerance_of(device: str, dtype: str) -> Tolerance:
    """What a worker on `device` (`cpu`, `cuda:0`) with weights in `dtype` is held to."""
    return TOLERANCES.get((device.partition(":")[0], dtype), OTHER)


def objection(tokens: int, difference: float, displacement: float, tolerance: Tolerance) -> str:
    """Why an episode cannot be what it claims, or an empty string."""
    if not tokens:
        return ""
    if difference > (most := tolerance.difference.at(tokens)):
        return f"its log-probabilities are {difference:.3g} from the policy's, more than {most:.3g}"
    if displacement > (most := tolerance.displacement.at(tokens)):
        return f"its seed draws other tokens: they lie {displacement:.3g} from where it points, more than {most:.3g}"
    return ""


@dataclass
class Surprise:
    """The third test's sums for one worker."""

    total: float = 0.0
    variance: float = 0.0

    def add(self, surprise: float, variance: float) -> None:
        """Take in one episode."""
        self.total += surprise
        self.variance += variance
        if self.variance > FORGET_VARIANCE:
            # Halving both keeps z/√2: half of the evidence is forgotten.
            self.total /= 2
            self.variance /= 2

    @property
    def z(self) -> float:
        """Standard deviations from what sampling from π gives; 0 while there is too little to say."""
        return self.total / math.sqrt(self.variance) if self.variance >= LEAST_VARIANCE else 0.0

    @property
    def objection(self) -> str:
        """Why these are not draws from the policy, or an empty string."""
        if abs(self.z) <= Z_LIMIT:
            return ""
        how = "likelier" if self.z > 0 else "less likely"
        return f"over many episodes its tokens are {how} than the policy's own by {abs(self.z):.1f} standard deviations"
