"""One agent run as people look at it: decisions, and calls as lanes over time with their attempts. Pure.

A trace is folded from the run's events in order, as `agents.scheduler.state` folds them; that keeps what the model
needs, this keeps times. Invariants: at most `MAX_LANES` calls and `MAX_STEPS` decisions are kept, the rest are counted;
texts are cut; an event that says something unexpected changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import msgspec

MAX_LANES = 2000
MAX_STEPS = 1000
MAX_ATTEMPTS = 32
MAX_CHARS = 2000


@dataclass
class Attempt:
    """One try of a call."""

    started: float
    ended: float = math.nan
    error: str = ""


@dataclass
class Lane:
    """One call."""

    id: str
    tool: str
    arguments: str
    step: int
    after: tuple[str, ...]
    planned: float
    phase: str = "waiting"
    attempts: list[Attempt] = field(default_factory=list)
    num_attempts: int = 0
    ended: float = math.nan
    ok: bool = False
    outcome: str = ""


@dataclass
class Decided:
    """One decision."""

    thought: str
    problem: str = ""
    answer: str | None = None
    calls: list[str] = field(default_factory=list)


@dataclass
class Trace:
    """A run so far."""

    run: str
    seq: int = 0
    task: str = ""
    started: float = math.nan
    newest: float = math.nan
    steps: list[Decided] = field(default_factory=list)
    num_steps: int = 0
    lanes: dict[str, Lane] = field(default_factory=dict)
    num_calls: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_retries: int = 0
    num_at_once: int = 0
    """Most calls that ran at the same time, of those that are kept."""
    running: int = 0
    tokens: int = 0
    usd: float = 0.0
    end: str = ""
    """Kind of the last event, once the run has ended."""
    answer: str = ""

    def apply(self, seq: int, time: float, kind: str, data: dict[str, Any]) -> None:
        """Take in the next event."""
        self.seq = seq
        if math.isfinite(time):
            self.started = time if math.isnan(self.started) else self.started
            self.newest = time
        match kind:
            case "run":
                request = data.get("request")
                self.task = text(request.get("task") if isinstance(request, dict) else "")
            case "thought":
                self.num_steps += 1
                self.tokens += int(amount(data, "tokens_in") + amount(data, "tokens_out"))
                self.usd += amount(data, "usd")
                if len(self.steps) < MAX_STEPS:
                    self.steps.append(Decided(text(data.get("text")), text(data.get("problem"))))
            case "plan":
                self._plan(time, data)
            case "final":
                self.end, self.answer = kind, text(data.get("answer"))
            case "error":
                self.end, self.answer = kind, f"{text(data.get('reason'))}: {text(data.get('message'))}"
            case _:
                lane = self.lanes.get(text(data.get("call")))
                if kind == "started":
                    self.usd += amount(data, "usd")
                elif kind == "retry":
                    self.num_retries += 1
                elif kind == "result":
                    self.num_done += 1
                    self.num_failed += not data.get("ok")
                if lane is not None:
                    self._of_call(lane, kind, time, data)

    def _plan(self, time: float, data: dict[str, Any]) -> None:
        answer = data.get("answer")
        if self.steps and len(self.steps) == self.num_steps:
            self.steps[-1].answer = None if answer is None else text(answer)
        planned = data.get("calls")
        for one in planned if isinstance(planned, list) else ():
            call = one.get("call") if isinstance(one, dict) else None
            if not isinstance(call, dict):
                continue
            self.num_calls += 1
            if len(self.lanes) >= MAX_LANES:
                continue
            name, after = text(call.get("id")), call.get("after")
            self.lanes[name] = Lane(
                id=name,
                tool=text(call.get("tool")),
                arguments=text(call.get("arguments")),
                step=self.num_steps,
                after=tuple(text(other) for other in after[:MAX_ATTEMPTS]) if isinstance(after, list) else (),
                planned=time,
            )
            if self.steps and len(self.steps) == self.num_steps:
                self.steps[-1].calls.append(name)

    def _of_call(self, lane: Lane, kind: str, time: float, data: dict[str, Any]) -> None:
        match kind:
            case "dispatch" | "queued" | "approval":
                lane.phase = {"dispatch": "dispatched", "queued": "queued", "approval": "asks for approval"}[kind]
            case "approved":
                lane.phase = "dispatched" if data.get("allowed") else "refused"
            case "started":
                lane.phase = "running"
                lane.num_attempts += 1
                self.running += 1
                self.num_at_once = max(self.num_at_once, self.running)
                if len(lane.attempts) < MAX_ATTEMPTS:
                    lane.attempts.append(Attempt(time))
            case "retry":
                lane.phase = "waits to try again"
                self._end_attempt(lane, time, text(data.get("error")))
            case "result":
                lane.ok, lane.ended, lane.phase = bool(data.get("ok")), time, "done"
                lane.outcome = text(data.get("value") if lane.ok else _failure(data.get("error")))
                self._end_attempt(lane, time, "" if lane.ok else lane.outcome)
            case _:
                pass

    def _end_attempt(self, lane: Lane, time: float, error: str) -> None:
        if lane.attempts and math.isnan(lane.attempts[-1].ended):
            lane.attempts[-1].ended, lane.attempts[-1].error = time, error
            self.running -= 1


def text(value: Any) -> str:
    """A value as text of bounded length."""
    if value is None:
        return ""
    shown = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return shown if len(shown) <= MAX_CHARS else f"{shown[: MAX_CHARS - 1]}…"


def amount(data: dict[str, Any], key: str) -> float:
    """A finite number of an event, or 0."""
    value = data.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable and value is not None and abs(value) < 1e15 else 0.0


def _failure(error: Any) -> str:
    if isinstance(error, dict):
        return f"{text(error.get('kind'))}: {text(error.get('message'))}"
    return text(error)
