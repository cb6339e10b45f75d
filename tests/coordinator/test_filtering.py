"""Filters of groups and tasks: what is left out, what is drawn instead, how long, and what a resume keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shoal.config import Config, config_from
from shoal.coordinator.filtering import Filtering
from shoal.coordinator.rundir import RunDir
from shoal.coordinator.tasks import MAX_DRAWS, TaskSource
from shoal.envs.registry import make
from shoal.protocol.episode import Episode, Task


def config(**rollout: Any) -> Config:
    return config_from({"envs": {"a": {"type": "arithmetic"}}, "rollout": {"groups_per_step": 2, **rollout}})


def group(task: Task, rewards: list[float]) -> list[Episode]:
    return [
        Episode(id=f"{task.id}/{n}", group="g", index=n, task=task, turns=(), outcome="done", reward=reward)
        for n, reward in enumerate(rewards)
    ]


def task(name: str) -> Task:
    return Task(env="a", id=name, seed=0)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run")


def test_by_default_nothing_is_filtered(run: RunDir) -> None:
    filtering = Filtering(config(), run)
    assert all(filtering.keeps(group(task("1 + 1"), [1.0] * 4)) for _ in range(50))
    assert filtering.wants(task("1 + 1"), 0, 1) and not filtering.is_on and filtering.num_left_out == 0


REWARDS = st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=4), max_size=60)


@given(REWARDS, st.integers(1, 3))
def test_no_more_than_the_limit_is_left_out_in_a_row(rewards: list[list[float]], limit: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        filtering = Filtering(config(dynamic_sampling=True, resample_limit=limit), RunDir.create(Path(folder) / "run"))
        kept = [filtering.keeps(group(task("t"), one)) for one in rewards]
    in_a_row = 0
    for one, was_kept in zip(rewards, kept, strict=True):
        assert was_kept or len(set(one)) == 1, "a group that teaches is never left out"
        in_a_row = 0 if was_kept else in_a_row + 1
        assert in_a_row <= 2 * limit
    assert filtering.num_left_out == kept.count(False)


def test_tasks_outside_the_range_are_mostly_passed_over(run: RunDir) -> None:
    filtering = Filtering(config(pass_rate=[0.2, 0.8]), run)
    assert filtering.keeps(group(task("easy"), [1.0] * 4)) and filtering.keeps(group(task("fair"), [1.0, 0.0]))
    again = sum(filtering.wants(task("easy"), number, 1) for number in range(1000))
    assert 50 < again < 200 and all(filtering.wants(task(name), 0, 1) for name in ("fair", "new"))
    filtering.keeps(group(task("easy"), [0.0] * 4))
    assert filtering.rate(task("easy")) == 0.5 and filtering.wants(task("easy"), 0, 1)
    filtering.save()
    assert Filtering(config(pass_rate=[0.2, 0.8]), run).rate(task("easy")) == 0.5


def test_another_task_is_drawn_and_the_draws_end(run: RunDir) -> None:
    settings = config()
    envs = {"a": make("arithmetic", {}, name="a")}
    asked: list[Task] = []

    def wants(one: Task, number: int, attempt: int) -> bool:
        asked.append(one)
        return attempt == 3

    source = TaskSource(settings, envs, wants)
    plain = TaskSource(settings, envs)
    found = source.group(5)
    assert asked[0] == plain.group(5) and found == asked[-1] and len(asked) == 3
    assert found == source.group(5), "the same draws each time"
    never = TaskSource(settings, envs, lambda *_: False)
    assert never.group(5).env == "a" and MAX_DRAWS > 3


def test_a_range_that_holds_nothing_is_refused() -> None:
    from shoal.errors import ConfigError

    with pytest.raises((ConfigError, ValidationError), match="pass_rate"):
        config(pass_rate=[0.8, 0.2])
