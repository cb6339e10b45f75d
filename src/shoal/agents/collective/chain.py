"""One chain while it runs: its steps, who holds each, since when, and what came of them. No clock and no socket.

Invariants: steps are done in their order; a step's executor is told its own words and the results that it needs, and of
the next step only what it requires.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.agents.collective.work import PlannedStep
from shoal.protocol.collective import MAX_SHOWN_CHARS, Briefing, ChainResult, Place, StepView
from shoal.protocol.roster import SignedRecord


@dataclass
class Step:
    """One step while its chain runs."""

    planned: PlannedStep
    holder: bytes = b""
    acknowledged: bool = False
    """Whether the holder itself showed that it has the step; that it was given to somebody is one node's word."""
    until: float = 0.0
    """Monotonic time at which its lease runs out."""
    was_excused: bool = False
    """Whether its lease was prolonged because this process stood still, since the last sign of life."""
    result: str | None = None
    done: SignedRecord | None = None
    failed: set[bytes] = field(default_factory=set)
    """Keys of those who had it and did not bring it."""


class Chain:
    """One chain of one problem.

    Args:
        tokens: that writing it took.
        passed_on: executors hand the next step over themselves; False: each comes back here, as to a scheduler.
    """

    def __init__(
        self,
        problem: str,
        chain: str,
        steps: Sequence[PlannedStep],
        deadline: float,
        tokens: int = 0,
        *,
        passed_on: bool = True,
    ) -> None:
        self.problem = problem
        self.id = chain
        self.steps = [Step(one) for one in steps]
        self.deadline = deadline
        self.tokens = tokens
        self.passed_on = passed_on
        self.changed = asyncio.Condition()
        self.reason = ""

    @property
    def at(self) -> int:
        """The step that is being done; their number once all are."""
        return next((i for i, step in enumerate(self.steps) if step.result is None), len(self.steps))

    def place(self, step: int) -> Place:
        """Where a step is."""
        return Place(self.problem, self.id, step)

    def briefing(self, number: int, lease_s: float) -> Briefing:
        """What the holder of a step is told."""
        planned = self.steps[number].planned
        last = number + 1 == len(self.steps) or not self.passed_on
        return Briefing(
            requirement=planned.requirement,
            task=planned.task,
            needed={one: self.steps[one].result or "" for one in planned.needs},
            next_requirement="" if last else self.steps[number + 1].planned.requirement,
            lease_s=lease_s,
        )

    def view(self) -> tuple[StepView, ...]:
        """How far it is, for its poser to read."""
        return tuple(
            StepView(
                requirement=step.planned.requirement,
                task=step.planned.task[:MAX_SHOWN_CHARS],
                executor=step.holder,
                result=(step.result or "")[:MAX_SHOWN_CHARS],
            )
            for step in self.steps
        )

    def result(self) -> ChainResult:
        """How it ended."""
        finished = self.at == len(self.steps)
        return ChainResult(
            problem=self.problem,
            chain=self.id,
            answer=self.steps[-1].result if finished else None,
            done=tuple(step.done for step in self.steps if step.done is not None) if finished else (),
            steps=self.view(),
            tokens=self.tokens,
            reason="" if finished else (self.reason or "it did not end in time"),
        )
