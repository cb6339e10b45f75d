"""A packed episode can be checked anywhere, without a model."""

from __future__ import annotations

import subprocess
import sys

import pytest
from msgspec.structs import replace

from shoal.envs.registry import make
from shoal.errors import RecordError
from shoal.memory.records import Context, ToolResult
from shoal.memory.replay import ReplayVoid, confirm, pack, tool_result
from shoal.protocol.codec import from_json, to_json
from shoal.protocol.episode import Episode, Turn
from shoal.protocol.sampling import Completion


async def packed(reply: str) -> Context:
    env = make("arithmetic", {})
    task = env.task("train", 3, 7)
    opening = await env.reset(task)
    step = await env.step(reply)
    completion = Completion(token_ids=(1,), logprobs=(0.0,), versions=(0,), finish="stop", text=reply)
    turn = Turn(context_ids=(1,), observation="", completion=completion)
    episode = Episode(id="e", group="g", index=0, task=task, turns=(turn,), outcome="done", reward=step.reward)
    return pack(episode, opening.messages, model="m", config="c", sampling_seed=7)


async def test_a_true_context_is_confirmed_and_a_false_one_is_not() -> None:
    context = await packed("12")
    env = make("arithmetic", {})
    assert await confirm(context, env) == ""
    assert "earn" in await confirm(replace(context, reward=context.reward + 0.5), env)
    assert "messages" in await confirm(replace(context, messages=context.messages[:-1]), env)
    assert await confirm(replace(context, actions=("1", "2"), truncated=(False, False)), env)


async def test_a_hash_covers_everything_and_is_the_same_in_another_process() -> None:
    context = await packed("12")
    program = (
        "import sys\nfrom shoal.memory.records import Context\nfrom shoal.protocol.codec import from_json\n"
        "print(from_json(sys.stdin.read(), Context).id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=to_json(context),
        capture_output=True,
        check=True,
        timeout=60,
        env={"PYTHONHASHSEED": "99", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.decode().strip() == context.id
    assert from_json(to_json(context), Context) == context
    others = [
        replace(context, reward=0.25),
        replace(context, model="n"),
        replace(context, actions=("13",)),
        replace(context, tool_results=(ToolResult(tool="t", arguments={}, result="r"),)),
    ]
    assert len({context.id, *(other.id for other in others)}) == 5


async def test_tool_calls_come_from_what_was_stored_or_the_replay_is_void() -> None:
    stored = ToolResult(tool="add", arguments={"b": 2, "a": 1}, result="3")
    context = replace(await packed("12"), tool_results=(stored,))
    assert tool_result(context, "add", {"a": 1, "b": 2}) == stored
    with pytest.raises(ReplayVoid):
        tool_result(context, "add", {"a": 1, "b": 3})
    again = tool_result(context, "add", {"a": 1, "b": 3}, lambda t, a: ToolResult(tool=t, arguments=a, result="4"))
    assert again.result == "4"


async def test_void_episodes_are_not_packed() -> None:
    context = await packed("12")
    episode = Episode(id="e", group="g", index=0, task=context.task, turns=(), outcome="void", void_reason="lost")
    with pytest.raises(RecordError, match="void"):
        pack(episode, (), model="m", config="c")
