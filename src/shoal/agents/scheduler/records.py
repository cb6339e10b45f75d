"""What a run is made of: its request, its budget, decisions, calls, events. All of it is JSON in the log."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from shoal.errors import RecordError
from shoal.protocol.codec import Record
from shoal.protocol.episode import Turn

MAX_TASK_CHARS = 64 * 1024
MAX_ID_CHARS = 64

EventKind = Literal[
    "run",
    "thought",
    "plan",
    "dispatch",
    "approval",
    "approved",
    "queued",
    "started",
    "progress",
    "retry",
    "result",
    "replan",
    "budget",
    "resumed",
    "final",
    "error",
]

AG_UI_TYPES: dict[str, str] = {
    "run": "RUN_STARTED",
    "thought": "THINKING_TEXT_MESSAGE_CONTENT",
    "plan": "STEP_STARTED",
    "dispatch": "TOOL_CALL_START",
    "result": "TOOL_CALL_RESULT",
    "final": "RUN_FINISHED",
    "error": "RUN_ERROR",
}
"""AG-UI's word for an event, where it has one; the others are `CUSTOM`."""

LAST_KINDS = ("final", "error")


class Budget(Record, frozen=True):
    """What a run may spend. When one of these is used up, the model may only answer; then the run ends."""

    steps: int = 16
    """Decisions."""
    calls: int = 1000
    """Attempts to call a tool."""
    tokens: int = 200_000
    """Read and written by the model."""
    seconds: float = 600.0
    """While somebody works on the run; the time in which it lay dead does not count."""
    usd: float = 1.0
    """Tools and tokens together."""

    def check(self) -> None:
        if not (1 <= self.steps <= 10_000 and 0 <= self.calls <= 1_000_000 and 0 <= self.tokens <= 1 << 40):
            raise RecordError("a budget's steps, calls or tokens are out of range.")
        if not (0 < self.seconds <= 30 * 86400 and 0 <= self.usd < 1e9):
            raise RecordError("a budget's seconds or usd are out of range.")


class RunRequest(Record, frozen=True):
    """What somebody wants done, and what may be used for it."""

    task: str
    tools: tuple[str, ...] | None = None
    """Names of the tools that may be called; absent: all there are."""
    permit: dict[str, dict[str, Any]] = {}
    """Tool to a JSON schema that its arguments must match as well: `{"files.read": {"properties": {...}}}`."""
    budget: Budget = Budget()
    approve: Literal["marked", "all", "none"] = "marked"
    """Which calls somebody is asked about: of tools marked so, all, or none."""
    max_concurrency: int = 64
    """Calls of this run at once."""
    session: str = ""
    """Runs of one session see the tasks and answers of those before."""
    record: bool = False
    """Keep the tokens of each decision, so that the run is an episode that can be trained on (`episodes`)."""

    def check(self) -> None:
        self.budget.check()
        if not self.task.strip() or len(self.task) > MAX_TASK_CHARS:
            raise RecordError(f"a task has 1 to {MAX_TASK_CHARS} characters; this one has {len(self.task)}.")
        if not 1 <= self.max_concurrency <= 4096 or len(self.session) > MAX_ID_CHARS:
            raise RecordError("max_concurrency is not between 1 and 4096, or the session's name is too long.")
        if len(self.tools or ()) > 4096 or len(msgspec.json.encode(self.permit)) > MAX_TASK_CHARS:
            raise RecordError("too many tools are named, or the permits are too long.")


class Call(Record, frozen=True):
    """One call as planned. Its id is unique in the run, and so is its result."""

    id: str
    tool: str
    arguments: dict[str, Any]
    """May hold `{"$result": ID}` anywhere: the value of that call's result."""
    after: tuple[str, ...] = ()
    """Calls that must have succeeded before; those that the arguments name are among them."""


class Decision(Record, frozen=True):
    """What the model wants next: calls, or an answer, or (neither) to wait for what is still running."""

    thought: str = ""
    calls: tuple[Call, ...] = ()
    answer: str | None = None


class Spent(Record, frozen=True):
    """What one decision took."""

    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0


class Drawn(Record, frozen=True):
    """The tokens of one decision, as a turn of an episode."""

    turn: Turn
    temperature: float


class RunEvent(Record, frozen=True):
    """Something that happened in a run; `seq` counts from 1 without gaps."""

    run: str
    seq: int
    time: float
    """Unix seconds."""
    kind: EventKind
    data: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.run}:{self.seq}"

    @property
    def is_last(self) -> bool:
        return self.kind in LAST_KINDS

    def check(self) -> None:
        if self.seq < 1 or not math.isfinite(self.time):
            raise RecordError("an event's number is not positive, or its time not finite.")
