"""Where tasks come from: the configured environments, in their proportions, addressed by number.

Invariant: the task of group number n is a pure function of the run's seed and n, so a resumed run draws exactly what
the interrupted one would have drawn; but where tasks are filtered by their difficulty, it also depends on what had been
seen of them by then.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from shoal.config import Config
from shoal.envs.base import Environment, stable_int
from shoal.envs.registry import make
from shoal.errors import TaskError
from shoal.protocol.episode import Task

MAX_DRAWS = 16
"""Tasks drawn for one group before one is taken that is not wanted."""

FURTHEST_DRAW = 2**31
"""Further draws are from anywhere in the stream of training tasks."""

Wants = Callable[[Task, int, int], bool]
"""Of a task, the group's number, and which draw it is."""


def make_environments(config: Config) -> dict[str, Environment]:
    """The run's environments by name; raises `TaskError` or `ConfigError` for one that cannot be made."""
    return {name: make(kind, settings, name=name) for name, (kind, settings) in config.worlds.items()}


class TaskSource:
    """Draws training tasks and lists held-out ones."""

    def __init__(self, config: Config, environments: Mapping[str, Environment], wants: Wants = lambda *_: True) -> None:
        self._envs = dict(environments)
        self._names = list(config.envs)
        self._weights = [config.envs[name].weight for name in self._names]
        self._seed = config.run.seed
        self._questions = config.eval.questions
        self._wants = wants

    def group(self, number: int) -> Task:
        """The task of training group `number`: the first draw that is wanted, or the last."""
        rng = random.Random(stable_int("env", self._seed, number))
        name = rng.choices(self._names, self._weights)[0]
        task = self._envs[name].task("train", number, self._seed)
        for attempt in range(1, MAX_DRAWS):
            if self._wants(task, number, attempt):
                break
            index = stable_int("redraw", self._seed, number, attempt) % FURTHEST_DRAW
            task = self._envs[name].task("train", index, self._seed)
        return task

    def seeds(self, number: int, count: int) -> tuple[int, ...]:
        """Sampling seeds of the group's rollouts."""
        return tuple(stable_int("rollout", self._seed, number, index) for index in range(count))

    def heldout(self) -> list[Task]:
        """The distinct held-out questions of an evaluation, shared evenly between the environments.

        Raises:
            TaskError: the environments together have none.
        """
        found: list[Task] = []
        for position, name in enumerate(self._names):
            share = (self._questions - len(found)) // (len(self._names) - position)
            found += self._envs[name].heldout(share)
        if not found:
            raise TaskError("the run's environments hold out no questions.", "Set eval.before and eval.after to false.")
        return found
