"""Generators of the reasoning-gym library: found by name, checked, scored by their own scorers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.envs.base import Environment
from shoal.envs.reasoning_gym import CHUNK_ITEMS, HELDOUT_SEED
from shoal.envs.registry import make
from shoal.errors import ConfigError, ShoalError, TaskError
from shoal.protocol.codec import decode, encode
from shoal.protocol.episode import Task

factory = pytest.importorskip("reasoning_gym.factory", reason="needs reasoning-gym")

FIVE = ["chain_sum", "leg_counting", "spell_backward", "number_sorting", "simple_equations"]

COMPOSITE = {"datasets": [{"name": "chain_sum"}, {"name": "puzzle24", "weight": 2.0, "config": {"max_value": 6}}]}

REPLIES = ["", "7", "<answer></answer>", "<answer>[[1, 2], [3]]</answer>", '<answer>{"a": 1}</answer>', "A\nB C, D"]


def gym(name: str, **settings: Any) -> Environment:
    config = {"config": COMPOSITE} if name == "composite" else {}
    return make("reasoning_gym", {"dataset": name, **config, **settings})


async def play(name: str) -> None:
    """One task of each split asked twice alike, and graded whatever the reply."""
    env = gym(name)
    for task in (env.task("train", 70, 3), env.heldout(2)[-1]):
        task = decode(encode(task), Task)
        opening = await env.fresh().reset(task)
        assert opening == await gym(name).reset(task)
        assert opening.messages[-1].content.endswith("</answer>.")
        oracle = _oracle(env, task)
        for reply in REPLIES:
            step = await env.score(task, [reply])
            assert step.done
            assert 0 <= step.info["strict"] <= step.info["lenient"] <= 1
        if oracle is not None:
            right = await env.score(task, [f"So it is <answer>{oracle}</answer>"])
            cut = await env.score(task, [f"So it is <answer>{oracle}</answer>"], truncated=[True])
            assert right.reward > 0.9
            assert right.info["scorer_failed"] == 0
            assert cut.reward == 0


def _oracle(env: Any, task: Task) -> str | None:
    answer = env._checked(task)["answer"]
    return None if answer is None else str(answer)


@pytest.mark.parametrize("name", FIVE)
async def test_five_generators(name: str) -> None:
    await play(name)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_all_generators() -> None:
    """Every generator of the installed version is walked; those that fail are listed with their reasons."""
    failed = {}
    for name in sorted(factory.DATASETS):
        try:
            await play(name)
        except (ShoalError, AssertionError) as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    assert len(factory.DATASETS) > 90
    assert not failed, "\n".join(f"{name}: {reason}" for name, reason in failed.items())


async def test_answers_are_read_where_they_were_asked_for() -> None:
    tag, line = gym("chain_sum"), gym("chain_sum", answer="line", instruction="")
    task = tag.task("train", 0, 0)
    oracle = _oracle(tag, task)
    bare, marked, wordy = f"I add.\n{oracle}", f"<answer>{oracle}</answer> Yes!", f"It comes to {oracle}, I think"
    for env, reply, strict in [(tag, marked, 1), (tag, bare, 0), (tag, wordy, 0), (line, bare, 1), (line, wordy, 0)]:
        step = await env.score(task, [reply])
        assert (step.info["strict"] > 0.5, step.info["lenient"]) == (bool(strict), 1), reply


def test_splits_share_no_seed_and_cursors_are_pure() -> None:
    env = gym("chain_sum")
    trained = {(t.seed, t.data["item"]) for t in (env.task("train", i, 5) for i in range(3 * CHUNK_ITEMS))}
    assert len(trained) == 3 * CHUNK_ITEMS
    assert all(seed + item < HELDOUT_SEED for seed, item in trained)
    heldout = env.heldout(100)
    assert len({t.id for t in heldout}) == 100
    assert all(t.seed >= HELDOUT_SEED for t in heldout)
    assert env.task("train", 99, 5) == env.fresh().task("train", 99, 5) != env.task("train", 99, 6)


async def test_a_task_that_is_another_question_here_is_refused() -> None:
    env = gym("chain_sum")
    task = env.task("train", 0, 0)
    for bad in (
        Task(env="x", id=task.id, seed=task.seed + 1, data=task.data),
        Task(env="x", id=task.id, seed=2**40, data=task.data),
        Task(env="x", id=task.id, seed=task.seed, data={"item": CHUNK_ITEMS}),
        Task(env="x", id=task.id, seed=task.seed, data={"item": "0"}),
        Task(env="x", id=task.id, seed=task.seed),
    ):
        with pytest.raises(TaskError):
            await env.reset(bad)
    with pytest.raises(TaskError, match="PYTHONHASHSEED"):
        await env.reset(Task(env="x", id="chain_sum-0", seed=task.seed, data=task.data))


async def test_an_answer_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    for name in ("spiral_matrix", "countdown", "simple_integration", "n_queens"):
        env = gym(name)
        attack = f"<answer>open({str(mark)!r}, 'w')</answer>"
        step = await env.score(env.task("train", 0, 0), [attack])
        assert step.reward < 0.1
    assert not mark.exists()


async def test_a_composite_guards_each_member(tmp_path: Path) -> None:
    env, mark = gym("composite"), tmp_path / "owned"
    asked = set()
    for index in range(12):
        task = env.task("train", index, 0)
        asked.add((await env.reset(task)).messages[0].content[:8])
        assert (await env.score(task, [f"<answer>open({str(mark)!r}, 'w')</answer>"])).reward < 0.1
    assert len(asked) > 1
    assert not mark.exists()


async def test_a_scorer_that_fails_gives_nothing() -> None:
    env = gym("prime_factorization")
    step = await env.score(env.task("train", 0, 0), ["<answer>banana</answer>"])
    assert step.reward == 0
    assert step.info["scorer_failed"] == 1


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"dataset": "chainsum"}, TaskError, ["no generator 'chainsum'", "Did you mean 'chain_sum'"]),
        ({"dataset": "chain_sum", "config": {"min_term": 2}}, ConfigError, ["'min_term'", "Did you mean 'min_terms'"]),
        ({"dataset": "chain_sum", "config": {"seed": 2}}, ConfigError, ["'seed'"]),
        ({"dataset": "chain_sum", "config": {"min_terms": 0}}, ConfigError, ["refuses", "min_terms must be positive"]),
        ({"dataset": "chain_sum", "config": {"min_terms": "x"}}, ConfigError, ["refuses"]),
        ({"dataset": "composite"}, ConfigError, ["at least one dataset"]),
        ({"dataset": "composite", "config": {"datasets": [{"name": "nope"}]}}, TaskError, ["no generator 'nope'"]),
        ({"dataset": "composite", "config": {"datasets": [7]}}, TaskError, ["no generator ''"]),
        ({}, ConfigError, ["'dataset'"]),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[ShoalError], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        make("reasoning_gym", settings)
    for word in words:
        assert word in str(caught.value)


def test_another_process_asks_the_same_question() -> None:
    code = "from shoal.envs.registry import make; e = make('reasoning_gym', {'dataset': 'chain_sum'})"
    code += "; print(e.task('train', 3, 4).id, e.heldout(3)[2].id)"
    env = gym("chain_sum")
    here = f"{env.task('train', 3, 4).id} {env.heldout(3)[2].id}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == here
