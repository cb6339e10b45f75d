"""Packing a finished episode so that any node can check it, and playing it again there, with a model or without.

    episode ── context_of ──▶ Context ──▶ confirm     its actions, played again: the same reward?
                                     └──▶ replay      its prompt, sampled again: the same tokens?

What the world answered to each action is stored with the context, as what a tool answered. A replay runs the world
itself, which for our environments is a function of the task; where it answers an action that was stored with something
else, or where a call was never stored and there is no sandbox to make it in, the replay is void.

Invariants: a context that `confirm` accepts earns the same reward wherever its environment is; nothing that a tool
never said becomes a guess; a replay's recalled notes are put in as they were, marked, so what is replayed is what was
read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from msgspec.structs import replace

from shoal.engine.tokenizer import Tokenizer
from shoal.envs.base import Environment, Observation, Step
from shoal.errors import ModelError, RecordError, TaskError
from shoal.memory.recalling import Noting, noted, shown_with, without_notes
from shoal.memory.records import (
    HASH_CHARS,
    MAX_TOOL_RESULTS,
    Context,
    Run,
    Scope,
    ToolResult,
    World,
    content_hash,
    tool_call_hash,
)
from shoal.protocol.chat import Message
from shoal.protocol.episode import Episode, Task
from shoal.protocol.sampling import Sampler, SamplingParams
from shoal.rollout.episode import EpisodeSpec, run_episode

REWARD_TOLERANCE = 1e-9

STEP = "environment.step"
"""The tool that an environment is, in stored results: its arguments are the turn and the action."""

Execute = Callable[[str, dict[str, Any]], ToolResult]
"""Runs a tool call again, in a sandbox."""


class ReplayVoid(RecordError):
    """A replay that lacks what it needs; no evidence either way."""


@dataclass(frozen=True)
class Sampled:
    """How an episode was sampled: what a replay must repeat."""

    params: SamplingParams
    """Its seed is the episode's."""
    context_tokens: int
    model: str
    """Hash of the weights (`weights_hash`)."""


@dataclass(frozen=True)
class Replayed:
    """What a replay with a model gave."""

    run: Run
    episode: Episode
    identical: bool
    """Whether it drew the very tokens that the context's own run drew."""


def pack(
    episode: Episode,
    messages: Sequence[Message],
    *,
    model: str,
    config: str,
    sampling_seed: int | None = None,
    tool_results: Sequence[ToolResult] = (),
    recalled: Sequence[str] = (),
    scope: Scope | None = None,
) -> Context:
    """The context of a finished episode that nobody will sample again.

    Args:
        messages: what the environment opened with.
        model, config: hashes of the weights and the configuration that sampled.

    Raises:
        RecordError: the episode is void, or the context breaks a bound.
    """
    if episode.outcome != "done":
        raise RecordError(f"episode {episode.id} is void ({episode.void_reason}): there is nothing to remember.")
    context = Context(
        task=episode.task,
        messages=tuple(messages),
        actions=tuple(turn.completion.text for turn in episode.turns),
        truncated=tuple(turn.completion.finish == "length" for turn in episode.turns),
        tool_results=tuple(tool_results),
        recalled=tuple(recalled),
        model=model,
        config=config,
        sampling_seed=sampling_seed,
        outputs=fingerprint(episode),
        reward=episode.reward,
        scope=scope or Scope(),
    )
    context.check()
    return context


async def context_of(
    episode: Episode, env: Environment, world: World, sampled: Sampled, *, scope: Scope | None = None
) -> Context:
    """The self-contained context of an episode that was played in `env`: what a rollout left, and the world's answers.

    The actions are played once more, which gives the answers and checks the reward that the episode claims.

    Raises:
        RecordError: the episode is void, has another reward than its actions earn, or breaks a bound.
    """
    task, notes = without_notes(episode.task)
    fresh = env.fresh()
    results: list[ToolResult] = []
    reward = 0.0
    try:
        opening = await fresh.reset(task)
        for number, turn in enumerate(episode.turns):
            action = turn.completion.text
            step = await fresh.step(action, truncated=turn.completion.finish == "length")
            reward += step.reward
            results.append(ToolResult(tool=STEP, arguments=_step(number, action), result=step.observation))
    finally:
        await fresh.close()
    if episode.outcome == "done" and abs(reward - episode.reward) > REWARD_TOLERANCE:
        raise RecordError(f"episode {episode.id} claims {episode.reward:g}, and its actions earn {reward:g}.")
    context = pack(
        replace(episode, task=task),
        opening.messages,
        model=sampled.model,
        config=config_hash(world, sampled.params, sampled.context_tokens),
        sampling_seed=sampled.params.seed,
        tool_results=results[:MAX_TOOL_RESULTS],
        recalled=[notes] if notes else [],
        scope=scope,
    )
    context = replace(context, world=world, params=sampled.params, context_tokens=sampled.context_tokens)
    context.check()
    return context


async def confirm(context: Context, env: Environment) -> str:
    """What is wrong with a context's claim, found by playing its actions again; empty where it holds."""
    if not context.actions:
        return "it has no actions"
    try:
        opening = await _opening(context, env)
        last = await env.score(context.task, context.actions, truncated=context.truncated)
    except (RecordError, TaskError) as error:
        return error.problem
    if opening != context.messages:
        return "the environment opens this task with other messages"
    if abs(last.reward - context.reward) > REWARD_TOLERANCE:
        return f"its actions earn {last.reward:g}, not {context.reward:g}"
    return ""


async def _opening(context: Context, env: Environment) -> tuple[Message, ...]:
    fresh = env.fresh()
    try:
        return (await fresh.reset(context.task)).messages
    finally:
        await fresh.close()


async def replay(context: Context, env: Environment, sampler: Sampler, tokenizer: Tokenizer) -> Replayed:
    """Sample a context's episode again, with the notes that it was shown.

    Raises:
        ReplayVoid: it was not kept for this, or the world answers otherwise than it did.
    """
    if context.params is None:
        raise ReplayVoid("the context does not say how it was sampled.", "Only episodes packed for replay have that.")
    world = _Checked(env, context)
    task = noted(context.task, "\n".join(context.recalled))
    spec = EpisodeSpec(id="replay", group="replay", index=0, task=task, params=context.params)
    episode = await run_episode(spec, sampler, tokenizer, world, context_tokens=context.context_tokens)
    if episode.outcome != "done":
        raise ReplayVoid(f"the replay is void: {episode.void_reason}.")
    run = run_of(episode)
    return Replayed(run, episode, run.fingerprint == context.outputs)


class _Checked(Noting):
    """An environment whose answers must be those that a context holds, where it holds any."""

    def __init__(self, env: Environment, context: Context) -> None:
        super().__init__(env.fresh())
        self._context = context
        self._turn = 0
        self._same = any(result.tool == STEP for result in context.tool_results)
        """Whether all actions so far are those of the context, and their answers were kept."""

    async def reset(self, task: Task) -> Observation:
        plain, notes = without_notes(task)
        opening = await self._inner.reset(plain)
        if opening.messages != self._context.messages:
            raise ReplayVoid("the environment opens this task with other messages.")
        return shown_with(self._inner, opening, notes)

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        step = await self._inner.step(action, truncated=truncated)
        number, self._turn = self._turn, self._turn + 1
        self._same = self._same and number < len(self._context.actions) and self._context.actions[number] == action
        if self._same and tool_result(self._context, STEP, _step(number, action)).result != step.observation:
            raise ReplayVoid(f"the world answers action {number + 1} otherwise than it did.")
        return step


def _step(turn: int, action: str) -> dict[str, Any]:
    return {"turn": turn, "action": action}


def tool_result(context: Context, tool: str, arguments: dict[str, Any], execute: Execute | None = None) -> ToolResult:
    """What a tool answered in this context.

    Raises:
        ReplayVoid: the call was not made then, and there is no sandbox to make it in now.
    """
    call = tool_call_hash(tool, arguments)
    for stored in context.tool_results:
        if stored.call == call:
            return stored
    if execute is None:
        raise ReplayVoid(f"the replay calls {tool} in a way the context has no result for.", "Give it a sandbox.")
    return execute(tool, arguments)


def run_of(episode: Episode) -> Run:
    """What one side of a trial is judged by."""
    read = sum(len(turn.context_ids) for turn in episode.turns)
    return Run(
        reward=episode.reward,
        steps=len(episode.turns),
        tokens=read + episode.num_tokens,
        fingerprint=fingerprint(episode),
    )


def fingerprint(episode: Episode) -> str:
    """Hash of the tokens that an episode drew."""
    return content_hash("drawn", [turn.completion.token_ids for turn in episode.turns])


def config_hash(world: World, params: SamplingParams, context_tokens: int) -> str:
    """Hash of all that shapes a run besides its task, its seed and the weights."""
    return content_hash("configuration", (world, replace(params, seed=None), context_tokens))


def weights_hash(directory: Path) -> str:
    """Hash of a checkpoint: its weights, its configuration and its tokenizer.

    Raises:
        ModelError: there are no weights.
    """
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{directory} holds no .safetensors file.", "Name a checkpoint's folder.")
    found = blake3()
    for path in [*weights, *sorted(directory.glob("*.json"))]:
        found.update(path.name.encode() + b"\0")
        found.update_mmap(path)
    return found.hexdigest()[:HASH_CHARS]
