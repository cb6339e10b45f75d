"""A run's calls by their ids: the open ones and the newest in memory, older ones where the log has them. Pure.

A run may make hundreds of thousands of calls, each with arguments and a value. Of one that has ended, and is no longer
among the newest `HELD_CALLS`, only its id stays here, with the numbers of the events that hold the rest.

Invariants: an id, once planned, stays known; an open call is held; what is read of an older one is what the log says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from shoal.agents.scheduler.records import Call
from shoal.agents.tools.outcome import Failure, Outcome, Success

Phase = Literal["waiting", "ready", "approval", "dispatched", "running", "backoff", "done"]

HELD_CALLS = 2048
"""Finished calls in memory: as many as two of the largest decisions have, which is more than a prompt shows."""

_SEQ_BITS = 40

NO_ARGUMENTS: dict[str, Any] = {}
"""Of all calls that are not under way; never changed."""


@dataclass(slots=True)
class CallState:
    """One call and how far it is."""

    call: Call
    step: int
    background: bool
    """Whether the model decides again without waiting for it."""
    planned_seq: int = 0
    """The event that planned it."""
    phase: Phase = "waiting"
    missing: set[str] | None = None
    """What it still depends on."""
    arguments: dict[str, Any] = field(default_factory=lambda: NO_ARGUMENTS)
    """With results filled in: from its dispatch to its end."""
    attempts: int = 0
    allowed: bool | None = None
    """What was said when somebody was asked."""
    outcome: Outcome | None = None
    seconds: float = 0.0
    ended_seq: int = 0
    """The event of its result."""


Recall = Callable[[str, int, int], CallState]
"""Reads a finished call again: its id, and the numbers of the events that planned it and that ended it."""


class Calls(Mapping[str, CallState]):
    """All calls of a run.

    Args:
        recall: reads finished calls again; without it all are held.
    """

    def __init__(self, recall: Recall | None = None, held: int = HELD_CALLS) -> None:
        self._recall, self._most = recall, held
        self._held: dict[str, CallState] = {}
        self._finished: deque[str] = deque()
        self._away: dict[str, int] = {}

    def __getitem__(self, call: str) -> CallState:
        found = self._held.get(call)
        if found is not None:
            return found
        seqs = self._away[call]
        assert self._recall is not None, "calls are put away only where they can be read again"
        return self._recall(call, seqs >> _SEQ_BITS, seqs & ((1 << _SEQ_BITS) - 1))

    def __contains__(self, call: object) -> bool:
        return call in self._held or call in self._away

    def __iter__(self) -> Iterator[str]:
        """All ids, those that were put away first. Reading their calls one by one asks the log each time."""
        yield from self._away
        yield from self._held

    def __len__(self) -> int:
        return len(self._held) + len(self._away)

    def held(self) -> Mapping[str, CallState]:
        """The calls in memory, all open ones among them."""
        return self._held

    def add(self, state: CallState) -> None:
        """Take in a call that was planned."""
        self._held[state.call.id] = state

    def finished(self, call: str) -> None:
        """A held call has its result; older ones may go."""
        if self._recall is None:
            return
        self._finished.append(call)
        while len(self._finished) > self._most:
            old = self._held.pop(self._finished.popleft())
            self._away[old.call.id] = old.planned_seq << _SEQ_BITS | old.ended_seq


def outcome_of(data: dict[str, Any]) -> Outcome:
    """What the data of a `result` event say."""
    return Success(value=data["value"]) if data["ok"] else msgspec.convert(data["error"], Failure)
