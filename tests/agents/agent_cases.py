"""Tools and runs that several tests need."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import Decided, Policy, ScriptedPolicy, View
from shoal.agents.scheduler.records import Call, Decision, RunEvent, RunRequest
from shoal.agents.scheduler.service import Runs
from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool, ToolError
from shoal.agents.tools.toolbox import Callee, Toolbox

TRUSTED = Use(idempotent=True, timeout_s=10, max_retries=2)


async def add(x: int, y: int) -> int:
    """Adds two numbers."""
    return x + y


async def wait(seconds: float) -> str:
    """Waits."""
    await asyncio.sleep(seconds)
    return f"waited {seconds}"


class Flaky:
    """A tool that fails a number of times before it works."""

    def __init__(self, failures: int, *, retryable: bool = True) -> None:
        self.left, self.retryable, self.calls = failures, retryable, 0

    async def flaky(self) -> str:
        """Works at last."""
        self.calls += 1
        if self.left:
            self.left -= 1
            raise ToolError("not yet", retryable=self.retryable)
        return "works"


def call(name: str, tool: str, *after: str, **arguments: Any) -> Call:
    return Call(id=name, tool=tool, arguments=arguments, after=after)


def plan(*calls: Call, thought: str = "") -> Decision:
    return Decision(thought=thought, calls=calls)


def answer(text: str) -> Decision:
    return Decision(answer=text)


def turns(*decisions: Decision | Decided | Callable[[View], Decision]) -> ScriptedPolicy:
    """A policy that makes these decisions one after another."""
    left = list(decisions)

    def script(view: View) -> Decision | Decided:
        made = left.pop(0)
        return made(view) if callable(made) else made

    return ScriptedPolicy(script)


class House:
    """`async with House(path, tools, policy) as house`: a log, a toolbox and their runs."""

    def __init__(self, path: Path, callees: Sequence[Callee], policy: Policy, **options: Any) -> None:
        self.log = EventLog(path / "runs.db")
        self.box = Toolbox(callees)
        self.runs = Runs(self.log, self.box, policy, **options)

    async def __aenter__(self) -> House:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.runs.close()
        assert self.box.capacity.taken() == 0, "a slot was not given back"
        assert self.box.capacity.exceeded == 0
        self.log.close()

    async def run(self, task: str = "a task", **request: Any) -> list[RunEvent]:
        """All events of a run, from its beginning to its end."""
        name = self.runs.start(RunRequest(task=task, **request))
        async with asyncio.timeout(60):
            await self.runs.ended(name)
        return list(self.log.events(name))


def of_kind(events: list[RunEvent], kind: str) -> list[dict[str, Any]]:
    return [event.data for event in events if event.kind == kind]


def results(events: list[RunEvent]) -> dict[str, Any]:
    """Call to its value, or to the kind of its failure."""
    found = of_kind(events, "result")
    assert len({one["call"] for one in found}) == len(found), "a call has two results"
    return {one["call"]: one["value"] if one["ok"] else f"!{one['error']['kind']}" for one in found}


def tool(function: Callable[..., Any], use: Use = TRUSTED) -> FunctionTool:
    return FunctionTool(function, use)
