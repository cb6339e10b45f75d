"""Episodes, runs and workers for tests of the coordinator: what a worker would send, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.config import Config, config_from
from shoal.coordinator.control import Control
from shoal.coordinator.rundir import RunDir
from shoal.protocol.episode import Episode, Task, Turn
from shoal.protocol.sampling import Completion
from shoal.protocol.work import Lease, StepReport, Submission
from tiny import FirstDigit, tiny_config

ENVIRONMENTS = {"digit": FirstDigit(name="digit")}


def config(tmp_path: Path, **changes: Any) -> Config:
    """A tiny run's configuration."""
    return config_from(tiny_config(tmp_path / "model", tmp_path / "runs", **changes))


def turn(
    text: str = "7",
    version: int = 0,
    *,
    num_tokens: int = 2,
    context: tuple[int, ...] = (2, 7, 1, 3),
    observation: str = "?",
) -> Turn:
    completion = Completion(
        token_ids=tuple(range(4, 4 + num_tokens)),
        logprobs=(-0.5,) * num_tokens,
        versions=(version,) * num_tokens,
        finish="stop",
        text=text,
    )
    return Turn(context_ids=context, observation=observation, completion=completion)


def episode(lease: Lease, index: int, node: str, *, text: str = "7", version: int | None = None) -> Episode:
    """What an honest worker would answer."""
    right = float(text[:1].isdigit())
    version = lease.min_version if version is None else version
    return Episode(
        id=f"{lease.id}/{index}",
        group=lease.group,
        index=index,
        task=lease.tasks[index],
        turns=(turn(text, version, observation=f"{lease.tasks[index].id.rpartition('-')[2]}?"),),
        outcome="done",
        reward=right,
        reward_parts={"strict": right, "lenient": float(any(c.isdigit() for c in text))},
        temperature=lease.params.temperature,
        worker=node,
    )


def void(lease: Lease, index: int, node: str) -> Episode:
    return Episode(
        id=f"{lease.id}/{index}",
        group=lease.group,
        index=index,
        task=lease.tasks[index],
        turns=(),
        outcome="void",
        void_reason="the machine was on fire",
        worker=node,
    )


def submission(lease: Lease, node: str, *, texts: tuple[str, ...] = ("7", "x"), **more: Any) -> Submission:
    """All of a lease's episodes; every second one is right."""
    episodes = tuple(
        episode(lease, index, node, text=texts[index % len(texts)], **more) for index in range(len(lease.tasks))
    )
    return Submission(lease=lease.id, node_id=node, episodes=episodes)


def plain_episode(group: int, index: int, *, version: int = 0, reward: float = 0.0) -> Episode:
    """An episode that needs no lease."""
    return Episode(
        id=f"g{group}/{index}",
        group=f"g{group}",
        index=index,
        task=Task(env="digit", id=f"train-{group}", seed=0),
        turns=(turn(version=version),),
        outcome="done",
        reward=reward,
        worker="ann",
    )


def new_control(settings: Config, path: Path) -> Control:
    """The control of a run in `path`, new or as a killed process left it."""
    run = RunDir.open(path) if (path / "config.toml").exists() else RunDir.create(path)
    run.write_atomic("config.toml", b"# a test's\n")
    return Control(settings, ENVIRONMENTS, run, vocab_size=82)


def report(version: int, *, published: bool = True, checkpointed: bool = False, metrics: bool = True) -> StepReport:
    """What the learner says after a step; nobody but `service` reads the manifest."""
    return StepReport(
        version=version,
        metrics={"reward": 0.5} if metrics else {},
        manifest=b"signed" if published else None,
        checkpointed=checkpointed,
    )
