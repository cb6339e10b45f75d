"""Deadlines, defects and slots."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated

import pytest
from agent_cases import TRUSTED, add, tool, wait
from pydantic import Field

from shoal.agents.tools.card import Use
from shoal.agents.tools.function import Progress
from shoal.agents.tools.outcome import Failure, Outcome, Success
from shoal.agents.tools.toolbox import Toolbox
from shoal.errors import ConfigError


async def perform(box: Toolbox, name: str, **arguments: object) -> Outcome:
    found = box.tool(name)
    assert found is not None
    slot = await box.capacity.take(name, "run:1")
    return await found.perform(dict(arguments), slot, lambda _: None)


async def test_a_call_that_never_ends_ends_at_its_deadline() -> None:
    box = Toolbox([tool(wait, Use(timeout_s=0.05))])
    outcome = await perform(box, "wait", seconds=1000)
    assert isinstance(outcome, Failure) and outcome.kind == "timeout" and outcome.retryable
    assert box.capacity.taken() == 0
    assert box.health()["wait"]["failures"] == {"timeout": 1}


async def test_signs_of_life_move_the_deadline() -> None:
    async def slow(progress: Progress) -> str:
        """Works on."""
        for _ in range(6):
            await asyncio.sleep(0.05)
            progress("on it")
        return "done"

    box = Toolbox([tool(slow, Use(timeout_s=0.2))])
    assert await perform(box, "slow") == Success(value="done")


async def test_a_call_that_does_not_let_itself_be_ended_keeps_its_slot_and_not_its_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shoal.agents.tools.toolbox.CANCEL_GRACE_S", 0.05)
    let_go = asyncio.Event()

    async def stubborn() -> str:
        """Hears nothing."""
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()
        return "at last"

    box = Toolbox([tool(stubborn, Use(timeout_s=0.05))])
    outcome = await perform(box, "stubborn")
    assert isinstance(outcome, Failure) and outcome.kind == "timeout"
    assert box.capacity.taken("stubborn") == 1
    let_go.set()
    await asyncio.sleep(0.01)
    assert box.capacity.taken("stubborn") == 0


async def test_a_defect_and_a_wrong_answer_are_failures() -> None:
    async def broken() -> int:
        """Breaks."""
        return 1 // 0

    async def liar() -> Annotated[int, Field(lt=10)]:
        """Promises less than ten."""
        return 77

    box = Toolbox([tool(broken), tool(liar)])
    outcome = await perform(box, "broken")
    assert isinstance(outcome, Failure) and outcome.kind == "error" and "ZeroDivisionError" in outcome.message
    outcome = await perform(box, "liar")
    assert isinstance(outcome, Failure) and outcome.kind == "malformed"
    assert box.capacity.taken() == 0


async def test_a_cancelled_caller_ends_the_call() -> None:
    ended = asyncio.Event()

    async def endless() -> None:
        """Waits for ever."""
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    box = Toolbox([tool(endless)])
    task = asyncio.create_task(perform(box, "endless"))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set() and box.capacity.taken() == 0


async def test_a_tool_that_keeps_failing_is_left_alone() -> None:
    box = Toolbox([tool(wait, Use(timeout_s=0.01))])
    kinds = []
    for _ in range(7):
        outcome = await perform(box, "wait", seconds=5)
        assert isinstance(outcome, Failure)
        kinds.append(outcome.kind)
    assert kinds == ["timeout"] * 5 + ["unavailable"] * 2
    assert box.capacity.taken() == 0


def test_names_are_unique_and_known() -> None:
    with pytest.raises(ConfigError, match="two tools called add"):
        Toolbox([tool(add), tool(add, TRUSTED)])
    with pytest.raises(ConfigError, match="no tool 'subtract'"):
        Toolbox([tool(add)]).cards(("subtract",))
