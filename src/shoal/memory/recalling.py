"""Worlds whose agents are given notes: the block of recalled memories becomes part of the task.

    [memory]                                           every environment of a run is one of these:
    recall = true               ──▶                    type = "shoal.memory.recalling:Recalling"

Whoever draws a task looks up what is remembered for its question and puts the block into the task's data; whoever acts
on it, or plays it again to check a reward, finds it there and asks no store. So an episode still depends on its task
and its actions alone, on every machine.

Deviation from `envs.base`: with a memory that changes, `task` is pure only as to what is asked; its notes are those of
the moment. A resumed run asks the same questions, perhaps with other notes.

Invariants: a block costs at most `max_tokens` by the tokenizer of the model that reads it, or at most as many bytes
where none is named (no byte-level tokenizer makes more tokens than bytes); it is marked as recalled data; a share of
the tasks goes without, by which what the notes are worth can be measured.
"""

from __future__ import annotations

import contextlib
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from msgspec.structs import replace
from pydantic import Field

from shoal.envs.base import Environment, EnvironmentSettings, Observation, Split, Step, stable_fraction
from shoal.errors import ConfigError
from shoal.memory.keeper import Keeper
from shoal.memory.recall import CountTokens, with_notes
from shoal.protocol.episode import Episode, Task

log = logging.getLogger("shoal.memory")

NOTES = "notes"
"""The key of a task's data under which its block is."""


class RecallingSettings(EnvironmentSettings):
    """Whose tasks, and what is recalled for them."""

    tasks: str = Field(min_length=1, max_length=256)
    """The environment that is acted in: a short name or an import path."""
    task_settings: dict[str, Any] = {}
    """That environment's settings."""
    folder: str = ""
    """Where the memories are, on the machine that draws tasks; empty: memory/ in its data directory."""
    family: str = ""
    """Only memories about this environment; empty: of any."""
    max_tokens: int = Field(default=256, ge=16, le=1 << 16)
    """The longest block."""
    entries: int = Field(default=4, ge=1, le=64)
    """Memories in a block, at most."""
    likeness: float = Field(default=0.0, ge=0, le=1)
    """Memories less similar to the question than this are left out."""
    share: float = Field(default=0.75, gt=0, le=1)
    """Share of the tasks that are given notes."""
    model: str = ""
    """The model whose tokenizer counts; empty: bytes are counted."""


class Noting(Environment):
    """An environment that shows the notes that a task carries, if it carries any."""

    def __init__(self, inner: Environment) -> None:
        super().__init__(name=inner.name)
        self._inner = inner

    def task(self, split: Split, index: int, seed: int) -> Task:
        return self._inner.task(split, index, seed)

    def heldout(self, limit: int | None = None) -> list[Task]:
        return self._inner.heldout(limit)

    def fresh(self) -> Environment:
        return Noting(self._inner.fresh())

    async def reset(self, task: Task) -> Observation:
        plain, notes = without_notes(task)
        return shown_with(self._inner, await self._inner.reset(plain), notes)

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        return await self._inner.step(action, truncated=truncated)

    async def judge(self, episode: Episode) -> Step:
        return await self._inner.judge(replace(episode, task=without_notes(episode.task)[0]))

    async def close(self) -> None:
        await self._inner.close()

    def sibling(self, task_id: str, index: int, seed: int) -> Task:
        return self._inner.sibling(task_id, index, seed)

    def answers(self, task: Task) -> tuple[str, ...]:
        return self._inner.answers(without_notes(task)[0])


class Recalling(Noting):
    """Another environment, its tasks with notes from this machine's memories."""

    Settings: ClassVar[type[EnvironmentSettings]] = RecallingSettings
    settings: RecallingSettings

    def __init__(self, settings: EnvironmentSettings | None = None, *, name: str = "") -> None:
        from shoal.envs.registry import make

        Environment.__init__(self, settings, name=name)
        self._inner = make(self.settings.tasks, self.settings.task_settings, name=self.name)

    def task(self, split: Split, index: int, seed: int) -> Task:
        return self._noted(self._inner.task(split, index, seed))

    def heldout(self, limit: int | None = None) -> list[Task]:
        return [self._noted(task) for task in self._inner.heldout(limit)]

    def fresh(self) -> Environment:
        return Recalling(self.settings, name=self.name)

    def _noted(self, task: Task) -> Task:
        given = self.settings
        if stable_fraction("notes", task.id) >= given.share:
            return task
        keeper = keeper_of(given.folder)
        keeper.retrieval.follow()  # another process may have admitted something since
        recall = keeper.recall(
            asked_in(self._inner, task),
            max_tokens=given.max_tokens,
            count_tokens=counter_of(given.model),
            k=given.entries,
            family=given.family,
            likeness=given.likeness,
        )
        return noted(task, recall.text, recall.entries)


def shown_with(env: Environment, opening: Observation, notes: str) -> Observation:
    """An opening with notes; itself where there are none."""
    if not notes:
        return opening
    return Observation(with_notes(opening.messages, notes), env.also_read(notes) or opening.grammar)


def noted(task: Task, text: str, entries: tuple[str, ...] = ()) -> Task:
    """A task with notes; itself where there are none."""
    if not text:
        return task
    return replace(task, data={**task.data, NOTES: {"text": text, "entries": list(entries)}})


def without_notes(task: Task) -> tuple[Task, str]:
    """A task as its own environment knows it, and the notes that it was given besides."""
    given = task.data.get(NOTES)
    if not isinstance(given, dict):
        return task, ""
    plain = replace(task, data={key: value for key, value in task.data.items() if key != NOTES})
    return plain, str(given.get("text", ""))


def entries_of(task: Task) -> tuple[str, ...]:
    """Ids of the memories in a task's notes: those to which a use is put down."""
    given = task.data.get(NOTES)
    found = given.get("entries", []) if isinstance(given, dict) else []
    return tuple(entry for entry in found if isinstance(entry, str))


def asked_in(env: Environment, task: Task) -> str:
    """What a task asks: the last message of its opening.

    Raises:
        ConfigError: the environment has to wait for something before it can say so.
    """
    opening = _at_once(env.fresh(), task)
    return opening.messages[-1].content


def _at_once(env: Environment, task: Task) -> Observation:
    # Tasks are drawn where nothing may be awaited; the worlds that are functions of their task never do.
    begun = env.reset(task)
    opening: Observation | None = None
    try:
        begun.send(None)
    except StopIteration as ended:
        opening = ended.value
    except RuntimeError as error:  # What waits where no loop runs.
        log.debug("environment %s: %s", env.name, error)
    begun.close()
    if opening is None:
        raise ConfigError(
            f"environment {env.name!r} cannot say at once what a task asks, so nothing can be recalled for it.",
            "Leave memory.recall off for runs with this environment.",
        )
    ended_too = env.close()
    with contextlib.suppress(StopIteration):
        ended_too.send(None)
    ended_too.close()
    return opening


@lru_cache(maxsize=16)
def keeper_of(folder: str) -> Keeper:
    """The memories in a folder, opened once a process."""
    from shoal.fabric.identity import Identity, data_dir

    where = Path(folder).expanduser() if folder else data_dir() / "memory"
    return Keeper(where, Identity.load_or_create(data_dir()))


@lru_cache(maxsize=16)
def counter_of(model: str) -> CountTokens:
    """How many tokens a text has for the model with this name, or how many bytes where there is none."""
    if not model:
        return lambda text: len(text.encode())
    from shoal.engine.source import resolve
    from shoal.engine.tokenizer import Tokenizer
    from shoal.fabric.identity import data_dir

    tokenizer = Tokenizer(resolve(model, data_dir() / "models").directory)
    return lambda text: len(tokenizer.encode(text))
