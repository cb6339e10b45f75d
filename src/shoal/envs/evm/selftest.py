"""Does every task hold what it promises? Reference solutions, mutants and inefficient solutions, on one backend or two.

What must come out: every reference earns 100, no mutant does, doing nothing earns less than 20 where something had to
be sent, an inefficient solution earns 100 × optimal/steps exactly, and both backends agree on every single run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from shoal.envs.evm.actions import Action, read_action, write_action
from shoal.envs.evm.chain import ChainBackend
from shoal.envs.evm.definition import FULL_POINTS, Definition
from shoal.envs.evm.judging import Verdict
from shoal.envs.evm.quest import Quest
from shoal.envs.evm.reference import LOOK, mutants, reference_actions
from shoal.envs.evm.sampling import Instance, sample

NO_OP_LIMIT = 20
"""Doing nothing earns less than this where something has to be sent."""

MIN_MUTANTS = 5


@dataclass
class Findings:
    """What a self-test found; the lists name what is wrong."""

    tasks: int = 0
    runs: int = 0
    mutants: int = 0
    reference_min: float = float(FULL_POINTS)
    fewest_mutants: int = 10**6
    weak_references: list[str] = field(default_factory=list)
    surviving: list[str] = field(default_factory=list)
    generous_no_ops: list[str] = field(default_factory=list)
    wrong_decay: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    digest: str = ""
    """Of every instruction, action and verdict: equal on every machine."""

    @property
    def good(self) -> bool:
        wrong = self.weak_references or self.surviving or self.generous_no_ops or self.wrong_decay
        return not (wrong or self.disagreements) and self.fewest_mutants >= MIN_MUTANTS

    def summary(self) -> dict[str, Any]:
        """As `shoal evm selftest --json` prints it."""
        return {
            "tasks": self.tasks,
            "runs": self.runs,
            "reference_min": self.reference_min,
            "mutants": self.mutants,
            "fewest_mutants": self.fewest_mutants if self.mutants else 0,
            "surviving_mutants": len(self.surviving),
            "generous_no_ops": len(self.generous_no_ops),
            "wrong_decay": len(self.wrong_decay),
            "backend_disagreements": len(self.disagreements),
            "digest": self.digest,
            "problems": [
                *(f"reference: {x}" for x in self.weak_references),
                *(f"mutant survives: {x}" for x in self.surviving),
                *(f"no-op: {x}" for x in self.generous_no_ops),
                *(f"decay: {x}" for x in self.wrong_decay),
                *(f"backends: {x}" for x in self.disagreements),
            ],
        }


def play(instance: Instance, chain: ChainBackend, actions: Iterable[Action]) -> Verdict:
    """The verdict on some actions, each sent through the text that an agent would write."""
    quest = Quest(instance, chain)
    try:
        quest.begin()
        for action in actions:
            if quest.act(read_action(write_action(action))).done:
                break
        return quest.verdict()
    finally:
        quest.end()


def reference(instance: Instance, chain: ChainBackend) -> tuple[list[Action], Verdict]:
    """The reference solution's actions on this instance, and its verdict."""
    quest = Quest(instance, chain)
    try:
        quest.begin()
        return reference_actions(quest), quest.verdict()
    finally:
        quest.end()


def selftest(
    definitions: Iterable[Definition],
    chains: list[ChainBackend],
    *,
    seeds: int,
    mutant_seeds: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> Findings:
    """Test each task on `seeds` instances, its mutants on the first `mutant_seeds` of them."""
    found = Findings()
    digest = blake2b(digest_size=32)
    for definition in definitions:
        found.tasks += 1
        progress(definition.id)
        for seed in range(seeds):
            instance = sample(definition, seed)
            actions, verdict = reference(instance, chains[0])
            found.reference_min = min(found.reference_min, verdict.strict)
            replayed = _on_all(found, instance, chains, actions, "reference")
            if min(verdict.strict, replayed.strict) < FULL_POINTS:
                failed = [name for name, passed in verdict.passed.items() if not passed]
                found.weak_references.append(f"{definition.id} seed {seed}: {', '.join(failed) or 'its replay'}")
            digest.update(f"{instance.instruction}{[write_action(a) for a in actions]}{verdict}\n".encode())
            if seed < mutant_seeds:
                _mutants(found, instance, chains, actions)
                _inefficient(found, instance, chains, actions)
    found.digest = digest.hexdigest()
    return found


def _on_all(
    found: Findings, instance: Instance, chains: list[ChainBackend], actions: list[Action], name: str
) -> Verdict:
    verdicts = [play(instance, chain, actions) for chain in chains]
    found.runs += len(verdicts)
    if any(verdict != verdicts[0] for verdict in verdicts):
        found.disagreements.append(f"{instance.definition.id} seed {instance.seed}: {name}")
    return verdicts[0]


def _mutants(found: Findings, instance: Instance, chains: list[ChainBackend], actions: list[Action]) -> None:
    definition = instance.definition
    count = 0
    for name, changed in mutants(actions, definition.is_query):
        count += 1
        verdict = _on_all(found, instance, chains, changed, name)
        if verdict.points == FULL_POINTS:
            found.surviving.append(f"{definition.id} seed {instance.seed}: {name}")
        if not changed and not definition.is_query and verdict.points >= NO_OP_LIMIT:
            found.generous_no_ops.append(f"{definition.id}: {verdict.points} points")
    found.mutants += count
    found.fewest_mutants = min(found.fewest_mutants, count)


def _inefficient(found: Findings, instance: Instance, chains: list[ChainBackend], actions: list[Action]) -> None:
    optimal = instance.definition.optimal_steps
    if not instance.definition.composite:
        return
    for extra in (1, optimal):
        half = len(actions) // 2
        longer = [*actions[:half], *[LOOK] * extra, *actions[half:]]
        verdict = _on_all(found, instance, chains, longer, f"{extra} queries more")
        if verdict.strict != FULL_POINTS * min(1.0, optimal / (optimal + extra)):
            found.wrong_decay.append(f"{instance.definition.id}: {verdict.strict} with {extra} queries more")
