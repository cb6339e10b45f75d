"""How one memory's weight follows what it was worth: arithmetic on a few numbers, no storage and no clock.

Deviations from the paper:
1. Its formula takes beta * f_use away for use, its prose lets disuse decay. Both are here: the term is a cost of
   over-use, and a separate decay by age covers disuse.
2. "Repeated" gain and loss are not streaks, which good entries meet by chance on noisy rewards, but tests that
   restart (e-detectors, Shin, Ramdas and Rinaldo, arXiv 2203.03532). With utility u in [-1, 1]:

        loss <- max(loss, 0) + ln(1 - STAKE u),      gain <- max(gain, 0) + ln(1 + STAKE u)

   Under E[u] >= 0 the mean number of uses before exp(loss) reaches c is at least c.

    w <- w + alpha * U - beta * f_use, held to 0..1;     U: mean utility of about the last `HORIZON` uses

A memory that loses all (u = -1) is demoted after 11 uses at the latest, one that loses half (u = -1/2) after 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ALPHA = 0.05
BETA = 0.01
HORIZON = 32
STAKE = 0.5
"""Share that the detectors bet on each use."""

CUT_AT = math.log(8)
CUT = 0.7
"""From this much evidence of harm on, each further loss multiplies the weight by `CUT`."""

FLOOR = 0.02
"""A weight that cuts have brought below this is as good as none: the memory is demoted."""

DEMOTE_AT = math.log(1e3)
REMOVE_AT = math.log(1e6)
PROMOTE_AT = math.log(100)
"""Evidence of gain at which the weight goes half of the way to 1, and the detector starts again."""

HALF_LIFE_S = 30 * 86400.0
"""A memory that nobody uses loses half of its weight in this time."""

RULES = "2"
"""Changes with any constant above and with what a memory holds: stores that fold by other rules are not merged."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What use has made of a memory."""

    weight: float
    utility: float = 0.0
    uses: int = 0
    loss: float = 0.0
    gain: float = 0.0


Fate = Literal["stays", "demoted", "removed"]


def evolve(standing: Standing, utility: float, share: float) -> tuple[Standing, Fate]:
    """After one use: the new standing, and whether the memory keeps its place.

    Args:
        utility: of this use, in [-1, 1].
        share: f_use, in [0, 1].
    """
    uses = standing.uses + 1
    mean = standing.utility + (utility - standing.utility) / min(uses, HORIZON)
    weight = standing.weight + ALPHA * mean - BETA * share
    loss = max(standing.loss, 0.0) + math.log1p(-STAKE * utility)
    gain = max(standing.gain, 0.0) + math.log1p(STAKE * utility)
    harmed = loss >= CUT_AT and utility < 0
    if harmed:
        weight *= CUT
    if gain >= PROMOTE_AT:
        weight, gain = weight + (1 - weight) / 2, 0.0
    fate: Fate = (
        "removed" if loss >= REMOVE_AT else "demoted" if loss >= DEMOTE_AT or (harmed and weight < FLOOR) else "stays"
    )
    return Standing(min(1.0, max(0.0, weight)), mean, uses, loss, gain), fate


def aged(weight: float, idle_s: float) -> float:
    """The weight after `idle_s` seconds without use."""
    return weight * math.exp2(-max(0.0, idle_s) / HALF_LIFE_S)
