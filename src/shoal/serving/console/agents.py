"""The scheduler's log of agent runs, followed: which runs there are, and the traces of those that are looked at.

Invariants: the log is opened when it is there, and only read; of each trace only new events are read; at most
`MAX_TRACES` traces are kept, those looked at last. Everything here belongs to one thread, as SQLite asks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shoal.agents.scheduler.log import PAGE_EVENTS, EventLog, Stored
from shoal.errors import StorageError
from shoal.serving.console.traces import Trace, text

MAX_TRACES = 8
MAX_RUNS = 100
READ_PAGES = 40
"""Pages of one trace's events read at one look: some 20,000 events."""


@dataclass(frozen=True)
class AgentRun:
    """One run in the list."""

    id: str
    task: str
    started: float
    state: str
    """`final`, `error` or `open`."""


class AgentLog:
    """A scheduler's log, which may not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""
        """Why it cannot be read; empty while it can."""
        self.runs: tuple[AgentRun, ...] = ()
        """The newest first."""
        self._log: EventLog | None = None
        self._traces: OrderedDict[str, Trace] = OrderedDict()

    def read(self) -> bool:
        """Look for what is new; whether there was anything."""
        try:
            log = self._opened()
            if log is None:
                return False
            found = tuple(_run(first, last) for _, first, last in log.runs()[:MAX_RUNS])
            changed = found != self.runs
            self.runs, self.problem = found, ""
            for trace in self._traces.values():
                changed |= self._follow(log, trace)
        except StorageError as error:
            changed = self.problem != error.problem
            self.problem = error.problem
        return changed

    def trace(self, run: str) -> Trace | None:
        """A run's trace so far; it is followed from now on. None where there is no such run."""
        if all(run != known.id for known in self.runs):
            return None
        if run not in self._traces:
            trace = self._traces[run] = Trace(run)
            try:
                if (log := self._opened()) is not None:
                    self._follow(log, trace)
            except StorageError as error:
                self.problem = error.problem
            while len(self._traces) > MAX_TRACES:
                self._traces.popitem(last=False)
        self._traces.move_to_end(run)
        return self._traces[run]

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _opened(self) -> EventLog | None:
        if self._log is None and self.path.is_file():
            self._log = EventLog(self.path)
        return self._log

    def _follow(self, log: EventLog, trace: Trace) -> bool:
        before = trace.seq
        for _ in range(READ_PAGES):
            page = log.stored(trace.run, trace.seq)
            for row in page:
                trace.apply(row.seq, row.time, row.kind, _data(row))
            if len(page) < PAGE_EVENTS:
                break
        return trace.seq > before


def _run(first: Stored, last: Stored | None) -> AgentRun:
    request = _data(first).get("request")
    task = text(request.get("task")) if isinstance(request, dict) else ""
    return AgentRun(first.run, task, first.time, "open" if last is None else last.kind)


def _data(row: Stored) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(row.data)
    except (msgspec.DecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
