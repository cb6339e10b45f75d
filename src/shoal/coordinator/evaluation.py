"""One evaluation: a fixed list of held-out questions, answered greedily by workers under exactly one version.

Invariant: every question is answered once; what a lost lease held is handed out again; the result is over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.envs.base import strict_and_lenient
from shoal.protocol.episode import Episode, Task

QUESTIONS_PER_LEASE = 25
"""Small enough to share an evaluation evenly between workers, large enough to batch well."""


@dataclass
class EvalRound:
    """The state of one evaluation of `version`."""

    version: int
    tasks: list[Task]
    open: list[int] = field(default_factory=list)
    """Questions not leased; filled on creation."""
    leased: dict[str, list[int]] = field(default_factory=dict)
    answers: dict[int, Episode] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.open = [index for index in range(len(self.tasks)) if index not in self.answers]

    def lease(self, lease_id: str, most: int) -> list[int]:
        """Hand out up to `most` questions."""
        size = min(most, QUESTIONS_PER_LEASE)
        taken, self.open = self.open[:size], self.open[size:]
        if taken:
            self.leased[lease_id] = taken
        return taken

    def answered(self, lease_id: str, episodes: list[Episode | None]) -> None:
        """Take a lease's answers; those that are None go back."""
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
