"""The contract of every environment: tasks that can be addressed, episodes that can be replayed.

Responsibilities: `Environment` (where tasks come from, how an episode runs, how it is scored again), the values it
exchanges, and the checked settings that each environment declares.

Invariants, on which resuming a run and recomputing a stranger's reward rest:
- `task(split, index, seed)` is pure: the same arguments give the same task in every process, so a cursor is all
  that a resumed run needs.
- The splits are disjoint: no held-out task is ever drawn for training, whatever the seed.
- An episode depends on its task and the actions alone: `score` replays it and gets the same reward.
- One instance runs one episode at a time. Instances are cheap; what is heavy is loaded once and shared.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from shoal.errors import ConfigError, RecordError, TaskError
from shoal.protocol.chat import Message
from shoal.protocol.episode import Episode, Task
from shoal.protocol.sampling import Grammar

Split = Literal["train", "heldout"]

MAX_HELDOUT = 10_000
"""The longest held-out list that is built when the caller names no limit."""

MAX_REPEATS = 2_000
"""Held-out draws in a row that may repeat known tasks before a world is taken to hold no more."""


class EnvironmentSettings(BaseModel):
    """Base of every environment's settings: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Observation:
    """What an episode opens with: the conversation so far."""

    messages: tuple[Message, ...]
    grammar: Grammar | None = None
    """What the first action must match, where the environment constrains it."""
    given: str | None = None
    """The first action, where the environment says it in the agent's place; see `Step`."""


@dataclass(frozen=True, slots=True)
class Step:
    """The world's answer to one action."""

    observation: str
    """What the agent reads next; empty once the episode is done."""
    reward: float
    """Earned by this action; an episode's reward is the sum over its steps."""
    done: bool
    info: dict[str, float] = field(default_factory=dict)
    """Named parts, as they stand now; the last step's are the episode's."""
    grammar: Grammar | None = None
    """What the next action must match."""
    given: str | None = None
    """The next action, where the environment says it in the agent's place: an expert's, to be learnt from as if the
    agent had drawn it. Only environments that declare `gives` may."""


class Environment(ABC):
    """One world. A subclass gives `task`, `reset` and `step`, and declares `Settings` where it has any."""

    Settings: ClassVar[type[EnvironmentSettings]] = EnvironmentSettings
    gives: ClassVar[bool] = False
    """Whether it ever says an action itself; its `judge` then checks that it did."""
    rollout_seed: int = 0
    """The episode's own, beside its task's: for what may differ between rollouts of one task. Set before `reset`."""

    def __init__(self, settings: EnvironmentSettings | None = None, *, name: str = "") -> None:
        self.settings: Any = self.Settings() if settings is None else settings
        self.name = name or type(self).__name__
        """What its tasks carry as `env`: the name that the configuration gives this environment."""

    @abstractmethod
    def task(self, split: Split, index: int, seed: int) -> Task:
        """The task at cursor `index` (from 0) of the stream that `seed` selects; the training stream never ends."""

    @abstractmethod
    async def reset(self, task: Task) -> Observation:
        """Begin an episode of `task`.

        Raises:
            TaskError: the task is not one of this environment's.
        """

    @abstractmethod
    async def step(self, action: str, *, truncated: bool = False) -> Step:
        """Act once. `truncated` says that the action was cut off by the token limit.

        An action that makes no sense is answered by an observation, never by an exception.
        """

    def also_read(self, notes: str) -> Grammar | None:
        """What the first action must match for an agent that was given notes as well, where that makes a difference.

        Called right after `reset`, if at all. None: what the opening says.
        """
        return None

    def sibling(self, task_id: str, index: int, seed: int) -> Task:
        """Training task `index` of the template that the task with this id has; of any, where the world has none."""
        return self.task("train", index, seed)

    def answers(self, task: Task) -> tuple[str, ...]:
        """Right answers of a task, where the environment can tell them: no memory may hold one."""
        return ()

    async def close(self) -> None:
        """Let go of what the episode holds; called once, also after an episode that failed."""
        return None

    def fresh(self) -> Environment:
        """Another instance of the same world, for another episode."""
        return type(self)(self.settings, name=self.name)

    def heldout(self, limit: int | None = None) -> list[Task]:
        """The held-out tasks, distinct and always the same: the first `limit` of them, or fewer if there are fewer."""
        wanted = MAX_HELDOUT if limit is None else limit
        found: dict[str, Task] = {}
        index = repeats = 0
        while len(found) < wanted and repeats < MAX_REPEATS:
            task = self.task("heldout", index, 0)
            repeats = repeats + 1 if task.id in found else 0
            found.setdefault(task.id, task)
            index += 1
        return list(found.values())

    def tasks(self, split: Split, *, seed: int = 0, start: int = 0) -> Iterator[Task]:
        """Tasks in order from cursor `start`: without end for training, the distinct ones of `heldout`."""
        if split == "heldout":
            yield from self.heldout()[start:]
            return
        index = start
        while True:
            yield self.task("train", index, seed)
            index += 1

    async def score(self, task: Task, actions: Sequence[str], *, truncated: Sequence[bool] = ()) -> Step:
        """The last step of `task` replayed with `actions`, its reward that of the whole episode.

        This is how a coordinator recomputes what a worker claims. `truncated` has one entry an action, or is empty
        where none was cut off. `done` is false where the actions end before the episode does.

        Raises:
            RecordError: there is no action, or one after the episode's end: nobody can have played that.
        """
        cut = tuple(truncated) or (False,) * len(actions)
        if not actions or len(cut) != len(actions):
            raise RecordError(f"an episode of task {task.id} has {len(actions)} actions and {len(cut)} truncations.")
        env = self.fresh()
        try:
            await env.reset(task)
            total = 0.0
            for number, (action, was_cut) in enumerate(zip(actions, cut, strict=True), start=1):
                step = await env.step(action, truncated=was_cut)
                total += step.reward
                if step.done and number < len(actions):
                    raise RecordError(f"an episode of task {task.id} goes on after its end at action {number}.")
            return Step(step.observation, total, step.done, step.info)
        finally:
            await env.close()

    async def judge(self, episode: Episode) -> Step:
        """What `score` gives for a finished episode of this environment; raises as it does."""
        actions = [turn.completion.text for turn in episode.turns]
        truncated = [turn.completion.finish == "length" for turn in episode.turns]
        return await self.score(episode.task, actions, truncated=truncated)


def strict_and_lenient(reward: float, info: Mapping[str, float]) -> tuple[float, float]:
    """What evaluation counts: the parts `strict` and `lenient`, or the reward (held to 0..1) where there are none."""
    fallback = min(1.0, max(0.0, reward)) if math.isfinite(reward) else 0.0
    return info.get("strict", fallback), info.get("lenient", info.get("strict", fallback))


def stable_int(*parts: object) -> int:
    """A 63-bit integer that depends on `parts` alone: unlike `hash`, equal in every process and on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stable_fraction(*parts: object) -> float:
    """As `stable_int`, spread evenly over [0, 1)."""
    return stable_int(*parts) / 2**63


def check_cursor(index: int) -> None:
    """Raise `TaskError` where a cursor is negative."""
    if index < 0:
        raise TaskError(f"task index {index} is negative.")


S = TypeVar("S", bound=EnvironmentSettings)


def parse_settings(kind: type[S], raw: Mapping[str, Any], where: str) -> S:
    """`raw` as settings of type `kind`.

    Raises:
        ConfigError: names the first offending key, the environment `where`, and the keys there are.
    """
    try:
        return kind.model_validate(dict(raw))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    allowed = list(kind.model_fields)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, allowed, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        remedy = f"{hint}Its settings are: {', '.join(allowed) or 'none'}."
        raise ConfigError(f"environment {where!r} has no setting {key!r}.", remedy)
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if not key:
        raise ConfigError(f"the settings of environment {where!r} do not fit together: {message}.")
    shown = repr(first["input"])[:80]
    raise ConfigError(f"setting {key!r} of environment {where!r} cannot be {shown}: {message}.")
