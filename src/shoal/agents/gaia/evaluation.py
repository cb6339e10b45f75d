"""Having GAIA's questions answered: each is a run with its files in a folder of its own, and ends in one record.

The run is told how the benchmark wants answers written (`ASKED`, after the paper's prompt). What it may call is what
`tools_for` starts for its folder: our document tools, a calculator, whatever a user's `mcp.json` names.

Invariants: each question's answer is kept once, whatever becomes of it; a run is bounded by its budget, and by
`GRACE_S` beyond it; a question whose tools or model cannot be reached has no answer kept, and is asked again when the
evaluation is continued.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.agents.gaia.dataset import Asked, lay_out
from shoal.agents.gaia.scorer import is_right
from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import Policy
from shoal.agents.scheduler.records import Budget, RunRequest
from shoal.agents.scheduler.service import Runs
from shoal.agents.scheduler.state import RunState
from shoal.agents.tools.toolbox import Callee, Toolbox
from shoal.errors import NetworkError, RunError
from shoal.protocol.codec import Record

ASKED = """{question}{files}

Answer with a number, as few words as possible, or a comma separated list of numbers and words. Write numbers without
thousands commas and without units, unless the question asks for them; words without articles or abbreviations."""

GRACE_S = 90.0
"""Beyond a run's own seconds: it may still answer, and its tools may take their time to end."""

ToolsFor = Callable[[Path], AbstractAsyncContextManager[Sequence[Callee]]]
"""Starts the tools for a question whose files are in this folder, and ends them."""

PolicyFor = Callable[[Asked], Policy]


class Answered(Record, frozen=True):
    """What became of one question."""

    task: str
    level: int
    answer: str | None
    right: bool | None
    """Nothing where the right answer is not known."""
    reason: str
    """Why there is no answer; empty where there is one."""
    seconds: float
    tokens: int
    usd: float
    calls: int
    decisions: int
    run: str
    """In the log."""


@dataclass(frozen=True)
class Manner:
    """How questions are worked on."""

    budget: Budget
    concurrency: int = 4
    instruct: bool = True
    """Whether the run is told how answers are to be written."""


async def answer_all(
    questions: Iterable[Asked],
    log: EventLog,
    policy_for: PolicyFor,
    tools_for: ToolsFor,
    manner: Manner,
    keep: Callable[[Answered], None],
) -> None:
    """Have questions answered, some at once.

    Args:
        keep: given each record as soon as it is there.

    Raises:
        NetworkError, RunError: the model or the tools cannot be reached; what was kept stays.
    """
    waiting = iter(questions)

    async def work() -> None:
        for asked in waiting:
            keep(await answer_one(asked, log, policy_for(asked), tools_for, manner))

    workers = [asyncio.create_task(work()) for _ in range(manner.concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def answer_one(asked: Asked, log: EventLog, policy: Policy, tools_for: ToolsFor, manner: Manner) -> Answered:
    """One question's record."""
    with tempfile.TemporaryDirectory(prefix="shoal-gaia-") as place:
        folder = Path(place)
        files = await asyncio.to_thread(lay_out, asked, folder)
        async with tools_for(folder) as tools:
            runs = Runs(log, Toolbox(tools), policy, approval_timeout_s=0.0)
            try:
                request = RunRequest(task=task_of(asked, files, instruct=manner.instruct), budget=manner.budget)
                run = runs.start(request)
                async with asyncio.timeout(manner.budget.seconds + GRACE_S):
                    await runs.ended(run)
                state = runs.state(run)
            except TimeoutError:
                raise RunError(f"the question {asked.id} did not end within its budget.") from None
            finally:
                await runs.close()
    return record_of(asked, state)


def task_of(asked: Asked, files: Sequence[str], *, instruct: bool) -> str:
    """What the run is told."""
    named = f"\n\nThe question comes with: {', '.join(files[:50])}" if files else ""
    return ASKED.format(question=asked.question, files=named) if instruct else asked.question


def record_of(asked: Asked, state: RunState) -> Answered:
    """What a run that has ended amounts to; raises `NetworkError` where its model was not reached."""
    assert state.end is not None, "the run has ended"
    data: dict[str, Any] = state.end.data
    if data.get("reason") == "policy":
        raise NetworkError(f"the question {asked.id} could not be asked: {data.get('message')}")
    answer = data.get("answer")
    return Answered(
        task=asked.id,
        level=asked.level,
        answer=answer,
        right=is_right(answer, asked.answer) if asked.answer else None,
        reason=str(data.get("reason", "")),
        seconds=state.seconds,
        tokens=state.tokens,
        usd=state.usd,
        calls=state.attempts,
        decisions=len(state.steps),
        run=state.run,
    )
