"""Which groups are worth training on, and which tasks are worth drawing again.

Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a group whose rewards are all equal has no advantage, so it is
left out and another one is drawn, until the batch is full of groups that teach something.

1. The paper over-samples whole batches and filters them; here each group is judged when it is accepted. What is left
   out counts as swept (`planning.queue`), so `accepted = consumed + swept + buffered` holds, and admission lets a
   replacement start.
2. `resample_limit` bounds it: a policy that solves everything, or nothing, would never fill a batch again.

Difficulty filtering: a task's *pass rate* is the mean reward of its groups, each new one counting `RECENT`. A task
whose rate lies outside `pass_rate` is passed over when it is drawn, but for one time in `REVISIT`, because the policy
changes.

Invariants: with the default settings nothing is left out and nothing passed over; no more than `resample_limit` batches
of groups in a row are left out; a task that has never been tried is always wanted. Pass rates survive a resume as they
were when the last batch was formed; a group that is leased again after one may get another task.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from shoal.config import Config
from shoal.coordinator.rundir import RunDir
from shoal.envs.base import stable_fraction
from shoal.protocol.episode import Episode, Task

FILE = "difficulty.json"

RECENT = 0.5
"""Weight of a task's newest group in its pass rate."""

REVISIT = 10
"""A task outside the range is drawn all the same one time in so many."""

MAX_TASKS = 200_000
"""Pass rates kept; those learnt first are forgotten first."""


class Filtering:
    """The state of one run's filters."""

    def __init__(self, config: Config, run: RunDir) -> None:
        self._settings = config.rollout
        self._run = run
        path = run.path / FILE
        kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self._rates: dict[str, float] = kept.get("rates", {})
        self._in_a_row = int(kept.get("in_a_row", 0))
        self.num_left_out = int(kept.get("left_out", 0))
        """Groups that were accepted and not trained on."""

    @property
    def is_on(self) -> bool:
        """Whether anything is filtered."""
        return self._settings.dynamic_sampling or self._settings.pass_rate != (0.0, 1.0)

    def rate(self, task: Task) -> float | None:
        """A task's pass rate, if it was tried."""
        return self._rates.get(_name(task))

    def wants(self, task: Task, number: int, attempt: int) -> bool:
        """Whether group `number` should be of this task, its `attempt`-th draw."""
        low, high = self._settings.pass_rate
        rate = self.rate(task)
        if rate is None or low <= rate <= high:
            return True
        return stable_fraction("revisit", number, attempt) < 1 / REVISIT

    def keeps(self, episodes: Sequence[Episode]) -> bool:
        """Take note of an accepted group; gives whether it is to be trained on."""
        rewards = [episode.reward for episode in episodes]
        self._learn(episodes[0].task, sum(rewards) / len(rewards))
        limit = self._settings.resample_limit * self._settings.groups_per_step
        teaches = min(rewards) != max(rewards)
        if teaches or not self._settings.dynamic_sampling or self._in_a_row >= limit:
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        self.num_left_out += 1
        return False

    def save(self) -> None:
        """Keep the state on disk."""
        if self.is_on:
            kept = {"rates": self._rates, "in_a_row": self._in_a_row, "left_out": self.num_left_out}
            self._run.write_atomic(FILE, json.dumps(kept, ensure_ascii=False).encode())

    def _learn(self, task: Task, mean: float) -> None:
        if self._settings.pass_rate == (0.0, 1.0):
            return
        name = _name(task)
        before = self._rates.pop(name, None)
        self._rates[name] = mean if before is None else before + RECENT * (mean - before)
        if len(self._rates) > MAX_TASKS:
            del self._rates[next(iter(self._rates))]


def _name(task: Task) -> str:
    return f"{task.env}/{task.id}/{task.seed}"
