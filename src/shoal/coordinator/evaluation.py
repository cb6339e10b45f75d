"""Evaluations: a fixed list of held-out questions, answered greedily by workers under exactly one version each.

Invariants: every question is answered once; what a lost lease held is handed out again; a result is over all questions.
An evaluation that was under way when the run was killed starts again with it. One that workers cannot take part in
(its version is gone) is given up, unless it is the last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from shoal.config import Config
from shoal.coordinator.rundir import RunDir
from shoal.envs.base import strict_and_lenient
from shoal.errors import RunError
from shoal.protocol.codec import builtins
from shoal.protocol.episode import Episode, Task

QUESTIONS_PER_LEASE = 25
"""Small enough to share an evaluation evenly between workers, large enough to batch well."""

MAX_FRUITLESS_LEASES = 8
"""Leases in a row that brought no answer at all, after which an evaluation is given up."""


@dataclass
class EvalRound:
    """The state of one evaluation of `version`."""

    version: int
    tasks: list[Task]
    open: list[int] = field(default_factory=list)
    """Questions not leased; filled on creation."""
    leased: dict[str, list[int]] = field(default_factory=dict)
    answers: dict[int, Episode] = field(default_factory=dict)
    fruitless: int = 0
    """Leases in a row without an answer."""

    def __post_init__(self) -> None:
        self.open = [index for index in range(len(self.tasks)) if index not in self.answers]

    def lease(self, lease_id: str, most: int) -> list[int]:
        """Hand out up to `most` questions."""
        size = max(0, min(most, QUESTIONS_PER_LEASE))
        taken, self.open = self.open[:size], self.open[size:]
        if taken:
            self.leased[lease_id] = taken
        return taken

    def answered(self, lease_id: str, episodes: list[Episode | None]) -> None:
        """Take a lease's answers; those that are None go back."""
        self.fruitless = 0 if any(episodes) else self.fruitless + 1
        for index, episode in zip(self.leased.pop(lease_id), episodes, strict=True):
            if episode is None:
                self.open.append(index)
            else:
                self.answers[index] = episode

    def lost(self, lease_id: str) -> None:
        """A lease ended without answers."""
        self.open += self.leased.pop(lease_id, [])

    @property
    def done(self) -> bool:
        return len(self.answers) == len(self.tasks)

    def marks(self) -> list[tuple[float, float]]:
        """(strict, lenient) for each question, in the questions' order."""
        return [
            strict_and_lenient(self.answers[i].reward, self.answers[i].reward_parts) for i in range(len(self.tasks))
        ]

    def result(self) -> dict[str, float]:
        """Means over all questions."""
        marks = self.marks()
        count = len(marks)
        return {
            "questions": count,
            "strict": sum(s for s, _ in marks) / count,
            "lenient": sum(x for _, x in marks) / count,
            "response_tokens_mean": sum(e.num_tokens for e in self.answers.values()) / count,
        }


class Evaluations:
    """All evaluations of a run: which are due, under way, done.

    Args:
        tasks: the held-out questions, the same in every evaluation.
    """

    def __init__(self, config: Config, run: RunDir, tasks: list[Task]) -> None:
        self._config = config
        self._run = run
        self._tasks = tasks
        self._given_up: set[int] = set()
        self.rounds: dict[int, EvalRound] = {}
        """Under way, by version."""
        self.results: dict[int, dict[str, float]] = self._load_results()

    @staticmethod
    def wanted(config: Config) -> bool:
        """Whether there will be any."""
        section = config.eval
        return section.before or section.after or section.every > 0

    def is_due(self, version: int) -> bool:
        """Whether the configuration asks for this version's."""
        section, last = self._config.eval, self._config.run.steps
        if version == 0:
            return section.before
        if version == last:
            return section.after
        every, published_every = section.every, self._config.learner.publish_every
        return every > 0 and version % every == 0 and version % published_every == 0

    def published(self, version: int, kept: Iterable[int] = ()) -> None:
        """Open what is due of this version; and of earlier ones that can still be had, which a kill interrupted."""
        for due in sorted({version, *(v for v in kept if v < version)}):
            if self.is_due(due) and not (due in self.rounds or due in self.results or due in self._given_up):
                self.rounds[due] = EvalRound(due, self._tasks)

    @property
    def oldest_version(self) -> int | None:
        """The oldest version that workers are still asked for."""
        return min(self.rounds, default=None)

    @property
    def complete(self) -> bool:
        """Whether every evaluation has its result, the last one's included."""
        last = self._config.run.steps
        return not self.rounds and (not self.is_due(last) or last in self.results)

    def answered(self, round_: EvalRound, lease_id: str, episodes: list[Episode | None], why: str) -> None:
        """Take a lease's answers.

        Args:
            why: what was wrong with those that are None.

        Raises:
            RunError: the last evaluation cannot be had.
        """
        round_.answered(lease_id, episodes)
        if round_.done:
            self._finish(round_)
        elif round_.fruitless >= MAX_FRUITLESS_LEASES:
            if round_.version == self._config.run.steps:
                raise RunError(
                    f"the trained model could not be evaluated, last because {why}",
                    "Mend the environment or the workers; then continue with --resume.",
                )
            self._given_up.add(round_.version)
            del self.rounds[round_.version]
            self._run.event("eval.given_up", version=round_.version, reason=why[:500])

    def _finish(self, round_: EvalRound) -> None:
        self.results[round_.version] = result = round_.result()
        answers = [
            {
                "question": e.turns[0].observation if e.turns else "",
                "answer": e.turns[-1].completion.text if e.turns else "",
                "strict": strict,
                "lenient": lenient,
                "task": builtins(e.task),
            }
            for e, (strict, lenient) in zip(
                (round_.answers[i] for i in range(len(round_.tasks))), round_.marks(), strict=True
            )
        ]
        text = json.dumps({"version": round_.version, "result": result, "answers": answers}, ensure_ascii=False)
        self._run.write_atomic(_file(round_.version), text.encode())
        self._run.metric(kind="eval", version=round_.version, **result)
        del self.rounds[round_.version]

    def answers(self, version: int) -> list[dict[str, Any]]:
        """What was answered in the evaluation of `version`, question by question; empty where it has not been."""
        path = self._run.path / _file(version)
        return list(json.loads(path.read_text())["answers"]) if path.exists() else []

    def _load_results(self) -> dict[int, dict[str, float]]:
        found = (json.loads(p.read_text()) for p in sorted((self._run.path / "evals").glob("*.json")))
        return {int(one["version"]): one["result"] for one in found}


def _file(version: int) -> str:
    return f"evals/{version:06d}.json"
