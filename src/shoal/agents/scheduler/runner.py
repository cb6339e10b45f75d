"""One run being worked on: asks the policy, has calls performed, writes every change to the log.

What is decided here and what `state` and `performing` decide, this shell drives; it owns the clock and the tasks.

Invariants: an event is in the log before what it announces happens, so a killed run repeats no call whose result is
there; the model is asked again as soon as nothing that it waits for is open, while calls in the background go on; when
`drive` returns, nothing of the run is running any more, and it ended with an answer or with a named reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
from opentelemetry import trace

from shoal.agents.scheduler.calls import CallState
from shoal.agents.scheduler.decision import bind
from shoal.agents.scheduler.guards import Guards
from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.performing import Emitted, Performer, result
from shoal.agents.scheduler.policy import ContextFull, Decided, Policy, PolicyError, View
from shoal.agents.scheduler.records import Call, Decision, RunEvent
from shoal.agents.scheduler.state import RunState
from shoal.agents.tools.outcome import failure
from shoal.agents.tools.toolbox import CANCEL_GRACE_S, Toolbox
from shoal.errors import RunError, ShoalError

TRACER = trace.get_tracer("shoal.agents")
"""Spans go where the process has sent them, and cost nothing where it has not."""

MAX_BAD_DECISIONS = 3
"""So many unusable decisions in a row end the run."""

ANSWER_GRACE_S = 30.0
"""How long the model may still take to answer once the time is used up."""

APPROVAL_TIMEOUT_S = 600.0


class Runner:
    """Works on one run.

    Args:
        state: folded from the run's events so far, the first one included.
        listener: told of events once they are stored.
        answer_grace_s: how long the model may still take to answer once the time is used up.
    """

    def __init__(
        self,
        state: RunState,
        log: EventLog,
        toolbox: Toolbox,
        policy: Policy,
        *,
        guards: Guards | None = None,
        listener: Callable[[Sequence[RunEvent]], None] = lambda _: None,
        approval_timeout_s: float = APPROVAL_TIMEOUT_S,
        answer_grace_s: float = ANSWER_GRACE_S,
    ) -> None:
        self.state = state
        self._log, self._toolbox, self._policy = log, toolbox, policy
        self._guards = guards or Guards()
        self._listener = listener
        self._answer_grace_s = answer_grace_s
        self._calls = Performer(state, toolbox, self._guards, self._emit, self._own, approval_timeout_s)
        self._asking: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None

    async def drive(self) -> RunEvent:
        """Work until the run has ended; gives its last event.

        A caller that cancels this stops the work and leaves a run that can be resumed; `cancel` ends the run.

        Raises:
            RunError: another process works on this run.
            StorageError: the log takes no more events.
        """
        state = self.state
        assert state.request is not None, "a run begins with its request"
        about = {"gen_ai.operation.name": "invoke_agent", "shoal.run": state.run}
        with self._log.claim(state.run), TRACER.start_as_current_span("invoke_agent", attributes=about):
            if self._log.stored(state.run, state.seq, 1):
                raise RunError(f"the run {state.run} went on elsewhere.", "Resume it from its log.")
            left_s = max(0.0, state.request.budget.seconds - state.seconds)
            self._timer = asyncio.get_running_loop().call_later(left_s, self._time_over)
            try:
                if state.seq > 1 and state.end is None:
                    self._recover()
                while state.end is None:
                    self._calls.dispatch()
                    if self._asking is None and state.wants_decision:
                        self._asking = self._own(self._ask())
                    await self._changed.wait()
                    self._changed.clear()
                    if self._failure is not None:
                        raise self._failure
                return state.end
            finally:
                self._timer.cancel()
                if (asking := self._asking) is not None:
                    asking.cancel()
                    await asyncio.wait({asking}, timeout=CANCEL_GRACE_S)
                await self._calls.stop()

    def cancel(self, reason: str = "cancelled") -> None:
        """End the run now, with this reason."""
        if self.state.end is None:
            self._give_up(reason, "the run was cancelled")

    def approve(self, call: str, allowed: bool, by: str) -> bool:
        """Answer for a call that waits for approval; False where none does."""
        return self._calls.approve(call, allowed, by)

    def _emit(self, *emitted: Emitted) -> None:
        now = time.time()
        first = self.state.seq + 1
        events = [
            RunEvent(run=self.state.run, seq=first + offset, time=now, kind=kind, data=data)
            for offset, (kind, data) in enumerate(emitted)
        ]
        for event in events:  # A defect shows here, before it is written for ever.
            self.state.apply(event)
        try:
            self._log.append(events)
        except ShoalError as error:  # whoever asked for the events may be a timer, whose errors nobody sees
            self._failure = self._failure or error
            self._changed.set()
            raise
        self._listener(events)
        self._changed.set()

    def _own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if task is self._asking:
            self._asking = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
        self._changed.set()

    async def _ask(self) -> None:
        state = self.state
        assert state.request is not None
        if not state.must_answer and (which := state.exhausted()):
            self._emit(("budget", {"which": which}))
        if failed := state.failed_since(len(state.steps)):
            self._emit(("replan", {"step": len(state.steps) + 1, "failed": failed}))
        view = View(
            task=state.request.task,
            cards={} if state.must_answer else self._calls.cards,
            steps=tuple(state.steps),
            calls=state.calls,
            history=state.history,
            notes=state.notes,
            must_answer=state.must_answer,
            record=state.request.record,
        )
        seen = state.seq
        try:
            with TRACER.start_as_current_span("decide", attributes={"shoal.step": len(state.steps) + 1}):
                decided = await self._policy.decide(view)
        except PolicyError as error:
            if state.end is None:
                self._give_up("context" if isinstance(error, ContextFull) else "policy", str(error))
            return
        if state.end is None:
            self._take(decided, seen)

    def _take(self, decided: Decided, seen: int) -> None:
        """Turn a decision into events: calls, an answer, or a problem that the model is told."""
        state, decision = self.state, decided.decision
        if state.request is not None and state.request.record and decided.drawn is None:
            self._give_up("policy", "the run is to be recorded, and who decides does not give its tokens")
            return
        problem = decided.problem if decision is None else self._problem(decision)
        step = len(state.steps) + 1
        words = decision.thought if decision is not None else ""
        thought: dict[str, Any] = {"step": step, "seen": seen, "text": words, **msgspec.to_builtins(decided.spent)}
        if decided.drawn is not None:
            thought["drawn"] = msgspec.to_builtins(decided.drawn)
        if decision is None or problem:
            self._emit(("thought", {**thought, "problem": problem}))
            last = state.steps[-MAX_BAD_DECISIONS:]
            if state.must_answer:
                self._give_up("budget", f"the budget of {state.must_answer} is used up, and no answer came: {problem}")
            elif len(last) == MAX_BAD_DECISIONS and all(one.problem for one in last):
                self._give_up("decisions", f"{MAX_BAD_DECISIONS} decisions in a row could not be used: {problem}")
            return
        calls, refused = bind(decision.calls, state.calls.keys(), len(state.calls) + 1)
        for call in calls:
            if call.id not in refused and (found := self._calls.objection(call)) is not None:
                refused[call.id] = found
        plan = [{"call": msgspec.to_builtins(call), "background": self._is_background(call)} for call in calls]
        events: list[Emitted] = [
            ("thought", thought),
            ("plan", {"step": step, "calls": plan, "answer": decision.answer}),
            *(result(name, found) for name, found in refused.items()),
        ]
        if decision.answer is not None:
            events += self._calls.end_all("cancelled", "the run ended")
            events.append(("final", {"answer": decision.answer}))
        self._emit(*events)

    def _problem(self, decision: Decision) -> str:
        if decision.answer is not None:
            return self._guards.against_answer(decision.answer)
        if self.state.must_answer:
            return "only an answer is possible now"
        if not decision.calls and not self.state.open:
            return "it has neither calls nor an answer, and nothing is running"
        return ""

    def _is_background(self, call: Call) -> bool:
        return call.tool in self._calls.cards and self._calls.cards[call.tool].use.mode == "async"

    def _give_up(self, reason: str, message: str) -> None:
        ended = self._calls.end_all("cancelled", "the run ended")
        self._emit(*ended, ("error", {"reason": reason, "message": message}))

    def _time_over(self) -> None:
        if self.state.end is not None:
            return
        if self.state.must_answer == "seconds":
            self._give_up("budget", "the budget of seconds is used up, and no answer came")
            return
        if self._asking is not None:
            self._asking.cancel()
        self._emit(*self._calls.end_all("budget", "the time is used up"), ("budget", {"which": "seconds"}))
        self._timer = asyncio.get_running_loop().call_later(self._answer_grace_s, self._time_over)

    def _recover(self) -> None:
        """Go on where a killed process stopped."""
        events: list[Emitted] = [("resumed", {})]
        again: list[CallState] = []
        for name, call in self.state.calls.held().items():
            if call.phase not in ("dispatched", "running", "backoff", "approval"):
                continue
            tool = self._toolbox.tool(call.call.tool)
            if tool is None:
                events.append(result(name, failure("unavailable", "the tool is no longer there")))
            elif call.phase == "running" and not tool.card.use.idempotent:
                words = "the scheduler was killed during the call: nobody knows whether it was carried out"
                events.append(result(name, failure("interrupted", words)))
            else:
                again.append(call)
        self._emit(*events)
        for call in again:
            self._calls.start(call)
