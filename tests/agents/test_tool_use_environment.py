"""Tool use as an environment: its splits, its rewards, and an episode of a real model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.agents.environment import ToolUse, question
from shoal.agents.tools.schema import Schema
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.envs.base import Observation, Step
from shoal.envs.registry import make
from shoal.errors import ConfigError, TaskError
from shoal.protocol.episode import Task
from shoal.protocol.sampling import SamplingParams
from shoal.rollout.episode import EpisodeSpec, run_episode

PATH = "shoal.agents.environment:ToolUse"


def calls(*made: tuple[str, dict[str, object]]) -> str:
    return json.dumps({"calls": [{"tool": tool, "arguments": arguments} for tool, arguments in made]})


def reply(number: object) -> str:
    return json.dumps({"answer": str(number)})


async def solve(env: ToolUse, task: Task) -> tuple[float, dict[str, float]]:
    """What a policy that reads the question and the results earns."""
    text = (await env.reset(task)).messages[-1].content
    numbers = [int(one) for one in re.findall(r"\d+", text)]
    if "*" in text:
        first = await env.step(calls(("multiply", {"x": numbers[0], "y": numbers[1]})))
        value = int(json.loads(first.observation.partition(": ")[2]))
        last = await env.step(reply(value + sum(numbers[2:])))
        return first.reward + last.reward, last.info
    names = re.findall(r"one ([a-z]+)", text) or re.findall(r"the ([A-Z][a-z]+)", text)
    tool, key = ("price", "item") if "cost" in text else ("read", "document")
    first = await env.step(calls(*((tool, {key: name}) for name in names)))
    found = [int(re.findall(r"\d+", line.partition(": ")[2])[0]) for line in first.observation.split("\n")]
    last = await env.step(reply(sum(found)))
    return first.reward + last.reward, last.info


async def test_every_question_is_answered_by_its_tools() -> None:
    env = make(PATH, {}, name="tools")
    assert isinstance(env, ToolUse)
    for split in ("train", "heldout"):
        for index in range(60):
            earned, info = await solve(env, env.task(split, index, 3))  # type: ignore[arg-type]
            assert earned == 1.0 and info == {"strict": 1.0, "called": 1.0, "useful": 1.0}


def test_splits_share_no_question_and_tasks_are_the_same_everywhere() -> None:
    env = ToolUse(name="tools")
    texts = {}
    for split in ("train", "heldout"):
        tasks = [env.task(split, index, 0) for index in range(300)]  # type: ignore[arg-type]
        assert tasks == [env.fresh().task(split, index, 0) for index in range(300)]  # type: ignore[arg-type]
        parts = [task.id.partition("-") for task in tasks]
        texts[split] = {question(kind, int(number)).text for kind, _, number in parts}  # type: ignore[arg-type]
        assert {kind for kind, _, _ in parts} == {"arithmetic", "lookup", "documents"}
    assert not texts["train"] & texts["heldout"]
    assert len({task.id for task in env.heldout(50)}) == 50


async def test_what_earns_nothing() -> None:
    env = ToolUse(name="tools")
    task = Task(env="tools", id="arithmetic-7", seed=0)
    await env.reset(task)
    assert (await env.step(reply(1))).reward == 0
    await env.reset(task)
    for action in ("no", calls(("wipe", {})), calls(("add", {"x": "one", "y": 1}))):
        step = await env.step(action)
        assert step.reward == 0 and not step.done and step.observation and step.grammar is not None
    assert (await env.step(calls(("add", {"x": 1, "y": 1})))).done, "the last turn is for an answer"
    with pytest.raises(TaskError):
        await env.reset(Task(env="tools", id="arithmetic-x", seed=0))
    with pytest.raises(ConfigError):
        make(PATH, {"kinds": ["chess"]})


async def test_under_seen_only_what_was_read_can_be_written() -> None:
    env = make(PATH, {"constrain": "seen"}, name="tools")
    task = Task(
        env="tools", id=f"arithmetic-{next(n for n in range(99) if '+' in question('arithmetic', n).text)}", seed=0
    )
    began = await env.reset(task)
    a, b, c = (int(one) for one in re.findall(r"\d+", began.messages[-1].content))

    def allowed(step: Step | Observation, action: str) -> bool:
        assert step.grammar is not None
        return not Schema(json.loads(step.grammar.text), "decision").problem(json.loads(action))

    first, second = calls(("multiply", {"x": a, "y": b})), calls(("add", {"x": a * b, "y": c}))
    assert allowed(began, first) and not allowed(began, second) and not allowed(began, reply(a * b + c))
    made = await env.step(first)
    assert allowed(made, second) and allowed(made, reply(a * b)) and not allowed(made, reply(1))
    summed = await env.step(second)
    assert (await env.step(reply(a * b + c))).info["strict"] == 1.0
    assert allowed(summed, reply(a * b + c)) and not allowed(summed, calls(("price", {"item": "cost"})))

    await env.reset(env.task("train", 1, 0))
    for _ in range(3):
        failed = await env.step(calls(("price", {"item": "cost"})))
    assert allowed(failed, reply("unknown")) and not allowed(failed, reply(12)), "no number was read"


actions_drawn = st.lists(
    st.one_of(st.text(max_size=40), st.just(calls(("multiply", {"x": 12, "y": 12}))), st.just(reply(3))),
    min_size=1,
    max_size=4,
)


@settings(max_examples=30)
@given(actions_drawn)
async def test_any_actions_replay_to_the_same_reward(actions: list[str]) -> None:
    env, task = ToolUse(name="tools"), Task(env="tools", id="lookup-12", seed=0)
    await env.reset(task)
    total, played = 0.0, []
    for action in actions:
        step = await env.step(action)
        total += step.reward
        played.append(action)
        if step.done:
            break
    assert 0 <= total <= 1
    assert (await env.score(task, played)).reward == total


async def test_an_episode_of_a_model_is_decisions_only(model: Path) -> None:
    env = ToolUse(name="tools")
    task = env.task("train", 0, 0)
    async with LocalEngine(LocalModel("tiny", model), dtype="fp32", device="cpu", context_tokens=4096) as engine:
        params = SamplingParams(max_tokens=120, temperature=1.0, seed=5)
        spec = EpisodeSpec(id="e", group="g", index=0, task=task, params=params)
        episode = await run_episode(spec, engine, engine.tokenizer, env, context_tokens=4096)
    assert episode.outcome == "done" and episode.turns
    assert all(turn.completion.text.startswith(('{"calls":[{"tool":"', '{"answer":"')) for turn in episode.turns)
