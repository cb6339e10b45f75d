"""The environment contract: settings, cursors, held-out lists, and scores recomputed by replay."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shoal.envs.base import Environment, Observation, Split, Step, parse_settings, stable_fraction, strict_and_lenient
from shoal.envs.registry import ENVIRONMENTS, find, make
from shoal.errors import ConfigError, RecordError, TaskError
from shoal.protocol.chat import Message
from shoal.protocol.episode import Task


class Counter(Environment):
    """Three turns; each action is worth its length. Only seven tasks exist."""

    open_episodes = 0
    turn = 0

    def task(self, split: Split, index: int, seed: int) -> Task:
        return Task(env=self.name, id=f"{split}-{(index * 3 + seed) % 7}", seed=seed)

    async def reset(self, task: Task) -> Observation:
        Counter.open_episodes += 1
        self.turn = 0
        return Observation((Message(role="user", content=task.id),))

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        self.turn += 1
        reward = 0.0 if truncated else float(len(action))
        return Step("more", reward, self.turn == 3, {"turn": float(self.turn)})

    async def close(self) -> None:
        Counter.open_episodes -= 1


async def test_score_adds_up_the_steps_and_reports_the_last_info() -> None:
    env = Counter()
    step = await env.score(env.task("train", 0, 0), ["a", "bb", "ccc"])
    assert (step.reward, step.done, step.info) == (6.0, True, {"turn": 3.0})
    unfinished = await env.score(env.task("train", 0, 0), ["a"])
    assert (unfinished.reward, unfinished.done) == (1.0, False)
    cut = await env.score(env.task("train", 0, 0), ["a", "bb"], truncated=[False, True])
    assert cut.reward == 1.0


async def test_score_refuses_episodes_that_nobody_can_have_played_and_closes_every_one() -> None:
    env = Counter()
    task = env.task("train", 0, 0)
    with pytest.raises(RecordError, match="after its end"):
        await env.score(task, ["a"] * 4)
    with pytest.raises(RecordError):
        await env.score(task, [])
    with pytest.raises(RecordError):
        await env.score(task, ["a"], truncated=[True, False])
    assert Counter.open_episodes == 0


def test_heldout_is_distinct_and_ends_where_a_world_has_no_more() -> None:
    assert len({task.id for task in Counter().heldout()}) == len(Counter().heldout()) == 7
    assert Counter().heldout(4) == Counter().heldout()[:4]


def test_tasks_continue_from_a_cursor() -> None:
    env = Counter(name="count")
    whole = [task for _, task in zip(range(9), env.tasks("train", seed=5), strict=False)]
    rest = [task for _, task in zip(range(4), env.tasks("train", seed=5, start=5), strict=False)]
    assert whole[5:] == rest
    assert whole[0].env == "count"
    assert list(env.tasks("heldout", start=5)) == env.heldout()[5:]


def test_stable_fraction_is_the_same_in_every_process() -> None:
    """Python's own hash of a string is not: two processes with other hash seeds must agree with this one."""
    code = "from shoal.envs.base import stable_fraction; print(repr(stable_fraction('a', 3)))"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert done.stdout.strip() == repr(stable_fraction("a", 3))


def test_strict_and_lenient_fall_back_to_the_reward() -> None:
    assert strict_and_lenient(0.5, {"strict": 0.0, "lenient": 1.0}) == (0.0, 1.0)
    assert strict_and_lenient(3.0, {}) == (1.0, 1.0)
    assert strict_and_lenient(float("nan"), {}) == (0.0, 0.0)


def test_the_registry_finds_every_name_and_gives_each_its_label() -> None:
    for name in ENVIRONMENTS:
        assert issubclass(find(name), Environment)
    env = make("arithmetic", {"level": "two_digit"}, name="sums")
    assert env.task("train", 0, 0).env == "sums"
    assert env.fresh().settings == env.settings
    assert env.fresh().name == "sums"


def test_importing_the_registry_imports_no_environment() -> None:
    code = "import sys, shoal.envs.registry; print([m for m in sys.modules if 'gym' in m or 'arithmetic' in m])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("aritmetic", ["aritmetic", "Did you mean 'arithmetic'", "sokoban"]),
        ("", ["there is no environment"]),
        ("no_such_package.module:World", ["cannot be imported", "PYTHONPATH"]),
        ("shoal.envs.arithmetic:Nothing", ["no environment class 'Nothing'"]),
        ("shoal.envs.arithmetic:Operation", ["no environment class"]),
    ],
)
def test_an_unknown_environment_is_named_with_what_to_do(kind: str, words: list[str]) -> None:
    with pytest.raises(TaskError) as caught:
        make(kind)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"levle": "basic"}, ["no setting 'levle'", "Did you mean 'level'", "chain_terms"]),
        ({"level": "hard"}, ["'level'", "'hard'", "two_digit"]),
        ({"chain_terms": 1}, ["'chain_terms'"]),
        ({"add": [5, 2]}, ["'add'", "lowest"]),
        ({"add": [0, 9], "level": "basic"}, ["not both"]),
        ({"divide": [0, 9]}, ["divide starts at 1"]),
        ({"wording": "Add!"}, ["{expression}"]),
    ],
)
def test_a_bad_setting_names_the_key_and_the_allowed_ones(settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(find("arithmetic").Settings, settings, "sums")
    assert "sums" in str(caught.value)
    for word in words:
        assert word in str(caught.value)
