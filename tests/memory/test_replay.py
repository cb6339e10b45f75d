"""A packed episode can be checked anywhere without a model, and is sampled again, token by token, with one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.envs.registry import make
from shoal.errors import RecordError
from shoal.memory.recalling import Noting, noted
from shoal.memory.records import Context, ToolResult, World
from shoal.memory.replay import (
    ReplayVoid,
    Sampled,
    confirm,
    context_of,
    fingerprint,
    pack,
    replay,
    tool_result,
    weights_hash,
)
from shoal.protocol.codec import from_json, to_json
from shoal.protocol.episode import Episode, Turn
from shoal.protocol.sampling import Completion, SamplingParams
from shoal.rollout.episode import EpisodeSpec, run_episode


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


AGAIN = """
import asyncio, sys
from pathlib import Path
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.envs.registry import make
from shoal.memory.records import Context
from shoal.memory.replay import replay, weights_hash
from shoal.protocol.codec import from_json

async def main(model):
    async with LocalEngine(LocalModel("tiny", model), dtype="fp32", device="cpu", max_sequences=4) as engine:
        for line in sys.stdin.read().splitlines():
            context = from_json(line, Context)
            assert context.model == weights_hash(model)
            env = make(context.world.kind, context.world.settings, name=context.task.env)
            done = await replay(context, env, engine, engine.tokenizer)
            print(context.id, done.identical, done.run.reward == context.reward, done.run.steps)

asyncio.run(main(Path(sys.argv[1])))
"""


async def contexts_of(tiny_model: Path, temperature: float = 0.0) -> list[Context]:
    """Episodes of one and two turns, every other one with notes."""
    found = []
    async with LocalEngine(LocalModel("tiny", tiny_model), dtype="fp32", device="cpu", max_sequences=4) as engine:
        for kind in ("tiny:FirstDigit", "tiny:TwoTurns"):
            world, env = World(kind=kind), make(kind, {}, name=kind.partition(":")[2])
            for number in range(3):
                notes = "- a note (see above)" if number % 2 else ""
                task = noted(env.task("train", number, 0), notes)
                params = SamplingParams(max_tokens=8, temperature=temperature, seed=number)
                spec = EpisodeSpec("e", "e", 0, task, params)
                episode = await run_episode(spec, engine, engine.tokenizer, Noting(env.fresh()), context_tokens=200)
                assert episode.outcome == "done", episode.void_reason
                sampled = Sampled(params, 200, weights_hash(tiny_model))
                found.append(await context_of(episode, env, world, sampled))
    return found


@pytest.mark.slow
async def test_greedy_episodes_are_drawn_again_in_another_process_with_their_notes(tiny_model: Path) -> None:
    contexts = await contexts_of(tiny_model)
    assert [bool(context.recalled) for context in contexts] == [False, True, False] * 2
    for context in contexts:
        assert context.world is not None
        env = make(context.world.kind, context.world.settings, name=context.task.env)
        assert await confirm(context, env) == ""
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, str(tiny_model)],
        input=b"\n".join(map(to_json, contexts)),
        capture_output=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr.decode()
    turns = ["1"] * 3 + ["2"] * 3
    assert [line.split() for line in done.stdout.decode().splitlines()] == [
        [context.id, "True", "True", count] for context, count in zip(contexts, turns, strict=True)
    ]


async def test_a_replay_notices_another_world_and_another_reader(tiny_model: Path) -> None:
    context = (await contexts_of(tiny_model))[3]
    async with LocalEngine(LocalModel("tiny", tiny_model), dtype="fp32", device="cpu", max_sequences=4) as engine:
        env = make("tiny:TwoTurns", {}, name="TwoTurns")
        assert (await replay(context, env, engine, engine.tokenizer)).identical
        noticed = await replay(replace(context, outputs="0" * 40), env, engine, engine.tokenizer)
        assert not noticed.identical and fingerprint(noticed.episode) == context.outputs
        first = context.tool_results[0]
        other = replace(context, tool_results=(replace(first, result="something else?"), *context.tool_results[1:]))
        with pytest.raises(ReplayVoid, match="answers action 1 otherwise"):
            await replay(other, env, engine, engine.tokenizer)
        with pytest.raises(ReplayVoid, match="other messages"):
            await replay(replace(context, messages=context.messages[:0]), env, engine, engine.tokenizer)
        with pytest.raises(ReplayVoid, match="how it was sampled"):
            await replay(replace(context, params=None), env, engine, engine.tokenizer)


async def test_an_episode_that_claims_another_reward_is_not_packed(tiny_model: Path) -> None:
    env = make("tiny:FirstDigit", {}, name="FirstDigit")
    completion = Completion(token_ids=(1,), logprobs=(0.0,), versions=(0,), finish="stop", text="x")
    turn = Turn(context_ids=(1,), observation="", completion=completion)
    episode = Episode(
        id="e", group="g", index=0, task=env.task("train", 0, 0), turns=(turn,), outcome="done", reward=1.0
    )
    with pytest.raises(RecordError, match="claims 1"):
        await context_of(episode, env, World(kind="tiny:FirstDigit"), Sampled(SamplingParams(), 64, "m"))


async def test_void_episodes_are_not_packed() -> None:
    context = await packed("12")
    episode = Episode(id="e", group="g", index=0, task=context.task, turns=(), outcome="void", void_reason="lost")
    with pytest.raises(RecordError, match="void"):
        pack(episode, (), model="m", config="c")
