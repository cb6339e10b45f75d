"""One episode: what it records, and what becomes of it when something breaks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shoal.engine.local import LocalEngine
from shoal.engine.tokenizer import Tokenizer
from shoal.envs.base import Environment, Observation, Step
from shoal.errors import CapacityError
from shoal.protocol.codec import decode, encode
from shoal.protocol.episode import Episode, Task
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams
from shoal.rollout.episode import EpisodeSpec, run_episode
from tiny import Broken, FirstDigit, TwoTurns

TASK = Task(env="digit", id="train-3", seed=0)


def spec(**changes: object) -> EpisodeSpec:
    params = SamplingParams(max_tokens=8, seed=5)
    return EpisodeSpec(**{"id": "e", "group": "g", "index": 0, "task": TASK, "params": params, **changes})  # type: ignore[arg-type]


class Watched(TwoTurns):
    """Counts how often it is closed."""

    num_closed = 0

    async def close(self) -> None:
        self.num_closed += 1


async def run(engine: LocalEngine, env: Environment, *, context_tokens: int = 64, **changes: object) -> Episode:
    episode = await run_episode(spec(**changes), engine, engine.tokenizer, env, context_tokens=context_tokens)
    assert decode(encode(episode), Episode) == episode, "what is sent is what was sampled"
    return episode


async def test_the_sequence_is_what_was_read_and_drawn(engine: LocalEngine) -> None:
    env = Watched(name="digit")
    episode = await run(engine, env)
    assert episode.outcome == "done" and len(episode.turns) == 2 and env.num_closed == 1
    first, second = episode.turns
    assert list(first.context_ids) == engine.tokenizer.prompt((await env.reset(TASK)).messages)
    assert list(second.context_ids) == engine.tokenizer.continuation(first.completion.token_ids, "again?")
    assert first.completion.token_ids != second.completion.token_ids, "each turn has a seed of its own"
    again = await run(engine, Watched(name="digit"))
    assert [t.completion for t in again.turns] == [t.completion for t in episode.turns], "the seed decides"
    score = await env.score(TASK, [t.completion.text for t in episode.turns], truncated=[True, True])
    assert score.reward == episode.reward and score.info == episode.reward_parts


async def test_a_full_context_ends_an_episode_early_and_well(engine: LocalEngine) -> None:
    first = await run(engine, TwoTurns(name="digit"), context_tokens=14)
    assert first.outcome == "done" and len(first.turns) == 1
    assert sum(len(t.context_ids) + len(t.completion.token_ids) for t in first.turns) <= 14


async def test_a_prompt_without_room_is_void(engine: LocalEngine) -> None:
    episode = await run(engine, FirstDigit(name="digit"), context_tokens=5)
    assert episode.outcome == "void" and "the context is 5" in episode.void_reason


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        (Broken(name="digit"), "ValueError in environment 'digit': the author divided by a banana"),
        (FirstDigit(name="other"), "no such task"),
    ],
)
async def test_a_fault_of_the_environment_is_void(engine: LocalEngine, env: Environment, reason: str) -> None:
    task = TASK if isinstance(env, Broken) else Task(env="digit", id="nonsense", seed=0)
    episode = await run(engine, env, task=task)
    assert episode.outcome == "void" and reason in episode.void_reason
    assert episode.reward == 0 and episode.reward_parts == {}


class Failing:
    """A sampler that fails at its second turn."""

    def __init__(self, engine: LocalEngine, how: str) -> None:
        self.engine, self.how, self.num_asked = engine, how, 0

    async def sample(self, request: SampleRequest) -> Completion:
        self.num_asked += 1
        if self.num_asked == 1:
            return await self.engine.sample(request)
        if self.how == "raises":
            raise CapacityError("no room.")
        return Completion(token_ids=(5,), logprobs=(-1.0,), versions=(0,), finish="cancelled", text="1")


@pytest.mark.parametrize(("how", "reason"), [("raises", "no room."), ("cancels", "'cancelled'")])
async def test_a_fault_of_the_sampler_is_void(engine: LocalEngine, how: str, reason: str) -> None:
    env = Watched(name="digit")
    sampler = Failing(engine, how)
    episode = await run_episode(spec(), sampler, engine.tokenizer, env, context_tokens=64)
    assert episode.outcome == "void" and reason in episode.void_reason and env.num_closed == 1


class Unclosable(FirstDigit):
    """Fails when it is closed."""

    async def close(self) -> None:
        raise OSError("stuck in the door")


async def test_an_environment_that_cannot_be_closed_costs_nothing(engine: LocalEngine) -> None:
    assert (await run(engine, Unclosable(name="digit"))).outcome == "done"


class Sleeping(Watched):
    """Never ends its first step."""

    async def reset(self, task: Task) -> Observation:
        await asyncio.sleep(3600)
        return await super().reset(task)

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        raise AssertionError


async def test_a_cancelled_episode_closes_its_environment(tiny_model: Path) -> None:
    env = Sleeping(name="digit")
    tokenizer = Tokenizer(tiny_model)
    task = asyncio.create_task(run_episode(spec(), None, tokenizer, env, context_tokens=64))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert env.num_closed == 1
