"""Trials of a candidate: a sibling task run twice with one fresh seed, without the memory and with it.

Which task and which seed trial number n has follows from who asks (`salt`), the family and n alone: whoever runs it
runs the same, and whoever asked can tell. Candidates of one family share their sibling tasks, so a run without any
memory is made once for all of them (e-LOND allows for that).

Invariants: a trial is never on the task that the candidate came from; both sides differ in the notes alone; a side that
is void makes the trial void, and no evidence.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from msgspec.structs import replace

from shoal.engine.tokenizer import Tokenizer
from shoal.envs.base import Environment, stable_int
from shoal.errors import ConfigError
from shoal.memory.admission import Decision
from shoal.memory.keeper import Keeper
from shoal.memory.recall import compose
from shoal.memory.recalling import Noting, noted
from shoal.memory.records import MAX_ANSWER_CHARS, MAX_ANSWERS, Entry, Run, Trial, World, content_hash, trial_id
from shoal.memory.replay import ReplayVoid, config_hash, run_of
from shoal.protocol.episode import Task
from shoal.protocol.sampling import Sampler, SamplingParams
from shoal.rollout.episode import EpisodeSpec, run_episode

FURTHEST_SIBLING = 2**31
"""Sibling tasks are from anywhere in the stream of training tasks."""

MAX_KEPT_RUNS = 4096
"""Runs without a memory that are kept for the next candidate."""

MAX_VOID = 8
"""Void trials in a row after which a candidate's trials stop: the world or the engine is broken."""


@dataclass
class Arena:
    """Where this node runs trials of one family: a world, a model, and how it samples.

    Args:
        env: made of `world`; its name is the family.
        model: hash of the weights (`replay.weights_hash`).
        note_tokens: the longest block of notes.
    """

    world: World
    env: Environment
    sampler: Sampler
    tokenizer: Tokenizer
    params: SamplingParams
    context_tokens: int
    model: str
    note_tokens: int = 512
    _alone: OrderedDict[tuple[str, int], Run] = field(default_factory=OrderedDict)

    @property
    def family(self) -> str:
        return self.env.name

    @cached_property
    def config(self) -> str:
        """Hash of all that shapes a trial besides task, seed, weights and notes."""
        return content_hash("arena", (config_hash(self.world, self.params, self.context_tokens), self.note_tokens))

    def sibling(self, entry: Entry, salt: str, number: int) -> tuple[Task, int]:
        """Task and sampling seed of an entry's trial `number`."""
        return sibling(self.env, entry, salt, number)

    def id_of(self, entry: Entry, salt: str, number: int) -> str:
        """The id of that trial, before it is run."""
        return trial_id(*self.sibling(entry, salt, number), self.model, self.config)

    async def run(self, entry: Entry, salt: str, number: int) -> Trial:
        """Run one trial.

        Raises:
            ReplayVoid: a side is void, or the entry does not fit into a block.
        """
        task, seed = self.sibling(entry, salt, number)
        block = compose([entry], max_tokens=self.note_tokens, count_tokens=lambda t: len(self.tokenizer.encode(t)))
        if not block.entries:
            raise ReplayVoid(f"the entry does not fit into {self.note_tokens} tokens of notes.")
        with_memory, without = await asyncio.gather(
            self.play(noted(task, block.text), seed), self._without(task, seed, salt, number)
        )
        answers = tuple(a[:MAX_ANSWER_CHARS] for a in self.env.answers(task)[:MAX_ANSWERS])
        return Trial(
            task=task,
            sampling_seed=seed,
            model=self.model,
            config=self.config,
            without=without,
            with_memory=with_memory,
            answers=answers,
        )

    async def rerun(self, entry: Entry, trial: Trial) -> Trial:
        """Run somebody's trial again: same task, seed and entry; raises as `run`."""
        block = compose([entry], max_tokens=self.note_tokens, count_tokens=lambda t: len(self.tokenizer.encode(t)))
        with_memory, without = await asyncio.gather(
            self.play(noted(trial.task, block.text), trial.sampling_seed), self.play(trial.task, trial.sampling_seed)
        )
        return replace(trial, without=without, with_memory=with_memory)

    async def play(self, task: Task, seed: int) -> Run:
        """One episode of a task, with its notes where it has any; raises `ReplayVoid` where it is void."""
        spec = EpisodeSpec(id="trial", group="trial", index=0, task=task, params=replace(self.params, seed=seed))
        env = Noting(self.env.fresh())
        episode = await run_episode(spec, self.sampler, self.tokenizer, env, context_tokens=self.context_tokens)
        if episode.outcome != "done":
            raise ReplayVoid(f"a trial's side is void: {episode.void_reason}")
        return run_of(episode)

    async def _without(self, task: Task, seed: int, salt: str, number: int) -> Run:
        key = (f"{salt} {task.id}", number)
        if key not in self._alone:
            self._alone[key] = await self.play(task, seed)
            while len(self._alone) > MAX_KEPT_RUNS:
                self._alone.popitem(last=False)
        return self._alone[key]


def sibling(env: Environment, entry: Entry, salt: str, number: int) -> tuple[Task, int]:
    """Task and sampling seed of trial `number` that `salt` asks for."""
    seed = stable_int("trial", salt, env.name, number)
    for attempt in range(64):
        index = stable_int("sibling", salt, env.name, number, attempt) % FURTHEST_SIBLING
        task = env.sibling(entry.source_task, index, stable_int("siblings", salt, env.name))
        if task.id != entry.source_task:
            return task, seed
    raise ConfigError(f"environment {env.name!r} has no task but {entry.source_task!r}.", "It has no siblings.")


async def admit(
    keeper: Keeper,
    arena: Arena,
    entry: str,
    *,
    parallel: int = 8,
    most: int | None = None,
    told: Callable[[int, Decision], None] = lambda count, decision: None,
) -> Decision:
    """Run a candidate's trials on this node until they decide.

    Trials that are known already are not run again, so an admission that was cut off goes on where it was.

    Args:
        parallel: trials at once.
        most: stop after so many trials, even undecided.
        told: of the number of trials so far, and what they say.

    Raises:
        RecordError: there is no such entry, or its family is not the arena's.
        ReplayVoid: trial after trial is void.
    """
    memory = keeper.memory(entry)
    if memory.entry.family != arena.family:
        raise ConfigError(
            f"the memory is about {memory.entry.family!r}, and the trials are of {arena.family!r}.",
            "Name the family's own environment.",
        )
    salt = keeper.store.node
    known = keeper.store.trials(memory)
    decision = keeper.report(entry, [])
    number = count = num_void = 0
    while decision.verdict == "continue" and (most is None or count < most):
        batch: list[int] = []
        while len(batch) < parallel:
            if arena.id_of(memory.entry, salt, number) not in known:
                batch.append(number)
            number += 1
        found = await asyncio.gather(*(_tried(arena, memory.entry, salt, n) for n in batch))
        trials = [one for one in found if isinstance(one, Trial)]
        num_void = 0 if trials else num_void + len(found)
        if num_void >= MAX_VOID:
            raise next(one for one in found if isinstance(one, ReplayVoid))
        count += len(trials)
        decision = keeper.report(entry, trials)
        told(count, decision)
    return decision


async def _tried(arena: Arena, entry: Entry, salt: str, number: int) -> Trial | ReplayVoid:
    try:
        return await arena.run(entry, salt, number)
    except ReplayVoid as error:
        return error
