"""What a worker's record entitles it to: how much of it is checked, whether before it counts, whether it works at all.

    probation ── `probation` episodes passed ──▶ trusted ── suspicion ≥ 1 ──▶ probation again
        └──────────────────── suspicion ≥ `EXCLUDE_AT` ──▶ excluded ── its time is over ──▶ probation

A worker on probation has every episode checked, and nothing of it counts before. Of a trusted one groups are drawn at
random, and count at once. Each failed check adds 1 to its suspicion; each passed episode takes `EASE` of it away, so
an honest worker that is rejected once in a thousand episodes never comes near exclusion, and one that lies in a tenth
of its checked episodes settles at 0.1 / `EASE` = 5. Each exclusion is twice as long as the one before, up to a day;
an hour of good work halves the count again.

Why drawing at random is enough: a lie that is checked with probability q and costs an exclusion pays only if it gains
more than q / (1 − q) times what the exclusion costs (`rate_that_deters`).

Invariants: pure, time is an argument; suspicion is never negative and falls only by passed episodes; what is excluded
gets work again, on probation; whatever happens, the share that is checked is at least `sample`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["probation", "trusted", "excluded"]

EASE = 0.02
"""Share of the suspicion that one passed episode takes away."""

SUSPECT_AT = 1.0
EXCLUDE_AT = 3.0

FIRST_EXCLUSION_S = 600.0
LONGEST_EXCLUSION_S = 86_400.0
FORGIVEN_AFTER_S = 3600.0
"""Of good work: the number of exclusions that count is lowered by one."""


def rate_that_deters(gain: float, penalty: float) -> float:
    """The least share of episodes to check, so that lying in one of them does not pay.

    Args:
        gain: what one lie saves the liar, in any unit (its price of drawing an episode).
        penalty: what being caught costs it: unpaid probation and the exclusion's lost pay, in the same unit.
    """
    # Honest gains nothing, lying (1 − q)·gain − q·penalty: not positive from q = gain / (gain + penalty) on.
    return gain / (gain + penalty) if gain > 0 else 0.0


@dataclass
class Standing:
    """One worker's.

    Args:
        probation: episodes to pass before it is trusted.
        sample: share of a trusted worker's groups that is checked.
    """

    probation: int
    sample: float
    passed: int = 0
    """Episodes passed in this probation."""
    suspicion: float = 0.0
    exclusions: int = 0
    excluded_until: float | None = None
    good_since: float = 0.0

    def state(self, now: float) -> State:
        """What it is now; an exclusion that is over makes it a probation."""
        if self.excluded_until is not None and now >= self.excluded_until:
            self.excluded_until, self.passed, self.suspicion, self.good_since = None, 0, 0.0, now
        if self.excluded_until is not None:
            return "excluded"
        return "trusted" if self.passed >= self.probation and self.suspicion < SUSPECT_AT else "probation"

    def share(self, now: float) -> float:
        """The share of its groups to check: all on probation, more than `sample` where something was found lately."""
        if self.state(now) != "trusted":
            return 1.0
        return self.sample + (1 - self.sample) * self.suspicion / SUSPECT_AT

    def pass_(self, episodes: int, now: float) -> None:
        """So many checked episodes were what they claimed."""
        self.passed += episodes
        self.suspicion *= (1 - EASE) ** episodes
        if self.exclusions and now - self.good_since >= FORGIVEN_AFTER_S:
            self.exclusions, self.good_since = self.exclusions - 1, now

    def fail(self, now: float, weight: float = 1.0) -> bool:
        """A check failed; whether that excludes it now."""
        if self.state(now) == "excluded":
            return False
        self.suspicion += weight
        self.good_since = now
        if self.suspicion < SUSPECT_AT:
            return False
        self.passed = 0
        if self.suspicion < EXCLUDE_AT:
            return False
        self.excluded_until = now + min(FIRST_EXCLUSION_S * 2**self.exclusions, LONGEST_EXCLUSION_S)
        self.exclusions += 1
        return True
