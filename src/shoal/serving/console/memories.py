"""The memory store as people look at it: entries, how their weights came about, the evidence, and the audit.

Invariants: the store is opened when it is there, and nothing is recorded in it; the list is read anew only when the
store has new events, and holds at most `MAX_LISTED` entries. Everything here belongs to one thread, as SQLite asks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from shoal.errors import ShoalError
from shoal.memory.admission import AdmissionPolicy
from shoal.memory.audit import audit
from shoal.memory.events import Decided, Event
from shoal.memory.records import Trial
from shoal.memory.state import Memory, step
from shoal.memory.store import Store

STORE = "memory.db"
READER = "console"
"""The name that the store is opened under; nothing is recorded, so nobody sees it."""

MAX_LISTED = 2000
MAX_TRIALS = 500
NUM_WEIGHTIEST = 3
"""Memories whose weights are drawn together."""


@dataclass(frozen=True)
class Row:
    """One entry of the list."""

    id: str
    text: str
    family: str
    status: str
    weight: float
    uses: int
    utility: float
    rule: str


@dataclass(frozen=True)
class Moment:
    """One event of a memory's life, and its weight after it."""

    at: float
    """Unix seconds."""
    kind: str
    node: str
    weight: float
    said: str


@dataclass(frozen=True)
class Remembered:
    """One memory in full."""

    memory: Memory
    moments: tuple[Moment, ...]
    trials: tuple[Trial, ...]
    audits: tuple[tuple[str, str], ...]
    """Of each decision: who made it, and what is wrong with it (empty: it holds)."""


class Memories:
    """A store, which may not be there yet."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / STORE
        self.problem = ""
        self.rows: tuple[Row, ...] = ()
        """The weightiest first."""
        self.held = (0, 0)
        """Number and bytes of the active ones."""
        self.weightiest: tuple[tuple[Row, tuple[Moment, ...]], ...] = ()
        """The first few of `rows`, with how their weights came about."""
        self._store: Store | None = None
        self._position = -1

    def read(self) -> bool:
        """Look for what is new; whether there was anything."""
        try:
            if self._store is None:
                if not self.path.is_file():
                    return False
                self._store = Store(self.path, READER)
            if (position := self._store.position) == self._position:
                return False
            now_us = time.time_ns() // 1000
            rows = [_row(memory, now_us) for memory in islice(self._store.memories(), MAX_LISTED)]
            self.rows = tuple(sorted(rows, key=lambda row: (-row.weight, row.status != "active", row.id)))
            self.weightiest = tuple(
                (row, moments(self._store.history(memory)))
                for row in self.rows[:NUM_WEIGHTIEST]
                if row.weight > 0 and (memory := self._store.memory(row.id)) is not None
            )
            self.held, self._position, self.problem = self._store.held(), position, ""
        except ShoalError as error:
            changed = self.problem != error.problem
            self.problem = error.problem
            return changed
        return True

    def memory(self, entry: str) -> Remembered | None:
        """One memory with its history, evidence and audit; None where there is none."""
        if self._store is None:
            return None
        try:
            memory = self._store.memory(entry)
            if memory is None:
                return None
            history = self._store.history(memory)
            trials = tuple(islice(self._store.trials(memory).values(), MAX_TRIALS))
            audits = tuple(
                (event.node, audit(self._store, AdmissionPolicy(), event))
                for event in history
                if isinstance(event.body, Decided)
            )
        except ShoalError as error:
            self.problem = error.problem
            return None
        return Remembered(memory, moments(history), trials, audits)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None


def moments(history: list[Event]) -> tuple[Moment, ...]:
    """A memory's events in order, each with the weight after it."""
    found: list[Moment] = []
    memory: Memory | None = None
    for event in history:
        memory = step(memory, event)
        weight = 0.0 if memory is None else memory.weight
        said = event.body.reason if isinstance(event.body, Decided) else ""
        found.append(Moment(event.at_us / 1e6, type(event.body).__name__.lower(), event.node, weight, said))
    return tuple(found)


def _row(memory: Memory, now_us: int) -> Row:
    return Row(
        id=memory.id,
        text=memory.entry.text,
        family=memory.entry.family,
        status=memory.status,
        weight=memory.weight_at(now_us),
        uses=memory.uses,
        utility=memory.utility,
        rule=memory.entry.provenance.rule,
    )
