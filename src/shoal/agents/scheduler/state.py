"""A run's state, folded from its events: which calls are ready, what was spent, what the model should be asked. Pure.

Invariants: the state is a function of the events alone, so a resumed run stands where the killed one stood; a call is
handed out by `take_ready` only when everything it depends on has succeeded, and at most once; a call has at most one
result, which never changes. Nothing here waits for a whole turn: each result frees exactly the calls that needed it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shoal.agents.scheduler.calls import NO_ARGUMENTS, Calls, CallState, Recall, outcome_of
from shoal.agents.scheduler.records import Call, Drawn, RunEvent, RunRequest
from shoal.agents.tools.outcome import Failure
from shoal.errors import RecordError


@dataclass
class StepState:
    """One decision."""

    thought: str
    calls: list[str] = field(default_factory=list)
    answer: str | None = None
    problem: str = ""
    """Why the decision was no good, where it was not."""
    seen_seq: int = 0
    """The last event that the model had seen when it was asked."""
    drawn: Drawn | None = None
    """The tokens of the decision, where the run is recorded."""


class RunState:
    """What the events so far amount to.

    Args:
        recall: reads calls that ended long ago; without it all are held in memory.
    """

    def __init__(self, recall: Recall | None = None) -> None:
        self.run = ""
        self.request: RunRequest | None = None
        self.history: tuple[tuple[str, str], ...] = ()
        """Tasks and answers of the session's runs before."""
        self.notes = ""
        """What was recalled for the task when the run began."""
        self.seq = 0
        self.steps: list[StepState] = []
        self.calls = Calls(recall)
        self.end: RunEvent | None = None
        self.tokens = 0
        self.usd = 0.0
        self.attempts = 0
        self.seconds = 0.0
        self.must_answer = ""
        """Which budget is used up; empty while none is."""
        self._news_seq = 1
        self._seen_seq = 0
        self.joined_open = 0
        """Calls that the next decision waits for."""
        self.open = 0
        self._time: float | None = None
        self._ready: deque[str] = deque()
        self._doomed: deque[str] = deque()
        self._dependents: dict[str, list[str]] = {}

    def apply(self, event: RunEvent) -> None:
        """Take in the next event; raises `RecordError` for one that cannot follow."""
        if event.seq != self.seq + 1 or self.end is not None:
            raise RecordError(f"event {event.id} cannot follow number {self.seq}.")
        self.seq = event.seq
        if self._time is not None and event.kind != "resumed":
            self.seconds += max(0.0, event.time - self._time)
        self._time = event.time
        data = event.data
        match event.kind:
            case "run":
                self.run = event.run
                self.request = msgspec.convert(data["request"], RunRequest)
                self.history = tuple((task, answer) for task, answer in data.get("history", ()))
                self.notes = data.get("notes", {}).get("text", "")
            case "thought":
                drawn = msgspec.convert(data["drawn"], Drawn) if data.get("drawn") else None
                problem = data.get("problem", "")
                self.steps.append(StepState(data["text"], problem=problem, seen_seq=data["seen"], drawn=drawn))
                self.tokens += data["tokens_in"] + data["tokens_out"]
                self.usd += data["usd"]
                self._seen_seq = data["seen"]
                if data.get("problem"):
                    self._news_seq = event.seq
            case "plan":
                self.steps[-1].answer = data["answer"]
                for one in data["calls"]:
                    self._add(msgspec.convert(one["call"], Call), bool(one["background"]))
                    if one["background"]:  # The model has a handle at once, and may go on with it.
                        self._news_seq = event.seq
            case "budget":
                self.must_answer = data["which"]
                self._news_seq = event.seq
            case "resumed" | "replan" | "progress" | "queued":
                pass
            case "final" | "error":
                self.end = event
            case _:
                self._of_call(event.kind, self.calls[data["call"]], data)

    def _of_call(self, kind: str, state: CallState, data: dict[str, Any]) -> None:
        if state.phase == "done":
            raise RecordError(f"the call {state.call.id} has its result already.")
        match kind:
            case "dispatch":
                state.phase, state.arguments = "dispatched", data["arguments"]
            case "approval":
                state.phase = "approval"
            case "approved":
                state.phase, state.allowed = "dispatched", data["allowed"]
            case "started":
                state.phase, state.attempts = "running", data["attempt"]
                self.attempts += 1
                self.usd += data["usd"]
            case "retry":
                state.phase = "backoff"
            case "result":
                self._finish(state, data)
            case _:
                raise RecordError(f"there are no events of the kind {kind!r}.")

    def _add(self, call: Call, background: bool) -> None:
        if call.id in self.calls:
            raise RecordError(f"there are two calls {call.id}.")
        state = CallState(call, len(self.steps), background, self.seq)
        self.calls.add(state)
        self.steps[-1].calls.append(call.id)
        self.open += 1
        self.joined_open += not background
        missing: set[str] = set()
        for needed in call.after:
            known = self.calls.get(needed)
            if known is None or known.outcome is None:
                missing.add(needed)
                self._dependents.setdefault(needed, []).append(call.id)
            elif isinstance(known.outcome, Failure):
                self._doomed.append(call.id)
        if missing:
            state.missing = missing
        else:
            state.phase = "ready"
            self._ready.append(call.id)

    def _finish(self, state: CallState, data: dict[str, Any]) -> None:
        call = state.call.id
        state.outcome, state.ended_seq = outcome_of(data), self.seq
        state.phase, state.seconds, state.arguments = "done", data["seconds"], NO_ARGUMENTS
        self.open -= 1
        self.joined_open -= not state.background
        self._news_seq = self.seq
        for dependent in self._dependents.pop(call, ()):
            other = self.calls[dependent]
            if other.phase != "waiting" or other.missing is None:
                continue
            other.missing.discard(call)
            if isinstance(state.outcome, Failure):
                self._doomed.append(dependent)
            elif not other.missing:
                other.phase = "ready"
                self._ready.append(dependent)
        self.calls.finished(call)

    def take_ready(self) -> list[CallState]:
        """The calls that can be dispatched now, each handed out once."""
        found = [self.calls[one] for one in self._ready]
        self._ready.clear()
        return [state for state in found if state.phase == "ready" and not self._needs_failed(state)]

    def take_doomed(self) -> list[tuple[CallState, str]]:
        """The calls that can never be dispatched, each with the failed call that it needed."""
        found = [self.calls[one] for one in dict.fromkeys(self._doomed)]
        self._doomed.clear()
        return [(state, self._needs_failed(state)) for state in found if state.phase in ("waiting", "ready")]

    def _needs_failed(self, state: CallState) -> str:
        for needed in state.call.after:
            other = self.calls.get(needed)
            if other is not None and isinstance(other.outcome, Failure):
                return needed
        return ""

    @property
    def wants_decision(self) -> bool:
        """Whether the model should be asked now: something is new to it, and nothing that it waits for is open."""
        return self.end is None and self._news_seq > self._seen_seq and self.joined_open == 0

    def exhausted(self) -> str:
        """Which budget is used up; empty while none is."""
        assert self.request is not None
        budget = self.request.budget
        if len(self.steps) >= budget.steps - 1:
            return "steps"
        if self.attempts >= budget.calls:
            return "calls"
        if self.tokens > budget.tokens:
            return "tokens"
        if self.usd > budget.usd:
            return "usd"
        return "seconds" if self.seconds >= budget.seconds else ""

    def failed_since(self, step: int) -> list[str]:
        """Calls of decision number `step` that failed."""
        if not 1 <= step <= len(self.steps):
            return []
        ids = self.steps[step - 1].calls
        return [one for one in ids if isinstance(self.calls[one].outcome, Failure)]
