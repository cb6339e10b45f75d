"""How many tokens to draft, whether to draft at all, and how many rounds to have in flight.

Accept probabilities are by depth: α_i is the chance that the i-th draft of a row is accepted, given that all before it
were. A round with γ drafts then gives, with the token that the target adds itself,

    E(γ) = 1 + Σ_{i ≤ γ} Π_{j ≤ i} α_j          (Leviathan et al., 2211.17192, with α constant: (1 − α^(γ+1)) / (1 − α))

tokens, in `Ring.round_s(γ)` seconds. `Pacer` measures α and the times while decoding goes on and says γ for each row:
0 where speculation doesn't pay. All rows of a batch share a pass, which takes as long as its widest row: so the depth
is that with the most tokens of all rows together a second, and a row drafts less only where more would hardly count.

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

MEASUREMENTS = 2
"""Of a width, before it is believed."""

PROBE_SHARE = 0.01
"""Most of the time that probes may take while speculation is off."""

WORTH_DRAFTING = 0.05
"""A draft that is less likely than this to count is left out, though the pass has room for it."""


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
    """A batch that is off drafts one token again after so many rounds, lest it never learn that the text has changed;
    after more, where that would take over `PROBE_SHARE` of its time. A row that is off while others draft: after an
    eighth."""
    plain_every: int = 128
    """A batch that drafts does a plain step after so many rounds, lest it compare with a time that is no more."""


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
        # The first pass of a shape pays for its preparation, so the second may replace it.
        self._mean[tokens] = min(mean, seconds) if count == 2 else mean + (seconds - mean) / count

    def count(self, tokens: int) -> int:
        """Measurements, up to the memory."""
        return self._count.get(tokens, 0)

    def curve(self) -> Curve | None:
        """What was measured, more than once where anything was; nothing before the first measurement."""
        firm = {tokens: mean for tokens, mean in self._mean.items() if self._count[tokens] > 1}
        return Curve.measured(firm or self._mean) if self._mean else None


class _Size:
    """What is known of one batch size."""

    def __init__(self) -> None:
        self.verify, self.draft = Times(), Times()
        self.off = 0
        """Rounds since the last drafted one."""
        self.on = 0
        """Rounds since the last plain one."""

    @property
    def is_measured(self) -> bool:
        return min(self.verify.count(1), self.verify.count(2)) >= MEASUREMENTS


class Pacer:
    """Chooses γ for every row of a batch, from what its rounds brought and how long they took.

    Batch sizes are kept apart in powers of two: what a pass over more tokens costs depends on them most of all. A size
    that was never seen begins with two plain rounds and two of one draft; but where a smaller one did not pay, it only
    probes, since more rows make a pass dearer, not drafts better.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()
        self._shared = Estimate(self._settings)
        self._rows: dict[int, Estimate] = {}
        self._idle: dict[int, int] = {}
        self._sizes: dict[int, _Size] = {}
        self._delay, self._slowest = Times(), Times()

    def gammas(self, rows: Sequence[int], others: int = 0) -> list[int]:
        """Drafts for each row of the next round.

        Args:
            others: rows of the same passes that never draft.
        """
        size = self._size(len(rows) + others)
        if size.verify.count(1) < MEASUREMENTS:
            return [0] * len(rows)
        if not size.is_measured:
            due = not self._fails_below(len(rows) + others) or size.off >= self._settings.probe_every
            return [int(due)] * len(rows)
        ring = self._ring(size)
        width = self._width(rows, ring, others)
        if width == 0:
            extra = ring.round_s(1) / ring.plain_s() - 1
            return [int(size.off >= max(self._settings.probe_every, extra / PROBE_SHARE))] * len(rows)
        if size.on >= self._settings.plain_every:
            return [0] * len(rows)
        return [self._own(row, width) for row in rows]

    def frames(self, rows: int, gamma: int) -> int:
        """Rounds to have in flight together: 1 where no link delays an answer."""
        size = self._size(rows)
        if not gamma or not size.is_measured or not (delays := self._delay.curve()) or delays.at(0) <= 0:
            return 1
        slowest = self._slowest.curve()
        assert slowest is not None
        return frames_in_flight(self._shared.accept, self._ring(size), gamma, max(slowest.at(gamma + 1), 1e-6))

    def took(
        self,
        rows: Sequence[int],
        drafted: Sequence[int],
        accepted: Sequence[int],
        draft_s: float,
        verify_s: float,
        delay_s: float = 0.0,
        slowest_s: float = 0.0,
        others: int = 0,
    ) -> None:
        """A round's outcome and times.

        Args:
            verify_s: what was computed, summed over stages.
            delay_s: what the links took.
            slowest_s: the slowest stage's part of `verify_s`.
            others: rows of the same pass that never draft.
        """
        size, widest = self._size(len(rows) + others), max(drafted, default=0)
        size.verify.took(widest + 1, verify_s)
        if widest:
            size.draft.took(widest, draft_s)
        self._delay.took(0, delay_s)
        self._slowest.took(widest + 1, max(slowest_s, draft_s))
        size.off, size.on = (0, size.on + 1) if widest else (size.off + 1, 0)
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

    def _size(self, num_rows: int) -> _Size:
        return self._sizes.setdefault(max(0, num_rows - 1).bit_length(), _Size())

    def _ring(self, size: _Size) -> Ring:
        verify, draft, delay = size.verify.curve(), size.draft.curve(), self._delay.curve()
        assert verify is not None and draft is not None and delay is not None
        # Drafting nothing takes no time: so one measurement gives a line.
        return Ring(verify, Curve(((0, 0.0), *draft.points)), 1, delay.at(0))

    def _accept(self, row: int) -> list[float]:
        return (self._rows.get(row) or self._shared).accept

    def _width(self, rows: Sequence[int], ring: Ring, others: int = 0) -> int:
        """The depth with the most tokens of all rows a second."""
        totals = [float(others)] * (self._settings.most + 1)
        for row in rows:
            total = reached = 1.0
            totals[0] += total
            for depth, alpha in enumerate(self._accept(row), 1):
                reached *= alpha
                total += reached
                totals[depth] += total
        rates = [total / ring.round_s(gamma) for gamma, total in enumerate(totals)]
        best = max(range(len(rates)), key=lambda gamma: (rates[gamma], -gamma))
        return best if rates[best] >= self._settings.min_gain * rates[0] else 0

    def _own(self, row: int, width: int) -> int:
        """A row's depth in a pass so wide: as far as a draft counts with a chance worth having."""
        reached = 1.0
        for depth, alpha in enumerate(self._accept(row)[:width]):
            reached *= alpha
            if reached < WORTH_DRAFTING:
                return max(depth, int(self._idle.get(row, 0) * 8 >= self._settings.probe_every))
        return width

    def _fails_below(self, num_rows: int) -> bool:
        """Whether a smaller batch was measured, and the largest such does not pay."""
        own = max(0, num_rows - 1).bit_length()
        smaller = [bucket for bucket, size in self._sizes.items() if bucket < own and size.is_measured]
        return bool(smaller) and self._width((-1,), self._ring(self._sizes[max(smaller)])) == 0
