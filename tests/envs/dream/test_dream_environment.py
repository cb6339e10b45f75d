"""Dreams as episodes: experts among them to the letter, judged by what is known, and nothing claimed that cannot be."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from dream_cases import WEB, episode, make_reader, write_episodes
from shoal.config.learner import AsyncLearner
from shoal.coordinator.verification import replay
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.engine.tokenizer import Tokenizer
from shoal.envs.dream.environment import DreamEnvironment, experts
from shoal.envs.dream.world import close_worlds, open_world
from shoal.envs.registry import make
from shoal.envs.web.actions import Click, GoBack, Scroll
from shoal.errors import ConfigError, RecordError, StorageError, TaskError
from shoal.learner.batch import trajectories
from shoal.learner.forward import response_logprobs
from shoal.learner.loading import load_policy
from shoal.learner.trainer import Trainer
from shoal.protocol.episode import Episode
from shoal.protocol.sampling import SamplingParams
from shoal.rollout.episode import EpisodeSpec, run_episode

PARAMS = SamplingParams(max_tokens=40, temperature=1.0, seed=4)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_episodes(tmp_path_factory.mktemp("dreams") / "experts", [episode(seed) for seed in range(6)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reader(tmp_path_factory.mktemp("policy") / "model")


def environment(collected: Path, **settings: Any) -> DreamEnvironment:
    made = make("dream", {"data": [str(collected)], "world": "copy", "web": WEB, **settings}, name="dream")
    assert isinstance(made, DreamEnvironment)
    return made


async def rollouts(env: DreamEnvironment, model: Path, count: int) -> list[Episode]:
    """Rollouts of one task by the tiny model, as a worker makes them."""
    task = env.task("train", 1, 0)
    async with LocalEngine(LocalModel("tiny", model), dtype="fp32", device="cpu", context_tokens=8000) as engine:
        return [
            await run_episode(
                EpisodeSpec(f"e{n}", "g", n, task, replace(PARAMS, seed=1000 + n)),
                engine,
                engine.tokenizer,
                env.fresh(),
                context_tokens=8000,
            )
            for n in range(count)
        ]


async def test_an_experts_rollout_is_what_the_expert_did(collected: Path, model: Path) -> None:
    env = environment(collected, expert_share=1.0)
    (one,) = await rollouts(env, model, 1)
    assert one.outcome == "done" and one.reward == 1.0, one.void_reason
    found = experts((str(collected),))[one.task.id.rpartition("#")[0]]
    place = int(one.task.id.rpartition("#")[2])
    assert [turn.completion.text for turn in one.turns] == [moment.action for moment in found.moments[place:]]
    assert all(turn.given for turn in one.turns) and one.reward_parts["expert"] == 1.0
    assert (await replay(one, env)).problem == ""
    # What is said to be given must be what was really done; and no other environment gives anything.
    first = one.turns[0]
    forged = replace(one, turns=(replace(first, completion=replace(first.completion, text="go_back")), *one.turns[1:]))
    assert "not what its expert did" in (await replay(forged, env)).problem
    half = replace(one, turns=(replace(first, given=False), *one.turns[1:]))
    if len(one.turns) > 1:
        assert "not what its expert did" in (await replay(half, env)).problem
    assert "gives none" in (await replay(one, make("arithmetic", {}, name="dream"))).problem


async def test_a_share_of_the_rollouts_is_the_experts(collected: Path, model: Path) -> None:
    found = await rollouts(environment(collected, expert_share=0.5, max_dream_steps=2), model, 12)
    shares = [one.reward_parts["expert"] for one in found if one.outcome == "done"]
    assert len(shares) == 12 and 0 < sum(shares) < 12
    for one in found:
        assert len({turn.given for turn in one.turns}) == 1 and len(one.turns) <= 3


async def test_a_dream_that_is_asked_for_an_answer_is_judged_by_it(collected: Path) -> None:
    env = environment(collected, expert_share=0.0)
    task = env.task("train", 0, 0)
    wanted = experts((str(collected),))[task.id.rpartition("#")[0]].moments[-1].action
    for said, reward in ((wanted, 1.0), ("stop [a lot]", 0.0)):
        opening = await env.reset(task)
        assert "Task: " in opening.messages[0].content and opening.given is None
        step = await env.step(said)
        assert step.done and step.reward == reward and step.info["checked"] == 1.0
    await env.reset(task)
    steps = [await env.step("click [9999]") for _ in range(env.settings.max_dream_steps)]
    assert "There is no element [9999]" in steps[0].observation and steps[0].grammar is not None
    assert [step.done for step in steps] == [False] * 4 + [True] and steps[-1].reward == 0.0
    assert steps[-1].info["invalid_actions"] == 5.0
    await env.close()


async def test_claims_of_dreams_are_held_to_what_can_be_known(collected: Path, model: Path) -> None:
    env = environment(collected, expert_share=0.0, max_dream_steps=2)
    (one,) = await rollouts(env, model, 1)
    assert one.outcome == "done" and (await replay(one, env)).problem == ""
    liar = replace(one, reward=1.0, reward_parts={**one.reward_parts, "strict": 1.0, "lenient": 1.0})
    assert "claims reward 1" in (await replay(liar, env)).problem, "nothing was answered"
    assert (await replay(replace(one, reward=0.5), env)).problem
    with pytest.raises(RecordError):
        await env.judge(replace(one, turns=one.turns * 3))
    with pytest.raises(TaskError, match="no page that was collected"):
        await env.reset(replace(one.task, id="shop/price_of/77/reference/77#0"))


def test_where_dreams_begin(collected: Path, tmp_path: Path) -> None:
    env = environment(collected)
    tasks = [env.task("train", n, 1) for n in range(40)]
    assert tasks == [env.fresh().task("train", n, 1) for n in range(40)]
    assert {task.id.rpartition("#")[2] for task in tasks} == {"0", "1", "2"}
    first = environment(collected, start="first")
    assert {first.task("train", n, 1).id.rpartition("#")[2] for n in range(40)} == {"0"}
    short = environment(collected, max_dream_steps=1)
    assert {short.task("train", n, 1).id.rpartition("#")[2] for n in range(40)} == {"2"}
    with pytest.raises(TaskError, match="max_dream_steps = 1"):
        environment(collected, max_dream_steps=1, start="first").task("train", 0, 0)
    with pytest.raises(StorageError):
        environment(tmp_path / "nothing").task("train", 0, 0)
    held = write_episodes(tmp_path / "held", [episode(1, split="heldout"), episode(2, reward=0.0)])
    with pytest.raises(TaskError, match="no success"):
        environment(held).task("train", 0, 0)
    with pytest.raises(ConfigError, match="wrlds"):
        environment(collected, web={"wrlds": ["shop"]})


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """All of it, which is forgotten."""
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def test_what_nobody_drew_is_learnt_as_if_it_had_just_been_drawn(model: Path, collected: Path) -> None:
    """GSPO's gradient is then that of 1/N Σ A_i · mean_t log π, whatever stands in the log-probabilities."""
    found = asyncio.run(rollouts(environment(collected, expert_share=0.5, max_dream_steps=2), model, 8))
    assert {one.reward for one in found} == {0.0, 1.0}
    for one in found:
        (row,) = trajectories(one, 1.0)
        assert bool(np.isnan(row.behaviour[row.trained]).all()) is one.turns[0].given
        assert bool(np.isnan(row.behaviour).any()) is one.turns[0].given
    settings = AsyncLearner.model_validate({"lr": 1e-3, "device": "cpu", "loss": {"type": "gspo"}})
    trainer = Trainer(load_policy(LocalModel("tiny", model), "fp32", "cpu"), settings, tokenizer=Tokenizer(model))
    marked = [replace(one, reward=float(place == 0)) for place, one in enumerate(e for e in found if e.turns[0].given)]
    batch = trainer.batch(marked)
    result = trainer.forward_backward(batch)
    assert result.stats.ratio_max == result.stats.ratio_min == 1.0
    learnt = gradient(trainer.model)
    for micro in batch.micro_batches:
        logprobs, _ = response_logprobs(trainer.model, micro, allowed=trainer._allowed(micro))
        weights = torch.from_numpy(micro.advantages / micro.lengths).float() / len(marked)
        (-(weights * logprobs).sum()).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(learnt, gradient(trainer.model), rtol=1e-4, atol=1e-7)
    metrics = trainer.step(found)
    assert (metrics["applied"], metrics["nonfinite"]) == (1.0, 0.0)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=0.02)


async def test_a_world_model_answers_with_pages_whatever_it_has_learnt(reader: Path, collected: Path) -> None:
    """The tiny model writes nonsense, and under the grammar that is a page."""
    found = experts((str(collected),))
    start = next(iter(found.values()))
    try:
        world = open_world(str(reader), max_tokens=200, device="cpu")
        page = start.moments[1].page
        for action in (Click("11"), Click("16")):
            came = await world.next(start.instruction, page, action)
            came.page.check()
            assert came.reason or came.cut
        home = start.moments[0].page
        assert (await world.next(start.instruction, page, GoBack(), home)).page == home
        assert (await world.next(start.instruction, page, Scroll("down"))).page == page
        assert await world.done(start.instruction, ["click link 'x'"], page) in (True, False)
        assert open_world(str(reader), device="cpu").speaker is not world.speaker
    finally:
        await close_worlds()
