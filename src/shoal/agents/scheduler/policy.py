"""Who decides: a model or a script. A policy is shown the run so far and says what comes next.

Invariant: a policy sees only what a `View` holds; what it wants is a wish, which the runner checks against cards,
permits and budgets.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from shoal.agents.scheduler.calls import CallState
from shoal.agents.scheduler.records import Decision, Drawn, Spent
from shoal.agents.scheduler.state import StepState
from shoal.agents.tools.card import ToolCard
from shoal.errors import ShoalError


class PolicyError(ShoalError):
    """The model that decides cannot be reached, or refuses."""


class ContextFull(PolicyError):
    """The conversation no longer fits into the model: the run's own end, and nobody's fault but its agent's."""


@dataclass(frozen=True)
class View:
    """What a policy may know."""

    task: str
    cards: Mapping[str, ToolCard]
    """The tools that this run may call."""
    steps: tuple[StepState, ...] = ()
    calls: Mapping[str, CallState] = field(default_factory=dict)
    history: tuple[tuple[str, str], ...] = ()
    notes: str = ""
    """What was remembered for the task, marked as data; empty where nothing was."""
    must_answer: str = ""
    """Why only an answer is allowed; empty while calls are."""
    record: bool = False
    """Whether the decision's tokens are wanted."""

    def value(self, call: str) -> object:
        """What a call gave; None where it failed or is still running."""
        return getattr(self.calls[call].outcome, "value", None)


NOTHING = Spent()


@dataclass(frozen=True)
class Decided:
    """A policy's answer."""

    decision: Decision | None
    """None where what it said is no decision."""
    problem: str = ""
    """What was wrong with it then."""
    spent: Spent = NOTHING
    drawn: Drawn | None = None
    """Its tokens, where they were wanted."""


class Policy(Protocol):
    """Decides, step by step."""

    async def decide(self, view: View) -> Decided:
        """The next decision.

        Raises:
            PolicyError: none can be had.
            ContextFull: the conversation has become too long.
        """
        ...


class ScriptedPolicy:
    """A policy that is a function of what it is shown: for tests, measurements and fixed workflows."""

    def __init__(self, script: Callable[[View], Decision | Decided | Awaitable[Decision]]) -> None:
        self._script = script

    async def decide(self, view: View) -> Decided:
        made = self._script(view)
        if isinstance(made, Decided):
            return made
        return Decided(made if isinstance(made, Decision) else await made)
