"""The whole configuration of a run, and what only two sections together can get wrong."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints, model_validator

from shoal.config.base import Section
from shoal.config.learner import AsyncLearner, Learner
from shoal.config.loop import Loop
from shoal.config.sections import (
    Budget,
    Capacity,
    Environment,
    Eval,
    Memory,
    Model,
    Network,
    Output,
    Rollout,
    Run,
    Serving,
    Trust,
    Workers,
)

RECALLING = "shoal.memory.recalling:Recalling"
"""The environment that puts notes before another one's tasks."""

EnvironmentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class Config(Section):
    """One run, completely: two runs of equal configuration differ only in timing."""

    run: Run = Run()
    """What this run is called and how long it is."""
    model: Model = Model()
    """What is trained."""
    envs: dict[EnvironmentName, Environment] = Field(min_length=1)
    """The environments to act in, at least one."""
    rollout: Rollout = Rollout()
    """How groups of episodes are sampled for training."""
    learner: Learner = AsyncLearner()
    """How weights are made from episodes."""
    workers: Workers = Workers()
    """The rollout workers started on this machine."""
    eval: Eval = Eval()
    """Greedy answers to held-out questions."""
    network: Network = Network()
    """Where the run listens for workers."""
    capacity: Capacity = Capacity()
    """Who works, and when."""
    budget: Budget = Budget()
    """What the run may cost."""
    trust: Trust = Trust()
    """How often what workers hand in is checked."""
    serving: Serving = Serving()
    """The OpenAI-compatible server."""
    memory: Memory = Memory()
    """Notes from what this machine remembers."""
    loop: Loop = Loop()
    """The whole at once."""
    output: Output = Output()
    """What a run leaves behind besides the model, the metrics and the report."""

    @property
    def worlds(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Name to type and settings of the environments as they are acted in: with notes, where those are wanted.

        Programs of their own (`external`) read no notes, and some worlds cannot be asked for what they are about.
        """
        found: dict[str, tuple[str, dict[str, Any]]] = {}
        for name, env in self.envs.items():
            found[name] = (env.type, env.settings)
            if self.memory.recall and env.recall and env.type != "external":
                recalled = self.memory.model_dump(exclude={"recall"})
                settings = {"tasks": env.type, "task_settings": env.settings, "model": self.model.name, **recalled}
                found[name] = (RECALLING, settings)
        return found

    @model_validator(mode="after")
    def _sequences_fit(self) -> Self:
        for section, max_tokens in (("rollout", self.rollout.max_tokens), ("eval", self.eval.max_tokens)):
            if max_tokens >= self.model.context_tokens:
                raise ValueError(
                    f"{section}.max_tokens = {max_tokens} leaves no room for a prompt in "
                    f"model.context_tokens = {self.model.context_tokens}"
                )
        if self.workers.cache_tokens < self.model.context_tokens:
            raise ValueError(
                f"workers.cache_tokens = {self.workers.cache_tokens} cannot hold one sequence of "
                f"model.context_tokens = {self.model.context_tokens}"
            )
        return self
