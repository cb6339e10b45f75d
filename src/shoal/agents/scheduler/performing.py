"""A run's calls: checked, dispatched as soon as they are ready, performed with retries, ended.

Invariants: only tools of the run's own list are called, with arguments that match their card, the run's permit and the
guards, whatever any text says; a call that has started has said so in the log before; each call gets exactly one
result; what may have been carried out is made again only if its tool is idempotent.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from opentelemetry import trace

from shoal.agents.scheduler.calls import CallState
from shoal.agents.scheduler.decision import filled, references
from shoal.agents.scheduler.guards import Guards
from shoal.agents.scheduler.records import Call, EventKind
from shoal.agents.scheduler.state import RunState
from shoal.agents.tools.caller import CALLER
from shoal.agents.tools.card import ToolCard
from shoal.agents.tools.outcome import MAY_HAVE_ACTED, Failure, FailureKind, Outcome, failure
from shoal.agents.tools.schema import Schema
from shoal.agents.tools.toolbox import CANCEL_GRACE_S, Toolbox

TRACER = trace.get_tracer("shoal.agents")

RETRY_BASE_S = 0.2
RETRY_MAX_S = 10.0

PROGRESS_EVERY_S = 0.2
MAX_PROGRESS_EVENTS = 200
"""Of one attempt; further signs of life are heard and not logged."""

Emitted = tuple[EventKind, dict[str, Any]]


class Performer:
    """Performs the calls of one run.

    Args:
        emit: stores events and applies them to the state.
        own: runs a coroutine as a task whose failure ends the run.
        approval_timeout_s: nobody's answer within this is a no.
    """

    def __init__(
        self,
        state: RunState,
        toolbox: Toolbox,
        guards: Guards,
        emit: Callable[..., None],
        own: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        approval_timeout_s: float,
    ) -> None:
        assert state.request is not None, "a run begins with its request"
        self._state, self._request, self._toolbox, self._guards = state, state.request, toolbox, guards
        self._emit, self._own = emit, own
        self._approval_timeout_s = approval_timeout_s
        self.cards: dict[str, ToolCard] = toolbox.cards(self._request.tools)
        self._permits = {name: Schema(permit, f"the permit of {name}") for name, permit in self._request.permit.items()}
        self._key = f"run:{state.run}"
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._approvals: dict[str, asyncio.Future[tuple[bool, str]]] = {}
        toolbox.capacity.limit(self._key, self._request.max_concurrency)

    def objection(self, call: Call) -> Failure | None:
        """Why a planned call may not be made; arguments that refer to results are looked at when these are there."""
        if call.tool not in self.cards:
            return failure("denied", f"there is no tool {call.tool!r}; there are: {', '.join(self.cards)}")
        return None if next(references(call.arguments), None) else self._against(call.tool, call.arguments)

    def dispatch(self) -> None:
        """Start whatever can start, and end what never can."""
        starting: list[CallState] = []
        while True:
            events: list[Emitted] = []
            for call, needed in self._state.take_doomed():
                events.append(result(call.call.id, failure("dependency", f"it needs {needed}, which failed")))
            for call in self._state.take_ready():
                arguments = filled(call.call.arguments, lambda one: self._state.calls[one].outcome)
                if (found := self._against(call.call.tool, arguments)) is not None:
                    events.append(result(call.call.id, found))
                else:
                    events.append(("dispatch", {"call": call.call.id, "tool": call.call.tool, "arguments": arguments}))
                    starting.append(call)
            if not events:
                break
            self._emit(*events)
        for call in starting:
            self.start(call)

    def start(self, call: CallState) -> None:
        """Perform a call that has been dispatched."""
        task = self._own(self._perform(call))
        self._tasks[call.call.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(call.call.id, None))

    def approve(self, call: str, allowed: bool, by: str) -> bool:
        """Answer for a call that waits for approval; False where none does."""
        waiting = self._approvals.get(call)
        if waiting is None or waiting.done():
            return False
        waiting.set_result((allowed, by))
        return True

    def end_all(self, kind: FailureKind, words: str) -> list[Emitted]:
        """Tell all calls to end; gives the results of those that have none, to be emitted at once."""
        for task in self._tasks.values():
            task.cancel()
        open_calls = [name for name, call in self._state.calls.held().items() if call.outcome is None]
        return [result(name, failure(kind, words)) for name in open_calls]

    async def stop(self) -> None:
        """End all tasks, and wait for them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2 * CANCEL_GRACE_S)
        self._toolbox.capacity.forget(self._key)

    def _against(self, name: str, arguments: dict[str, Any]) -> Failure | None:
        tool = self._toolbox.tool(name)
        if tool is None:
            return failure("unavailable", f"the tool {name} is no longer there")
        if problem := tool.parameters.problem(arguments):
            return failure("arguments", problem)
        permit = self._permits.get(name)
        if permit is not None and (problem := permit.problem(arguments)):
            return failure("denied", f"the run does not permit these arguments: {problem}")
        if problem := self._guards.against_call(name, arguments):
            return failure("denied", problem)
        return None

    async def _perform(self, call: CallState) -> None:
        """One call from its dispatch to its result, however many attempts it takes."""
        name, tool = call.call.id, self._toolbox.tool(call.call.tool)
        assert tool is not None, "it was there when the call was dispatched, in the same moment"
        CALLER.set(self._state.run)  # In this task's own context.
        use, capacity = tool.card.use, self._toolbox.capacity
        if not await self._is_allowed(call, use.needs_approval):
            self._emit(result(name, failure("denied", "it was not approved")))
            return
        while True:
            slot = capacity.take_at_once(tool.card.name, self._key)
            if slot is None:
                self._emit(("queued", {"call": name}))
                slot = await capacity.take(tool.card.name, self._key)
            if which := self._too_dear(use.cost_usd):
                slot.release()
                self._emit(result(name, failure("budget", f"the budget of {which} is used up")))
                return
            attempt = call.attempts + 1
            try:
                self._emit(("started", {"call": name, "attempt": attempt, "usd": use.cost_usd}))
            except BaseException:
                slot.release()
                raise
            started_s = time.monotonic()
            about: dict[str, str | int] = {
                "gen_ai.operation.name": "execute_tool",
                "gen_ai.tool.name": tool.card.name,
                "shoal.attempt": attempt,
            }
            with TRACER.start_as_current_span(f"execute_tool {tool.card.name}", attributes=about) as span:
                outcome = await tool.perform(call.arguments, slot, self._progress(call))
                if isinstance(outcome, Failure):
                    span.set_attribute("error.type", outcome.kind)
            if not _may_retry(outcome, attempt, use.max_retries, idempotent=use.idempotent):
                self._emit(result(name, outcome, time.monotonic() - started_s))
                return
            assert isinstance(outcome, Failure)
            wait_s = max(_backoff_s(f"{self._key} {name}", attempt), outcome.retry_after_s)
            error = msgspec.to_builtins(outcome)
            self._emit(("retry", {"call": name, "attempt": attempt, "wait_s": wait_s, "error": error}))
            await asyncio.sleep(wait_s)

    async def _is_allowed(self, call: CallState, marked: bool) -> bool:
        """Ask somebody, where the run wants that."""
        asked = self._request.approve == "all" or (self._request.approve == "marked" and marked)
        if call.allowed is not None or not asked:
            return call.allowed is not False
        name = call.call.id
        answered: asyncio.Future[tuple[bool, str]] = asyncio.get_running_loop().create_future()
        self._approvals[name] = answered
        try:
            if call.phase != "approval":
                self._emit(("approval", {"call": name, "tool": call.call.tool, "arguments": call.arguments}))
            async with asyncio.timeout(self._approval_timeout_s):
                allowed, by = await answered
        except TimeoutError:
            allowed, by = False, "nobody in time"
        finally:
            del self._approvals[name]
        self._emit(("approved", {"call": name, "allowed": allowed, "by": by}))
        return allowed

    def _too_dear(self, cost_usd: float) -> str:
        budget = self._request.budget
        if self._state.attempts >= budget.calls:
            return "calls"
        return "usd" if self._state.usd + cost_usd > budget.usd else ""

    def _progress(self, call: CallState) -> Callable[[str], None]:
        last_s, count = 0.0, 0

        def say(words: str) -> None:
            nonlocal last_s, count
            now_s = time.monotonic()
            over = call.phase != "running" or call.call.id not in self._tasks
            if over or now_s - last_s < PROGRESS_EVERY_S or count == MAX_PROGRESS_EVENTS:
                return
            last_s, count = now_s, count + 1
            self._emit(("progress", {"call": call.call.id, "text": words[:200]}))

        return say


def result(call: str, outcome: Outcome, seconds: float = 0.0) -> Emitted:
    """The event of a call's end."""
    if isinstance(outcome, Failure):
        return "result", {"call": call, "ok": False, "error": msgspec.to_builtins(outcome), "seconds": seconds}
    return "result", {"call": call, "ok": True, "value": outcome.value, "seconds": seconds}


def _may_retry(outcome: Outcome, attempt: int, max_retries: int, *, idempotent: bool) -> bool:
    if not isinstance(outcome, Failure) or not outcome.retryable or attempt > max_retries:
        return False
    if outcome.retry_after_s > RETRY_MAX_S:
        return False
    return idempotent or outcome.kind not in MAY_HAVE_ACTED


def _backoff_s(call: str, attempt: int) -> float:
    """Exponential, and spread so that calls that failed together don't return together."""
    digest = hashlib.blake2b(f"{call} {attempt}".encode(), digest_size=4).digest()
    spread = 0.5 + int.from_bytes(digest, "big") / 2**33
    return min(RETRY_BASE_S * float(2 ** (attempt - 1)), RETRY_MAX_S) * spread
