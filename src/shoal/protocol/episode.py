"""One episode: what an agent was asked, every token it drew, and what that earned.

Invariants: the token sequence of an episode is the concatenation, turn by turn, of `context_ids` and
`completion.token_ids`, and nothing is ever tokenised again. An infrastructure failure is `void` with its reason and
carries no reward: it is never reward 0. A `done` episode has a finite reward.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from shoal.errors import RecordError
from shoal.protocol.codec import Record
from shoal.protocol.sampling import Completion, Grammar

MAX_TURNS = 1024
MAX_TEXT_CHARS = 1 << 20

Outcome = Literal["done", "void"]


class Task(Record, frozen=True):
    """One task of one environment, reproducible from these three values alone."""

    env: str
    id: str
    seed: int
    data: dict[str, Any] = {}
    """What the environment needs to rebuild the task where `id` and `seed` do not say it all; small, JSON-like."""

    def check(self) -> None:
        if not self.env or len(self.env) > 256 or not self.id or len(self.id) > 1024:
            raise RecordError("a task's env or id is empty or too long.")
        if not 0 <= self.seed < 2**63:
            raise RecordError(f"a task's seed {self.seed} is not between 0 and 2^63.")


class Turn(Record, frozen=True):
    """One act: the tokens the agent read since its last act, and the tokens it drew."""

    context_ids: tuple[int, ...]
    observation: str
    """What the environment said, as text, for people."""
    completion: Completion
    grammar: Grammar | None = None
    """What the completion had to match: its log-probabilities are those of the tokens that this allows."""


class Episode(Record, frozen=True):
    """One rollout of one task."""

    id: str
    group: str
    """Rollouts of one task that are compared with each other share a group id."""
    index: int
    """Which of the group's rollouts this is, from 0."""
    task: Task
    turns: tuple[Turn, ...]
    outcome: Outcome
    reward: float = 0.0
    reward_parts: dict[str, float] = {}
    void_reason: str = ""
    temperature: float = 1.0
    worker: str = ""
    """Node id of the worker that acted."""
    started_at: float = 0.0
    finished_at: float = 0.0
    """Unix seconds on the worker's clock; for people, never for decisions."""

    def check(self) -> None:
        self.task.check()
        if not self.id or len(self.id) > 256 or not self.group or len(self.group) > 256:
            raise RecordError("an episode's id or group is empty or too long.")
        if self.index < 0 or len(self.turns) > MAX_TURNS:
            raise RecordError(f"an episode has a negative index or more than {MAX_TURNS} turns.")
        if self.outcome == "done" and (not self.turns or not math.isfinite(self.reward)):
            raise RecordError("a finished episode has no turns, or a reward that is not finite.")
        if any(not math.isfinite(x) for x in self.reward_parts.values()):
            raise RecordError("an episode has a reward part that is not finite.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RecordError("an episode's temperature is negative or not finite.")
        if not (math.isfinite(self.started_at) and math.isfinite(self.finished_at)):
            raise RecordError("an episode's times are not finite.")
        for turn in self.turns:
            turn.completion.check()
            if turn.grammar is not None:
                turn.grammar.check()
            if not turn.context_ids and turn is self.turns[0]:
                raise RecordError("an episode's first turn has no context.")
            if any(t < 0 for t in turn.context_ids):
                raise RecordError("an episode has a negative token id.")
            if len(turn.observation) > MAX_TEXT_CHARS or len(turn.completion.text) > MAX_TEXT_CHARS:
                raise RecordError("an episode's text is too long.")

    @property
    def num_tokens(self) -> int:
        """Tokens drawn by the agent, over all turns."""
        return sum(len(turn.completion.token_ids) for turn in self.turns)

    @property
    def version(self) -> int:
        """The policy version of the oldest token drawn: the one staleness is counted from."""
        return min((v for turn in self.turns for v in turn.completion.versions), default=0)
