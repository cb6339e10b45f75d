"""One episode: what an agent was asked, every token it drew, and what that earned.

Invariants: the token sequence of an episode is the concatenation, turn by turn, of `context_ids` and
`completion.token_ids`, and nothing is ever tokenised again. An infrastructure failure is `void` with its reason and
carries no reward: it is never reward 0. A `done` episode has a finite reward.

An agent that keeps several conversations, or forks one, gives a tree: a turn names the one that it continues (`after`),
an earlier one always. Each path from a root to a leaf is one sequence, a *branch*.
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
    given: bool = False
    """The environment said it in the agent's place, an expert's act: nobody sampled these tokens, their
    log-probabilities say nothing, and the learner takes its own."""
    after: int | None = None
    """Index of the turn that this one continues, -1 for none; absent: the one before it in the list."""


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
    output: str = ""
    """What an agent's program gave as its result; empty where there is no such program."""
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
        if len(self.output) > MAX_TEXT_CHARS:
            raise RecordError("an episode's output is too long.")
        for number, (turn, parent) in enumerate(zip(self.turns, self.parents, strict=True)):
            turn.completion.check()
            if turn.grammar is not None:
                turn.grammar.check()
            if not -1 <= parent < number:
                raise RecordError(f"an episode's turn {number} continues turn {parent}, which is not before it.")
            if not turn.context_ids and parent < 0:
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
    def parents(self) -> tuple[int, ...]:
        """Of each turn, the turn that it continues; -1 for none."""
        return tuple(number - 1 if turn.after is None else turn.after for number, turn in enumerate(self.turns))

    @property
    def branches(self) -> tuple[tuple[int, ...], ...]:
        """Every path from a root to a leaf, as indices of turns, in the order of the leaves."""
        parents = self.parents
        found = []
        for leaf in sorted(set(range(len(parents))) - set(parents)):
            path = [leaf]
            while (parent := parents[path[-1]]) >= 0:
                path.append(parent)
            found.append(tuple(reversed(path)))
        return tuple(found)

    @property
    def longest(self) -> int:
        """Tokens of the longest branch, contexts and completions."""
        lengths: list[int] = []
        for turn, parent in zip(self.turns, self.parents, strict=True):
            own = len(turn.context_ids) + len(turn.completion.token_ids)
            lengths.append(own + (lengths[parent] if parent >= 0 else 0))
        return max(lengths, default=0)

    @property
    def version(self) -> int:
        """The policy version of the oldest token drawn: the one staleness is counted from. Tokens that were given count
        only where nothing was drawn, with the version that the episode was asked for."""
        drawn = [turn for turn in self.turns if not turn.given] or self.turns
        return min((v for turn in drawn for v in turn.completion.versions), default=0)
