"""What nodes are good at, from what others saw: estimates that a minority of liars cannot bend far. Pure.

    consensus without a    m = (1 + Σ_b w_b·c_b·S_b) / (2 + Σ_b w_b·c_b·n_b), b ≠ a;   S = Σ scores, n = trials
    surprise at a          D_a = Σ_jk c_a·[ −S_a·ln m − (n_a − S_a)·ln(1 − m) − n_a·H(m) ], what its scores cost
                                 beyond what chance makes them cost
    trust in a             w_a = exp(−(D_a − σ_a)⁺ / (N_a + FIRM) / SCALE),   `ROUNDS` times from w = 1,
                                 σ_a² = Σ_jk c_a·n_a·m(1−m)·ln²(m / (1−m)),   N_a = Σ_jk c_a·n_a
    capability of (j, k)   α = α₀ + Σ_a w_a·c_a·S_a,  β = β₀ + Σ_a w_a·c_a·(n_a − S_a),  c_a = min(1, CAP / n_a);
                           mean = α/(α+β), upper = mean + κ·(standard deviation of that Beta)
    standing of j          (g + Σ delivered) / (g + Σ all), each by the asker's trust w_a, capped likewise

A claim is worth `CLAIM` trials and no more, so that a newcomer's claim decides between newcomers. Routing uses `upper`
(an upper confidence bound, as in UCB1 and its kin): who was seldom tried is tried; votes use `mean`.

Symphony (arXiv 2508.20019) takes capability vectors as nodes state them. Ours are attested, because a liar would state
ones; trust and caps are ours, after Dawid and Skene's way to find raters that disagree (Applied Statistics 28, 1979).
Colluders who attest each other are outweighed while honest attesters of each skill are the majority by capped trials;
beyond that nothing here helps. An attester whose tasks are much harder than the others' looks like a liar.

Invariants: a signer never counts for itself; one attester counts at most `CAP` trials for one subject and skill,
however much it writes; one step of one chain is delivered once, whatever its signer says; all results lie between 0
and 1; the order of signers does not matter (each one's entries come in their own).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from shoal.protocol.ledger import Attestation, Contribution, LedgerEntry

CAP = 12.0
"""Trials of one attester about one subject and skill that count."""

SCALE = 0.2
"""Nats of surprise a trial that cost an attester e times its weight."""

FIRM = 4.0
"""Trials without surprise that every attester is credited with."""

ROUNDS = 4

CLAIM = 1.0
PRIOR = 1.0
"""α₀ = β₀."""

CURIOSITY = 1.0
"""κ."""

GIVEN = 4.0
"""g: deliveries that everybody is credited with."""


class Trials(NamedTuple):
    """One attester's about one subject and skill."""

    num: float = 0.0
    total: float = 0.0
    """Sum of scores."""

    @property
    def capped(self) -> float:
        """The share of these trials that counts."""
        return min(1.0, CAP / self.num) if self.num else 0.0


class Capability(NamedTuple):
    """How well a node does what a skill names: between 0 and 1."""

    mean: float
    upper: float
    """What it may be worth: for choosing whom to try."""
    trials: float
    """That count behind it."""


@dataclass
class Tally:
    """The ledger's entries, counted. Update it with `add`, then ask."""

    trials: dict[tuple[bytes, str], dict[bytes, Trials]] = field(default_factory=lambda: defaultdict(dict))
    """(subject, skill) -> attester -> trials."""
    deliveries: dict[bytes, dict[bytes, tuple[float, float]]] = field(default_factory=lambda: defaultdict(dict))
    """subject -> asker -> (delivered, all)."""
    delivered: set[tuple[bytes, str, int]] = field(default_factory=set)
    """(asker, chain, step) of what was delivered."""
    _trust: dict[bytes, float] | None = None

    def add(self, signer: bytes, entry: LedgerEntry) -> None:
        """Count one entry."""
        if signer == entry.subject:
            return
        self._trust = None
        what = entry.what
        if isinstance(what, Attestation):
            of = self.trials[entry.subject, what.skill]
            before = of.get(signer, Trials())
            of[signer] = Trials(before.num + 1, before.total + what.score)
        elif isinstance(what, Contribution):
            if what.delivery == "delivered" and what.chain:
                if (signer, what.chain, what.step) in self.delivered:
                    return
                self.delivered.add((signer, what.chain, what.step))
            good, every = self.deliveries[entry.subject].get(signer, (0.0, 0.0))
            worth = 0.0 if what.delivery != "delivered" else 1.0 if what.verified is None else what.verified
            self.deliveries[entry.subject][signer] = (good + worth, every + 1)

    @property
    def skills(self) -> list[str]:
        """All that anybody attested."""
        return sorted({skill for _, skill in self.trials})

    def trust(self) -> Mapping[bytes, float]:
        """How far each attester's word goes, 0 to 1."""
        if self._trust is None:
            weights: dict[bytes, float] = dict.fromkeys((a for of in self.trials.values() for a in of), 1.0)
            for _ in range(ROUNDS):
                weights = self._judged(weights)
            self._trust = weights
        return self._trust

    def _judged(self, weights: Mapping[bytes, float]) -> dict[bytes, float]:
        """One round: every attester against what the others, so weighted, say."""
        surprise, noise, trials = (dict.fromkeys(weights, 0.0) for _ in range(3))
        for of in self.trials.values():
            counted = {attester: weights[attester] * seen.capped for attester, seen in of.items()}
            total = sum(counted[attester] * seen.total for attester, seen in of.items())
            num = sum(counted[attester] * seen.num for attester, seen in of.items())
            for attester, seen in of.items():
                own = counted[attester]
                middle = (1.0 + total - own * seen.total) / (2.0 + num - own * seen.num)
                odds = math.log(middle / (1.0 - middle))
                # −S·ln m − (n − S)·ln(1 − m) − n·H(m) = (n·m − S)·ln(m / (1 − m))
                surprise[attester] += seen.capped * (seen.num * middle - seen.total) * odds
                noise[attester] += seen.capped * seen.num * middle * (1.0 - middle) * odds * odds
                trials[attester] += seen.capped * seen.num
        return {
            attester: math.exp(
                -max(0.0, surprise[attester] - math.sqrt(noise[attester])) / (trials[attester] + FIRM) / SCALE
            )
            for attester in weights
        }

    def capability(self, subject: bytes, skill: str, claim: float | None = None) -> Capability:
        """How well `subject` does what `skill` names.

        Args:
            claim: what it says of itself, 0 to 1; None where it says nothing.
        """
        trust = self.trust()
        alpha = beta = PRIOR
        if claim is not None:
            alpha, beta = alpha + CLAIM * min(max(claim, 0.0), 1.0), beta + CLAIM * (1.0 - min(max(claim, 0.0), 1.0))
        counted = 0.0
        for attester, seen in self.trials.get((subject, skill), {}).items():
            weight = trust.get(attester, 1.0) * seen.capped
            alpha += weight * seen.total
            beta += weight * (seen.num - seen.total)
            counted += weight * seen.num
        both = alpha + beta
        mean = alpha / both
        spread = math.sqrt(alpha * beta / (both * both * (both + 1.0)))
        return Capability(mean, min(1.0, mean + CURIOSITY * spread), counted)

    def standing(self, subject: bytes) -> float:
        """The share of what it took on that it delivered, 0 to 1; 1 for a newcomer."""
        trust = self.trust()
        good, every = GIVEN, GIVEN
        for asker, (delivered, taken) in self.deliveries.get(subject, {}).items():
            weight = trust.get(asker, 1.0) * min(1.0, CAP / taken)
            good += weight * delivered
            every += weight * taken
        return good / every


def tally(entries: Iterable[tuple[bytes, LedgerEntry]]) -> Tally:
    """Count all entries of a ledger: (signer, entry)."""
    found = Tally()
    for signer, entry in entries:
        found.add(signer, entry)
    return found
