"""Who gets a sub-task, and what a group of chains answers: Symphony's choice and vote, as pure functions.

    match of j with a requirement      φ_j = max over skills k of  sim(requirement, k) · capability(j, k)
    score                              s_j = φ_j (upper) · standing_j · availability_j
    executor                           argmax s_j, ties by price, then by id
    weight of chain i                  w_i = Π over its steps of  φ (mean) · standing  of who executed the step
    answer                             argmax_a Σ_i w_i · 1[a_i = a]

Deviations from arXiv 2508.20019: (1) the score is computed by the asker from what others attested, never by the
candidate; (2) load and price choose the executor and never weigh in a vote; (3) a chain weighs the product over its
steps and not their mean, because it is right only if each of them is: one liar among good executors spoils it. Where
few are free and a third lie, that is worth 1 to 3 points (docs/collective.md).

Invariants: equal inputs give equal results on every node, whatever their order; a chain that abstains or could not
finish adds nothing; a tie goes to the answer with more chains, then to the one with the heaviest single chain, then
to the one that sorts first, so that everybody breaks it alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from shoal.planning.skills import Tally

LEAST_SIMILARITY = 0.05
"""Skills that are less alike than this say nothing about a requirement."""

UNKNOWN_MATCH = 0.25
"""Of a requirement that is like nobody's skill: routing then goes by claims, standing and load."""


class Match(NamedTuple):
    """How well a node suits a requirement: 0 to 1."""

    mean: float
    upper: float


@dataclass(frozen=True)
class Candidate:
    """Who answered a beacon."""

    id: str
    key: bytes
    availability: float
    """0 to 1: the share of its time that it has."""
    price: float
    """US dollars for the sub-task."""
    claims: Mapping[str, float]
    """Skill -> what it says of itself; worth one trial each."""


class Chosen(NamedTuple):
    """A candidate with its score, the best first."""

    candidate: Candidate
    score: float
    match: Match
    standing: float


def match(tally: Tally, key: bytes, alike: Mapping[str, float], claims: Mapping[str, float]) -> Match:
    """How well a node suits a requirement.

    Args:
        alike: skill -> how like the requirement it is, 0 to 1.
        claims: skill -> what the node says of itself.
    """
    best = Match(0.0, 0.0)
    related = False
    for skill, similarity in alike.items():
        if similarity < LEAST_SIMILARITY:
            continue
        related = True
        found = tally.capability(key, skill, claims.get(skill))
        best = Match(max(best.mean, similarity * found.mean), max(best.upper, similarity * found.upper))
    return best if related else Match(UNKNOWN_MATCH, UNKNOWN_MATCH)


def rank(
    tally: Tally, candidates: Iterable[Candidate], requirement: str, similar: Callable[[str, str], float]
) -> list[Chosen]:
    """Candidates for a requirement, the best first; those that have no time at all are left out.

    Args:
        similar: how alike two texts are, 0 to 1.
    """
    offers = [one for one in candidates if one.availability > 0]
    skills = sorted({*tally.skills, *(skill for one in offers for skill in one.claims)})
    alike = {skill: min(max(similar(requirement, skill), 0.0), 1.0) for skill in skills}
    scored = []
    for one in offers:
        suits, standing = match(tally, one.key, alike, one.claims), tally.standing(one.key)
        scored.append(Chosen(one, suits.upper * standing * min(one.availability, 1.0), suits, standing))
    return sorted(scored, key=lambda one: (-one.score, one.candidate.price, one.candidate.id))


@dataclass(frozen=True)
class Ballot:
    """One chain's end."""

    chain: str
    """Id."""
    answer: str | None
    """Canonical; None abstains."""
    steps: Sequence[float]
    """φ (mean) times standing of each step's executor."""

    @property
    def weight(self) -> float:
        return prod(self.steps) if self.steps else 0.0


class Outcome(NamedTuple):
    """What the chains together say."""

    answer: str | None
    """None where every chain abstained."""
    support: float
    """Its share of all weight that was cast."""
    tally: Mapping[str, float]
    """Answer -> weight."""


def vote(ballots: Iterable[Ballot], *, weighted: bool = True) -> Outcome:
    """The answer with the most weight.

    Args:
        weighted: False counts each chain once: the majority, to compare with.
    """
    weights: dict[str, float] = defaultdict(float)
    chains: dict[str, list[float]] = defaultdict(list)
    for ballot in sorted(ballots, key=lambda one: one.chain):
        if ballot.answer is not None:
            weights[ballot.answer] += ballot.weight if weighted else 1.0
            chains[ballot.answer].append(ballot.weight if weighted else 1.0)
    if not weights:
        return Outcome(None, 0.0, {})
    best = min(weights, key=lambda answer: (-weights[answer], -len(chains[answer]), -max(chains[answer]), answer))
    cast = sum(weights.values())
    return Outcome(best, weights[best] / cast if cast else 0.0, dict(sorted(weights.items())))
