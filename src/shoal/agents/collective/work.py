"""What the collective asks of a model, as seams: an expert does steps, a writer writes chains.

Whoever brings an `Expert` decides what is behind it: a model, an adapter, a prompt, a scheduler with tools, a person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shoal.errors import ShoalError
from shoal.protocol.episode import Episode


class StepFailed(ShoalError):
    """A step that this expert cannot do."""


class NoChain(ShoalError):
    """A problem for which no chain could be written."""


@dataclass(frozen=True)
class SubTask:
    """A step as its executor sees it."""

    requirement: str
    task: str
    needed: Mapping[int, str] = field(default_factory=dict)
    """Step -> the result that this one depends on."""


@dataclass(frozen=True)
class Work:
    """What an expert made of a step."""

    result: str
    tokens: int = 0
    episode: Episode | None = None
    """Its part as an episode, where its model gives tokens."""


class Expert(Protocol):
    """Does steps."""

    @property
    def claims(self) -> Mapping[str, float]:
        """Skill -> how good it says it is, 0 to 1."""
        ...

    async def act(self, task: SubTask) -> Work:
        """Do a step. Cancelled when nobody waits for it any more.

        Raises:
            StepFailed: it cannot be done.
        """
        ...


@dataclass(frozen=True)
class PlannedStep:
    """One step of a chain."""

    requirement: str
    """What it takes, in words; everybody may read it."""
    task: str
    """What is to be done; its executor reads it."""
    needs: tuple[int, ...] = ()
    """Earlier steps whose results it depends on."""


@dataclass(frozen=True)
class Plan:
    """A chain as it was written."""

    steps: Sequence[PlannedStep]
    tokens: int = 0
    episode: Episode | None = None
    """The writing as an episode, where its model gives tokens."""
    as_asked: bool = True
    """False: what the writer wrote was of no use, and this stands in for it."""


class Writer(Protocol):
    """Writes chains."""

    async def write(self, problem: str, skills: Sequence[str]) -> Plan:
        """A chain whose last step gives the problem's answer.

        Args:
            skills: what the ledger has attestations of.

        Raises:
            NoChain: none could be written.
        """
        ...
