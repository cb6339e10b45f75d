"""What a lease asks for: a group of rollouts to train on, or questions to be answered under one version."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.config import Config
from shoal.coordinator.evaluation import EvalRound
from shoal.coordinator.tasks import TaskSource
from shoal.protocol.sampling import SamplingParams
from shoal.protocol.work import Lease

EVAL_PROGRESS_FACTOR = 4
"""An evaluation's lease may be silent this many times longer: it is larger, and nothing waits but people."""


def eval_lease(config: Config, lease_id: str, round_: EvalRound, indices: Sequence[int]) -> Lease:
    """These questions of an evaluation, greedily, under exactly its version."""
    return Lease(
        id=lease_id,
        kind="eval",
        group=lease_id,
        tasks=tuple(round_.tasks[index] for index in indices),
        seeds=tuple(indices),
        params=SamplingParams(max_tokens=config.eval.max_tokens, temperature=0.0, stop=config.rollout.stop),
        min_version=round_.version,
        exact_version=True,
        duration_s=config.rollout.lease_timeout_s * EVAL_PROGRESS_FACTOR,
    )


def train_lease(config: Config, lease_id: str, tasks: TaskSource, number: int, version: int) -> Lease:
    """Group `number`, under `version` or, in async mode, a newer one."""
    rollout = config.rollout
    return Lease(
        id=lease_id,
        kind="train",
        group=f"g{number}",
        tasks=(tasks.group(number),) * rollout.group_size,
        seeds=tasks.seeds(number, rollout.group_size),
        params=SamplingParams(max_tokens=rollout.max_tokens, temperature=rollout.temperature, stop=rollout.stop),
        min_version=version,
        exact_version=config.learner.mode != "async",
        duration_s=rollout.lease_timeout_s,
    )
