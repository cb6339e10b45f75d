"""Packing a finished episode so that any node can check it, and checking it there without a model.

`pack` makes the context; `confirm` plays its recorded actions through a fresh instance of the environment and compares
what that earned. `tool_result` is how a replay with a model answers its tool calls: from what was stored, else by
running the call again in a sandbox that the caller hands in, else the replay is void.

Invariants: a context that `confirm` accepts earns the same reward wherever its environment is; a tool call with no
stored result and no sandbox never becomes a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shoal.envs.base import Environment
from shoal.errors import RecordError, TaskError
from shoal.memory.records import Context, Scope, ToolResult, tool_call_hash
from shoal.protocol.chat import Message
from shoal.protocol.episode import Episode

REWARD_TOLERANCE = 1e-9

Execute = Callable[[str, dict[str, Any]], ToolResult]
"""Runs a tool call again, in a sandbox."""


class ReplayVoid(RecordError):
    """A replay that lacks what it needs; no evidence either way."""


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
    """The context of a finished episode.

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
        reward=episode.reward,
        scope=scope or Scope(),
    )
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
    # What memory added to a message is not the environment's.
    if not context.recalled and opening != context.messages:
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
