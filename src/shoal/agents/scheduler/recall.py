"""Calls that a run no longer holds, read again from its log."""

from __future__ import annotations

import msgspec

from shoal.agents.scheduler.calls import CallState, outcome_of
from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.records import Call, RunEvent
from shoal.errors import StorageError


class LogRecall:
    """Reads calls of one run; remembers the last plan that it read, because calls are asked for in their order."""

    def __init__(self, log: EventLog, run: str) -> None:
        self._log, self._run = log, run
        self._plan_seq, self._plan = 0, RunEvent(run=run, seq=1, time=0.0, kind="plan", data={"step": 0, "calls": []})

    def __call__(self, call: str, planned_seq: int, ended_seq: int) -> CallState:
        """A finished call; raises `StorageError` where the log no longer has it."""
        if planned_seq != self._plan_seq:
            self._plan_seq, self._plan = planned_seq, self._log.event(self._run, planned_seq)
        ended = self._log.event(self._run, ended_seq)
        planned = next((one for one in self._plan.data["calls"] if one["call"]["id"] == call), None)
        if planned is None or ended.data.get("call") != call:
            raise StorageError(f"the call {call} of run {self._run} is missing from {self._log.path}.")
        return CallState(
            call=msgspec.convert(planned["call"], Call),
            step=self._plan.data["step"],
            background=planned["background"],
            planned_seq=planned_seq,
            phase="done",
            outcome=outcome_of(ended.data),
            seconds=ended.data["seconds"],
            ended_seq=ended_seq,
        )
