"""Liars in a collective: does the weighted vote beat the majority when nobody says who lies?

Sixteen nodes hold one ledger (the real one: signed, chained entries) and solve problems of two steps, each by five
chains. *Scripted here*: the experts (right with a known probability a skill), who is free at a time, and the liars,
who answer wrongly, claim to be perfect, praise each other and blame all others in what they attest; `colluding` ones
give one common wrong answer, `random` ones any. *Ours as it runs*: the ledger, estimates, choice and vote. Nobody but
the script knows who lies; what the nodes learn comes from calibration tasks that they set each other.
"""

from __future__ import annotations

from random import Random
from typing import Any

from shoal.coordinator.reporting.paired import paired_interval
from shoal.fabric.identity import Identity
from shoal.planning.selection import Ballot, Candidate, rank, vote
from shoal.planning.skills import Tally
from shoal.protocol.episode import Task
from shoal.protocol.ledger import Attestation
from shoal.swarm.ledger import Ledger

NODES = 16
SKILLS = ("arithmetic", "history", "law", "chemistry")
EXPERT, LAYMAN = 0.92, 0.45
"""How often an honest node is right in its one or two skills, and in the others."""
CHAINS = 5
STEPS = 2
FREE = 0.5
"""Share of nodes that answer a beacon."""
OPTIONS = 10
"""Possible answers."""
BATCH = 10
"""After so many problems the nodes set each other as many calibration tasks."""


class Collective:
    """The nodes, what the script knows of them, and the ledger that they share."""

    def __init__(self, liars: int, colluding: bool, draw: Random) -> None:
        self.draw = draw
        self.colluding = colluding
        self.nodes = [Identity(draw.randbytes(32)) for _ in range(NODES)]
        self.keys = [node.public_key for node in self.nodes]
        self.liars = set(draw.sample(range(NODES), liars))
        self.accuracy = [self._accuracy(number) for number in range(NODES)]
        self.ledger = Ledger("bench", lambda key: key in self.keys)
        self.tally = Tally()

    def _accuracy(self, number: int) -> dict[str, float]:
        if number in self.liars:
            return dict.fromkeys(SKILLS, 1 / OPTIONS)
        strong = self.draw.sample(SKILLS, self.draw.randint(1, 2))
        return {skill: EXPERT if skill in strong else LAYMAN for skill in SKILLS}

    def claims(self, number: int) -> dict[str, float]:
        return dict.fromkeys(SKILLS, 1.0) if number in self.liars else self.accuracy[number]

    def calibrate(self, count: int) -> None:
        """One node sets another a task whose answer it knows, and attests how that went."""
        attester, subject = self.draw.sample(range(NODES), 2)
        skill = self.draw.choice(SKILLS)
        score = float(self.draw.random() < self.accuracy[subject][skill])
        if attester in self.liars:
            score = float(subject in self.liars)
        what = Attestation(skill=skill, task=Task(env="calibration", id=skill, seed=count), answer="", score=score)
        self.ledger.write(self.nodes[attester], self.keys[subject], what, float(count))
        self.tally.add(self.keys[attester], self.ledger.since(self.keys[attester], -1)[-1])

    def solve(self, needs: list[str], truth: str, *, by_claims: bool = False) -> list[Ballot]:
        """Five chains, each executed by whoever is free and best by the ledger (or by what nodes say of themselves)."""
        wrong = [str(option) for option in range(OPTIONS) if str(option) != truth]
        ballots = []
        for chain in range(CHAINS):
            right, lied, weights = True, False, []
            for skill in needs:
                free = [number for number in range(NODES) if self.draw.random() < FREE] or [0]
                if by_claims:
                    number = max(free, key=lambda one: (self.claims(one)[skill], self.draw.random()))
                    weights.append(self.claims(number)[skill])
                else:
                    offers = [Candidate(f"{one:02}", self.keys[one], 1.0, 0.0, self.claims(one)) for one in free]
                    best = rank(self.tally, offers, skill, lambda a, b: float(a == b))[0]
                    number = int(best.candidate.id)
                    weights.append(best.match.mean * best.standing)
                lied = lied or number in self.liars
                right = right and self.draw.random() < self.accuracy[number][skill]
            lie = wrong[0] if lied and self.colluding else self.draw.choice(wrong)
            ballots.append(Ballot(str(chain), truth if right else lie, weights))
        return ballots

    def mass(self) -> float:
        """The liars' share of all capability that the ledger sees."""
        of = [sum(self.tally.capability(key, skill).mean for skill in SKILLS) for key in self.keys]
        return sum(of[number] for number in self.liars) / sum(of)


def play(share: float, colluding: bool, problems: int, seed: int) -> dict[str, Any]:
    """One row: `problems` problems with this share of liars."""
    draw = Random(seed)
    nodes = Collective(round(share * NODES), colluding, draw)
    weighted, majority, claimed = [], [], []
    first = nodes.mass()
    for _ in range(problems):
        needs = draw.sample(SKILLS, STEPS)
        truth = str(draw.randrange(OPTIONS))
        ballots = nodes.solve(needs, truth)
        weighted.append(vote(ballots).answer == truth)
        majority.append(vote(ballots, weighted=False).answer == truth)
        claimed.append(vote(nodes.solve(needs, truth, by_claims=True)).answer == truth)
        if len(weighted) % BATCH == 0:
            for number in range(BATCH):
                nodes.calibrate(len(weighted) + number)
    low, high = paired_interval(majority, weighted)
    trust = nodes.tally.trust()
    return {
        "liars": len(nodes.liars),
        "share": share,
        "kind": "colluding" if colluding else "random",
        "problems": problems,
        "weighted": sum(weighted) / problems,
        "majority": sum(majority) / problems,
        "by_claims": sum(claimed) / problems,
        "weighted_minus_majority": (sum(weighted) - sum(majority)) / problems,
        "interval": [low, high],
        "liars_mass_first": first,
        "liars_mass_last": nodes.mass(),
        "liars_trust_max": max((trust.get(nodes.keys[one], 1.0) for one in nodes.liars), default=0.0),
        "honest_trust_min": min(trust.get(nodes.keys[one], 1.0) for one in range(NODES) if one not in nodes.liars),
    }
