"""Many runs of one process: started, followed, cancelled, approved, resumed, forked.

Invariants: each run that is worked on is one task, owned here and ended by `close`; no more than `max_runs` are worked
on at once; a follower gets each event exactly once and in order, as the bytes that are stored, from wherever it left
off.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import msgspec

from shoal.agents.scheduler.guards import Guards
from shoal.agents.scheduler.log import EventLog, Stored
from shoal.agents.scheduler.policy import Policy
from shoal.agents.scheduler.recall import LogRecall
from shoal.agents.scheduler.records import LAST_KINDS, RunEvent, RunRequest
from shoal.agents.scheduler.runner import ANSWER_GRACE_S, APPROVAL_TIMEOUT_S, Runner
from shoal.agents.scheduler.state import RunState
from shoal.agents.tools.toolbox import Toolbox
from shoal.errors import CapacityError, RunError
from shoal.memory.recall import Recall

logger = logging.getLogger("shoal.agents")

MAX_HISTORY = 16
"""Earlier runs of a session that a run sees."""

FOLLOW_POLL_S = 5.0
"""How often a follower looks for events that another process has written."""


class Runs:
    """The runs of one log.

    Args:
        recall: what is remembered for a task; a run keeps the notes that it began with, also when it is resumed.
        max_runs: worked on at once; further ones are refused.
        approval_timeout_s: nobody's answer within this is a no.
        answer_grace_s: how long the model may still take to answer once the time is used up.
    """

    def __init__(
        self,
        log: EventLog,
        toolbox: Toolbox,
        policy: Policy,
        *,
        guards: Guards | None = None,
        recall: Callable[[str], Recall] | None = None,
        max_runs: int = 32,
        approval_timeout_s: float = APPROVAL_TIMEOUT_S,
        answer_grace_s: float = ANSWER_GRACE_S,
    ) -> None:
        self.log, self.toolbox = log, toolbox
        self._policy, self._guards, self._recall = policy, guards or Guards(), recall
        self._max_runs = max_runs
        self._approval_timeout_s, self._answer_grace_s = approval_timeout_s, answer_grace_s
        self._runners: dict[str, Runner] = {}
        self._tasks: dict[str, asyncio.Task[RunEvent]] = {}
        self._followers: dict[str, set[asyncio.Event]] = {}

    def start(self, request: RunRequest) -> str:
        """Begin a run; gives its id.

        Raises:
            RecordError, ConfigError: the request is no good.
            RunError: a guard refuses the task.
            CapacityError: too many runs are being worked on.
        """
        request.check()
        if reason := self._guards.against_task(request.task):
            raise RunError(f"the task is refused: {reason}.")
        self.toolbox.cards(request.tools)
        self._check_room()
        run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        history = self._history(request.session) if request.session else []
        data: dict[str, Any] = {"request": msgspec.to_builtins(request), "history": history}
        if self._recall is not None and (notes := self._recall(request.task)).entries:
            data["notes"] = {"text": notes.text, "entries": list(notes.entries)}
        first = RunEvent(run=run, seq=1, time=time.time(), kind="run", data=data)
        self.log.append([first])
        self._work(run)
        return run

    def resume(self, run: str) -> None:
        """Go on with a run that no process works on; nothing happens to one that has ended.

        Raises:
            RunError: there is no such run.
        """
        if run not in self._tasks:
            self._check_room()
            self._work(run)

    def fork(self, run: str, seq: int) -> str:
        """A new run that begins with the first `seq` events of another one, and goes on by itself.

        Raises:
            RunError: there is no such run or event, or the run had ended by then.
        """
        self._check_room()
        events = list(self.log.events(run, until=seq))
        if len(events) < seq or seq < 1 or events[-1].is_last:
            raise RunError(f"run {run} cannot be forked at event {seq}.", "Name an event before the run's end.")
        made = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        first = msgspec.structs.replace(events[0], data={**events[0].data, "forked": f"{run}:{seq}"})
        self.log.append([msgspec.structs.replace(event, run=made) for event in [first, *events[1:]]])
        self._work(made)
        return made

    def cancel(self, run: str) -> bool:
        """End a run; False where it is not being worked on here."""
        runner = self._runners.get(run)
        if runner is None:
            return False
        runner.cancel()
        return True

    def approve(self, run: str, call: str, allowed: bool, by: str) -> bool:
        """Answer for a call that waits for approval; False where none does."""
        runner = self._runners.get(run)
        return runner is not None and runner.approve(call, allowed, by)

    async def ended(self, run: str) -> RunEvent:
        """Wait for the end of a run that is worked on here."""
        task = self._tasks.get(run)
        if task is not None:
            return await asyncio.shield(task)
        state = self.state(run)
        if state.end is None:
            raise RunError(f"nobody works on run {run}.", "Resume it.")
        return state.end

    def state(self, run: str) -> RunState:
        """What a run's events amount to; raises `RunError` where there is no such run."""
        runner = self._runners.get(run)
        if runner is not None:
            return runner.state
        state = RunState(LogRecall(self.log, run))
        for event in self.log.events(run):
            state.apply(event)
        return state

    def summary(self, run: str) -> dict[str, Any]:
        """A run for people: where it stands, what it spent, its newest calls."""
        state = self.state(run)
        assert state.request is not None
        last = {} if state.end is None else state.end.data
        return {
            **self._brief(run, state.request.task, state.end is not None, last),
            "spent": {
                "steps": len(state.steps),
                "calls": state.attempts,
                "tokens": state.tokens,
                "usd": state.usd,
                "seconds": state.seconds,
            },
            "calls": [
                {"id": name, "tool": call.call.tool, "phase": call.phase, "attempts": call.attempts}
                for name, call in state.calls.held().items()
            ],
            "num_calls": len(state.calls),
            "last_event": state.seq,
        }

    def newest(self, count: int) -> list[dict[str, Any]]:
        """The newest runs: their tasks, and how they ended."""
        found = []
        for run, first, last in self.log.runs()[:count]:
            task = msgspec.json.decode(first.data)["request"]["task"]
            found.append(self._brief(run, task, last is not None, msgspec.json.decode(last.data) if last else {}))
        return found

    def _brief(self, run: str, task: str, has_ended: bool, last: dict[str, Any]) -> dict[str, Any]:
        status = "running" if run in self._tasks else "interrupted"
        if has_ended:
            status = last.get("reason", "done")
        return {
            "id": run,
            "object": "run",
            "status": status,
            "task": task,
            "answer": last.get("answer"),
            "error": last.get("message"),
        }

    async def follow(self, run: str, after: int = 0) -> AsyncGenerator[Stored]:
        """Events from behind number `after` up to the run's end; where nobody works on it, up to now.

        Raises:
            RunError: there is no such run.
        """
        if not self.log.stored(run, 0, 1):
            raise RunError(f"there is no run {run!r}.")
        told = asyncio.Event()
        self._followers.setdefault(run, set()).add(told)
        try:
            while True:
                told.clear()
                is_alive = run in self._tasks
                page = self.log.stored(run, after)
                for event in page:
                    after = event.seq
                    yield event
                    if event.kind in LAST_KINDS:
                        return
                if not page:
                    if not is_alive:
                        return
                    try:
                        async with asyncio.timeout(FOLLOW_POLL_S):
                            await told.wait()
                    except TimeoutError:
                        continue
        finally:
            self._followers[run].discard(told)
            if not self._followers[run]:
                del self._followers[run]

    async def close(self) -> None:
        """Stop working; runs that have not ended can be resumed."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _check_room(self) -> None:
        if len(self._tasks) >= self._max_runs:
            raise CapacityError(f"{self._max_runs} runs are being worked on.", "Try again when one has ended.")

    def _work(self, run: str) -> None:
        state = RunState(LogRecall(self.log, run))
        for event in self.log.events(run):
            state.apply(event)
        runner = Runner(
            state,
            self.log,
            self.toolbox,
            self._policy,
            guards=self._guards,
            listener=self._tell,
            approval_timeout_s=self._approval_timeout_s,
            answer_grace_s=self._answer_grace_s,
        )
        task = asyncio.create_task(runner.drive(), name=f"run {run}")
        self._runners[run], self._tasks[run] = runner, task
        task.add_done_callback(lambda ended: self._done(run, ended))

    def _done(self, run: str, task: asyncio.Task[RunEvent]) -> None:
        del self._runners[run], self._tasks[run]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the run %s stopped: %r", run, error)
        for told in self._followers.get(run, ()):
            told.set()

    def _tell(self, events: Sequence[RunEvent]) -> None:
        for told in self._followers.get(events[0].run, ()):
            told.set()

    def _history(self, session: str) -> list[tuple[str, str]]:
        """Tasks and answers of the session's runs that ended well, oldest first."""
        found: list[tuple[str, str]] = []
        for _, first, last in self.log.runs():
            request = msgspec.json.decode(first.data)["request"]
            if request.get("session") == session and last is not None and last.kind == "final":
                found.append((request["task"], msgspec.json.decode(last.data)["answer"]))
                if len(found) == MAX_HISTORY:
                    break
        return found[::-1]
