"""How many tokens to draft, whether to draft at all, and how many rounds to have in flight.

Accept probabilities are by depth: α_i is the chance that the i-th draft of a row is accepted, given that all before it
were. A round with γ drafts then gives, with the token that the target adds itself,

    E(γ) = 1 + Σ_{i ≤ γ} Π_{j ≤ i} α_j          (Leviathan et al., 2211.17192, with α constant: (1 − α^(γ+1)) / (1 − α))

tokens, in `Ring.round_s(γ)` seconds. `Pacer` measures α and the times while decoding goes on and says γ for each row:
0 where speculation doesn't pay.

Invariants: the chosen γ maximises expected tokens a second under what was measured (the smallest of equals), and plain
steps are among what it is chosen from; no clock and no randomness here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.planning.rounds import Curve, Ring

MAX_GAMMA = 16
"""Longest chain that is ever considered."""

MAX_FRAMES = 64
"""Most rounds of one sequence in flight that are ever considered."""

WORTH_SENDING = 0.1
"""A frame that is less likely than this to count only keeps stages from work that does."""

MIN_GAIN = 1.03
"""Speculation must promise this much to be switched on, since what is measured is never exact."""


def expected_tokens(accept: Sequence[float], gamma: int) -> float:
    """E(γ); depths that were never measured are taken to be like the last that was."""
    total = reached = 1.0
    for depth in range(gamma):
        reached *= accept[min(depth, len(accept) - 1)]
        total += reached
    return total


def rate(accept: Sequence[float], ring: Ring, gamma: int) -> float:
    """Expected tokens a second of one sequence whose rounds have γ drafts."""
    return expected_tokens(accept, gamma) / ring.round_s(gamma)


def best_gamma(accept: Sequence[float], ring: Ring, most: int = MAX_GAMMA, min_gain: float = 1.0) -> int:
    """The γ from 0 to `most` with the highest rate, the smallest of equals.

    Args:
        min_gain: how many times the plain rate it must have; else 0.
    """
    best = max(range(most + 1), key=lambda gamma: (rate(accept, ring, gamma), -gamma))
    return best if rate(accept, ring, best) >= min_gain * rate(accept, ring, 0) else 0


def frames_in_flight(
    accept: Sequence[float],
    ring: Ring,
    gamma: int,
    bottleneck_s: float,
    most: int = MAX_FRAMES,
    worth: float = WORTH_SENDING,
) -> int:
    """How many rounds of one sequence to have under way at once, drafting on before verification has answered.

    Round f + 1 builds on the guess that round f is accepted whole and that the drafter also knew the token that the
    target adds: P = Π_{i ≤ γ+1} α_i. So of F rounds in flight the expected tokens are E·(1 + P + … + P^(F−1)), in the
    time of one round or, once the ring is full, of the F rounds in its slowest part (a stage, or the drafter):

        rate(F) = E(γ) · (1 − P^F) / (1 − P) / max(round, F · bottleneck)

    The best F is where one more no longer raises that. In a pipe with room to spare that would be every frame that
    might count, so a frame whose chance P^f is below `worth` is not sent either: the accept rate bounds what is in
    flight, not the room.

    Args:
        bottleneck_s: the longest time that one round takes in any single stage or in the drafter.
        worth: the least chance to count with which a frame is sent.
    """
    assert gamma >= 1 and bottleneck_s > 0
    survives = 1.0
    for depth in range(gamma + 1):
        survives *= accept[min(depth, len(accept) - 1)]
    each, total, best, best_rate = 1.0, 0.0, 1, 0.0
    for frames in range(1, most + 1):
        if frames > 1 and each < worth:
            break
        total += each
        each *= survives
        now = total / max(ring.round_s(gamma), frames * bottleneck_s)
        if now > best_rate * (1 + 1e-9):
            best, best_rate = frames, now
    return best


@dataclass(frozen=True)
class Settings:
    """How a pacer behaves."""

    most: int = 8
    """Longest chain."""
    memory: int = 64
    """Drafts that an accept probability is averaged over."""
    prior_accept: float = 0.7
    """Believed before anything was measured …"""
    prior_weight: float = 4.0
    """… with the weight of so many drafts."""
    min_gain: float = MIN_GAIN
    probe_every: int = 64
    """A row that is off drafts one token again after so many rounds, lest it never learn that the text has changed."""


class Estimate:
    """α by depth, of one row or of many: counts that fade, so that the last `memory` drafts weigh most."""

    def __init__(self, settings: Settings) -> None:
        self._fade = 1 - 1 / settings.memory
        self._prior = settings.prior_accept, settings.prior_weight
        self._accepted = [0.0] * settings.most
        self._tried = [0.0] * settings.most

    def took(self, drafted: int, accepted: int) -> None:
        """One round's outcome: depths 1 … accepted were right, the next (if it was drafted) wrong."""
        for depth in range(min(drafted, accepted + 1, len(self._tried))):
            self._accepted[depth] = self._accepted[depth] * self._fade + (depth < accepted)
            self._tried[depth] = self._tried[depth] * self._fade + 1

    @property
    def accept(self) -> list[float]:
        """α_1 …; a depth that was seldom tried leans to the one before it, the first to the prior."""
        found = []
        lean, weight = self._prior
        for accepted, tried in zip(self._accepted, self._tried, strict=True):
            lean = (accepted + weight * lean) / (tried + weight)
            found.append(lean)
        return found


class Times:
    """Measured seconds by tokens a row, averaged with fading; for any one batch size."""

    def __init__(self, memory: int = 16) -> None:
        self._memory = memory
        self._mean: dict[int, float] = {}
        self._count: dict[int, int] = {}

    def took(self, tokens: int, seconds: float) -> None:
        count = self._count[tokens] = min(self._memory, self._count.get(tokens, 0) + 1)
        mean = self._mean.get(tokens, 0.0)
        self._mean[tokens] = mean + (seconds - mean) / count

    def curve(self) -> Curve | None:
        """What was measured; nothing before the first measurement."""
        return Curve.measured(self._mean) if self._mean else None


class Pacer:
    """Chooses γ for every row of a batch, from what its rounds brought and how long they took.

    A batch's pass takes as long as its widest row, so all rows that draft share one γ's time; a row whose own accept
    rate does not earn even that drafts nothing. Batch sizes are kept apart in powers of two: what a pass over more
    tokens costs depends on them most of all.

    Args:
        num_links, link_s: of the ring the target is on; none on one machine.
    """

    def __init__(self, settings: Settings | None = None, *, num_links: int = 0, link_s: float = 0.0) -> None:
        self._settings = settings or Settings()
        self._links = num_links, link_s
        self._shared = Estimate(self._settings)
        self._rows: dict[int, Estimate] = {}
        self._idle: dict[int, int] = {}
        self._verify: dict[int, Times] = {}
        self._draft: dict[int, Times] = {}

    def gammas(self, rows: Sequence[int]) -> list[int]:
        """Drafts for each row of the next round."""
        most, ring = self._settings.most, self._ring(len(rows))
        if ring is None:
            # The first two rounds of a batch size measure a plain pass, and a drafted one.
            return [0 if self._bucket(len(rows)) not in self._verify else most] * len(rows)
        found = []
        for row in rows:
            accept = self._rows[row].accept if row in self._rows else self._shared.accept
            gamma = best_gamma(accept, ring, most, self._settings.min_gain)
            idle = self._idle.get(row, 0)
            found.append(1 if gamma == 0 and idle >= self._settings.probe_every else gamma)
        return found

    def took(
        self, rows: Sequence[int], drafted: Sequence[int], accepted: Sequence[int], draft_s: float, verify_s: float
    ) -> None:
        """A round's outcome and times (the links' delay left out)."""
        bucket, widest = self._bucket(len(rows)), max(drafted, default=0)
        self._verify.setdefault(bucket, Times()).took(widest + 1, verify_s)
        if widest:
            self._draft.setdefault(bucket, Times()).took(widest, draft_s)
        for row, tried, right in zip(rows, drafted, accepted, strict=True):
            self._idle[row] = 0 if tried else self._idle.get(row, 0) + 1
            if tried:
                self._rows.setdefault(row, Estimate(self._settings)).took(tried, right)
                self._shared.took(tried, right)

    def ended(self, row: int) -> None:
        """Forget a sequence; what all rows together have shown stays."""
        self._rows.pop(row, None)
        self._idle.pop(row, None)

    @property
    def accept(self) -> list[float]:
        """α by depth over all rows."""
        return self._shared.accept

    def _ring(self, num_rows: int) -> Ring | None:
        """As measured at this batch size; none before plain and drafted passes have been."""
        bucket = self._bucket(num_rows)
        draft = self._draft[bucket].curve() if bucket in self._draft else None
        verify = self._verify[bucket].curve() if bucket in self._verify else None
        if draft is None or verify is None or verify.points[0][0] > 1:
            return None
        # Drafting nothing takes no time: so one measurement gives a line.
        return Ring(verify, Curve(((0, 0.0), *draft.points)), *self._links)

    @staticmethod
    def _bucket(num_rows: int) -> int:
        return max(0, num_rows - 1).bit_length()
