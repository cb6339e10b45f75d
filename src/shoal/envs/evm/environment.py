"""EVM quests as an environment: read an instruction, act on the chain by typed JSON, be scored by what changed.

Responsibilities: which task is asked when (all of them, some groups, or a curriculum), the words around it, and the
episode. An atomic task ends with its first action; a composite one goes on until `submit`, too many rounds or too many
failures. The reward is the score over 100, given with the last action.

Invariants: an episode has a chain of its own, put back before the next one gets it; held-out instances use seeds that
training never uses (a task without parameters is the same on both sides, and says so by its words only).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from shoal.envs.base import Environment, EnvironmentSettings, Observation, Split, Step, check_cursor, stable_int
from shoal.envs.evm.actions import Action, ActionError, read_action
from shoal.envs.evm.chain import ChainBackend
from shoal.envs.evm.definition import COMPOSITE_GROUPS, FULL_POINTS, GROUPS, Definition, load_tasks, shipped_tasks
from shoal.envs.evm.grammar import action_grammar
from shoal.envs.evm.official import load_official
from shoal.envs.evm.prompts import opening
from shoal.envs.evm.pyrevm_chain import PyrevmChain
from shoal.envs.evm.quest import Quest
from shoal.envs.evm.sampling import sample
from shoal.errors import TaskError
from shoal.protocol.episode import Task
from shoal.protocol.sampling import Grammar

ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{40}\b")
MAX_IDLE_CHAINS = 64
"""Chains kept for the next episodes; one holds about a megabyte."""

STAGES: tuple[tuple[str, ...], ...] = (
    ("native",),
    ("erc20", "contract", "query"),
    ("approve", "batch", "nft", "advanced", "defi_query"),
    ("swap", "staking", "verify"),
    ("liquidity", "defi", "stake", "nft_bundle", "optimised"),
)
"""The curriculum: payments, then tokens and queries, approvals, swaps, and whole workflows."""


class EvmSettings(EnvironmentSettings):
    """Which quests, and how they are put and scored."""

    groups: tuple[str, ...] = ()
    """Groups of tasks; empty for all."""
    tasks: tuple[str, ...] = ()
    """Ids of tasks; empty for all of the groups."""
    file: str = ""
    """A TOML file of tasks to use in place of those that come with Shoal."""
    official: str = ""
    """The benchmark's folder of JSON definitions: its wording and intervals, with our checks."""
    scoring: Literal["strict", "paper"] = "strict"
    prompt: Literal["full", "brief"] = "full"
    """`brief` shows one example of an action alone: for small models on payments."""
    curriculum: int = Field(default=0, ge=0)
    """Training tasks after which the next stage of the curriculum opens; 0 for everything at once."""
    constrain: Literal["no", "form", "seen"] = "no"
    """For models that cannot keep to the form yet. `form`: a grammar lets the agent write nothing but valid actions;
    `seen`: and no address but known names and what it has read. Any other would be wrong."""

    @field_validator("groups")
    @classmethod
    def _known(cls, groups: tuple[str, ...]) -> tuple[str, ...]:
        unknown = set(groups) - {*GROUPS, *COMPOSITE_GROUPS}
        if unknown:
            raise ValueError(
                f"there is no group {sorted(unknown)[0]!r}; there are {', '.join(GROUPS + COMPOSITE_GROUPS)}"
            )
        return groups


class EvmQuests(Environment):
    """One quest a task."""

    Settings: ClassVar[type[EnvironmentSettings]] = EvmSettings
    settings: EvmSettings
    _quest: Quest | None = None
    _seen: frozenset[str] = frozenset()
    """Addresses that the agent has read in this episode."""

    def task(self, split: Split, index: int, seed: int) -> Task:
        return self._drawn(split, index, seed)

    def sibling(self, task_id: str, index: int, seed: int) -> Task:
        return self._drawn("train", index, seed, task_id.partition("/")[0])

    def _drawn(self, split: Split, index: int, seed: int, template: str = "") -> Task:
        check_cursor(index)
        definitions = _selected(self.settings)
        rng = Random(stable_int("evm", split, seed, index))
        if split == "heldout":
            definition = definitions[index % len(definitions)]
        else:
            alike = [definition for definition in definitions if definition.id == template]
            definition = rng.choice(alike or self._open(definitions, index))
        # The last bit of an instance's seed is its side.
        instance = rng.getrandbits(61) * 2 + (split == "heldout")
        return Task(env=self.name, id=f"{definition.id}/{instance}", seed=instance)

    def _open(self, definitions: Sequence[Definition], index: int) -> Sequence[Definition]:
        if not self.settings.curriculum:
            return definitions
        reached = index // self.settings.curriculum
        easy = {group for stage in STAGES[: reached + 1] for group in stage}
        # Where the settings leave nothing in the stages so far, the earliest stage that has something opens.
        for stage in STAGES[reached + 1 :]:
            if any(definition.group in easy for definition in definitions):
                break
            easy |= set(stage)
        return [definition for definition in definitions if definition.group in easy]

    async def reset(self, task: Task) -> Observation:
        await self.close()
        name = task.id.partition("/")[0]
        definition = next((d for d in _selected(self.settings) if d.id == name), None)
        if definition is None:
            raise TaskError(f"environment {self.name!r} has no task {name!r}.", "See shoal evm tasks.")
        chain = _IDLE.pop() if _IDLE else PyrevmChain()
        quest = Quest(sample(definition, task.seed), chain)
        quest.begin()
        self._quest = quest
        messages = opening(quest, style=self.settings.prompt)
        self._seen = frozenset()
        return Observation(messages, self._grammar(quest, " ".join(message.content for message in messages)))

    def also_read(self, notes: str) -> Grammar | None:
        assert self._quest is not None, "notes are read in an episode that has begun"
        return self._grammar(self._quest, notes)

    def _grammar(self, quest: Quest, read: str) -> Grammar | None:
        """What the agent's next reply must match, now that it has read this."""
        if self.settings.constrain == "no":
            return None
        self._seen |= frozenset(ADDRESS.findall(read))
        composite = quest.instance.definition.composite
        return action_grammar(composite, self._seen if self.settings.constrain == "seen" else None)

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        quest = self._quest
        if quest is None:
            raise TaskError(f"environment {self.name!r} was asked to step outside an episode.", "Call reset first.")
        read: Action | ActionError
        try:
            read = read_action(action)
        except ActionError as error:
            read = error
        feedback = quest.act(read)
        if not feedback.done:
            left = quest.max_rounds - quest.rounds
            told = f"{feedback.text}\n{left} rounds left."
            return Step(told, 0.0, False, {"steps": float(quest.rounds)}, self._grammar(quest, told))
        verdict = quest.verdict()
        await self.close()
        score = verdict.strict if self.settings.scoring == "strict" else verdict.paper
        info = {
            "strict": score / FULL_POINTS,
            "lenient": verdict.points / FULL_POINTS,
            "paper": verdict.paper / FULL_POINTS,
            "steps": float(verdict.steps),
            "understood": float(not isinstance(read, ActionError)),
        }
        return Step("", score / FULL_POINTS, True, info)

    async def close(self) -> None:
        quest, self._quest = self._quest, None
        if quest is None:
            return
        quest.end()
        if len(_IDLE) < MAX_IDLE_CHAINS:
            _IDLE.append(quest.chain)


_IDLE: list[ChainBackend] = []
"""Chains that stand at the genesis."""


@lru_cache(maxsize=64)
def _selected(settings: EvmSettings) -> tuple[Definition, ...]:
    if settings.official:
        folder = Path(os.path.expandvars(settings.official)).expanduser()
        tasks = {name: official.definition for name, official in load_official(folder).items()}
    else:
        tasks = load_tasks(Path(settings.file)) if settings.file else shipped_tasks()
    unknown = set(settings.tasks) - tasks.keys()
    if unknown:
        raise TaskError(f"there is no task {sorted(unknown)[0]!r}.", "See shoal evm tasks.")
    chosen = [
        task
        for task in tasks.values()
        if (not settings.groups or task.group in settings.groups) and (not settings.tasks or task.id in settings.tasks)
    ]
    if not chosen:
        raise TaskError("the settings of the quests leave no task.", "Give fewer of groups and tasks.")
    return tuple(chosen)
