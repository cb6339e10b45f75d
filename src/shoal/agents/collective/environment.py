"""Steps of a collective as an environment: what experts did is done again, and learnt.

    [envs.steps]
    type = "shoal.agents.collective.environment:Steps"
    settings = { path = "episodes.jsonl" }

The file is what `episodes` writes. A step whose chain was found to be right has the result that it gave then as its
right answer; where such results differ, the one that most chains rest on. Reward: 1 for the same answer in canonical
form. So an expert learns to do always what it did when the collective was right.

Invariants: a task carries its words and its answer, so that a worker needs no file; the splits share no step.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import msgspec
from pydantic import Field

from shoal.agents.collective.answers import canonical
from shoal.envs.base import (
    Environment,
    EnvironmentSettings,
    Observation,
    Split,
    Step,
    check_cursor,
    stable_fraction,
    stable_int,
)
from shoal.errors import RecordError, TaskError
from shoal.protocol.chat import Message
from shoal.protocol.codec import read_jsonl
from shoal.protocol.episode import Episode, Task
from shoal.protocol.sampling import Grammar

MAX_EPISODES = 1_000_000


class StepsSettings(EnvironmentSettings):
    """Which steps."""

    path: str = Field(min_length=1)
    """Episodes of a collective; `~` and variables such as `$SHOAL_DATA` are expanded."""
    requirement: str = ""
    """Only steps that asked for this; empty: all."""
    min_reward: float = Field(default=1.0, gt=0)
    """What a chain must have been worth for its results to be right."""
    heldout_fraction: float = Field(default=0.1, ge=0, lt=1)


class Steps(Environment):
    """Steps that a collective once did."""

    Settings: ClassVar[type[EnvironmentSettings]] = StepsSettings
    settings: StepsSettings

    def task(self, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        held = self.settings.heldout_fraction
        rows = [
            row
            for row in _rows(*_located(self.settings.path), self.settings)
            if (stable_fraction("collective step", row["id"]) < held) == (split == "heldout")
        ]
        if not rows:
            raise TaskError(f"{self.settings.path} has no {split} step.", "Change heldout_fraction, or collect more.")
        epoch, place = divmod(index, len(rows))
        order = list(range(len(rows)))
        Random(stable_int("collective", seed, epoch)).shuffle(order)
        row = rows[order[place]]
        return Task(env=self.name, id=row["id"], seed=0, data={key: row[key] for key in row if key != "id"})

    async def reset(self, task: Task) -> Observation:
        shown, answer, told = (task.data.get(key) for key in ("shown", "answer", "instructions"))
        if not isinstance(shown, str) or not isinstance(answer, str) or canonical(answer) is None:
            raise TaskError(f"task {task.id} of environment {self.name!r} carries no step and answer.")
        self._answer = answer
        grammar = None
        if (limits := task.data.get("grammar")) is not None:
            try:
                grammar = msgspec.convert(limits, Grammar)
            except msgspec.ValidationError as error:
                raise TaskError(f"task {task.id} of {self.name!r} has no usable grammar: {error}.") from None
        opening = (Message(role="system", content=told),) if isinstance(told, str) and told else ()
        return Observation((*opening, Message(role="user", content=shown)), grammar)

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        right = float(not truncated and canonical(action) == canonical(self._answer))
        return Step("", right, True, {"strict": right, "lenient": right})


def _located(name: str) -> tuple[Path, int]:
    """The file, and when it was changed: a changed one is read again."""
    path = Path(os.path.expandvars(name)).expanduser()
    try:
        return path, path.stat().st_mtime_ns
    except OSError as error:
        raise TaskError(f"the episodes {path} cannot be read: {error.strerror}.", "Check `path`.") from None


@lru_cache(maxsize=8)
def _rows(path: Path, changed: int, settings: StepsSettings) -> tuple[dict[str, Any], ...]:
    """Distinct steps with their answers, in the order of their ids."""
    said: dict[str, Counter[str]] = defaultdict(Counter)
    words: dict[str, dict[str, Any]] = {}
    try:
        for number, episode in enumerate(read_jsonl(path, Episode)):
            if number >= MAX_EPISODES:
                raise TaskError(f"{path} has more than {MAX_EPISODES} episodes.")
            requirement = episode.task.data.get("requirement")  # A chain's writing has none, and no one right answer.
            wanted = requirement is not None and settings.requirement in ("", requirement)
            if episode.outcome != "done" or episode.reward < settings.min_reward or not wanted:
                continue
            text = episode.turns[0].completion.text.strip()
            if canonical(text) is not None:
                said[episode.task.id][text] += 1
                words[episode.task.id] = episode.task.data
    except (OSError, RecordError) as error:
        raise TaskError(f"{path} holds no episodes that can be read: {error}") from None
    if not words:
        raise TaskError(f"{path} holds no step of a chain that was worth {settings.min_reward:g}.")
    return tuple(
        {**words[name], "id": name, "answer": min(said[name], key=lambda text: (-said[name][text], text))}
        for name in sorted(words)
    )
