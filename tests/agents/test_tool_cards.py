"""Cards, functions as tools, schemas, health."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import pytest
from agent_cases import add, tool
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from shoal.agents.tools.card import ToolCard, Use
from shoal.agents.tools.function import FunctionTool, Progress, ToolError
from shoal.agents.tools.health import COOLDOWN_S, FAULTS, FAULTS_TO_OPEN, Health
from shoal.agents.tools.outcome import MAX_VALUE_BYTES, Failure, Outcome, Success, failure, success
from shoal.agents.tools.schema import Schema
from shoal.errors import ConfigError, RecordError


class Place(BaseModel):
    """Somewhere."""

    town: str
    latitude: float = 0.0


def never(_: str) -> None:
    raise AssertionError("this tool shows no progress")


async def test_a_functions_types_become_its_card_and_guard_its_arguments() -> None:
    def visit(place: Place, days: Annotated[int, Field(ge=1)] = 2) -> list[str]:
        """Goes there.

        And back."""
        return [place.town] * days

    made = tool(visit)
    assert made.card.name == "visit"
    assert made.card.description == "Goes there.\n\nAnd back."
    assert made.card.parameters["required"] == ["place"]
    assert "title" not in str(made.card.parameters)
    assert made.card.output == {"items": {"type": "string"}, "type": "array"}
    assert await made.call({"place": {"town": "Ulm"}}, never) == Success(value=["Ulm", "Ulm"])
    for wrong in ({}, {"place": {"town": 7}}, {"place": {"town": "Ulm"}, "days": 0}, {"place": {"town": "a"}, "x": 1}):
        outcome = await made.call(wrong, never)
        assert isinstance(outcome, Failure) and outcome.kind == "arguments"


async def test_progress_is_handed_in_and_not_part_of_the_card() -> None:
    async def work(n: int, progress: Progress) -> int:
        """Works."""
        progress("half of it")
        return n

    heard: list[str] = []
    made = tool(work)
    assert list(made.card.parameters["properties"]) == ["n"]
    assert await made.call({"n": 3}, heard.append) == Success(value=3)
    assert heard == ["half of it"]


def test_a_function_that_says_too_little_is_refused() -> None:
    def untyped(x):  # type: ignore[no-untyped-def]
        return x

    def no_return(x: int):  # type: ignore[no-untyped-def]
        return x

    def many(*xs: int) -> int:
        return sum(xs)

    for function in (untyped, no_return, many):
        with pytest.raises(ConfigError):
            FunctionTool(function)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "with space"},
        {"name": "a:b"},
        {"name": ""},
        {"description": "x" * 5000},
        {"parameters": {"type": "string"}},
        {"parameters": {"type": "object", "description": "x" * 70_000}},
        {"use": Use(max_concurrency=0)},
        {"use": Use(timeout_s=0)},
        {"use": Use(cost_usd=-1)},
        {"use": Use(max_retries=99)},
    ],
)
def test_a_card_that_cannot_be_used_is_refused(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"name": "a", "description": "", "parameters": {"type": "object"}}
    ToolCard(**good).check()
    with pytest.raises(RecordError):
        ToolCard(**{**good, **change}).check()


def test_a_schema_fetches_nothing_and_its_patterns_take_linear_time() -> None:
    with pytest.raises(RecordError):
        Schema({"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/schema"}}}, "a tool")
    with pytest.raises(RecordError):
        Schema({"type": 7}, "a tool")
    slow = Schema({"type": "string", "pattern": "^(a+)+$"}, "a tool")
    assert slow.problem("a" * 5000 + "!")
    assert not slow.problem("a" * 5000)


def test_what_is_wrong_is_said_in_one_line_with_its_place() -> None:
    schema = Schema(add_card().parameters, "add")
    assert not schema.problem({"x": 1, "y": 2})
    assert "x" in schema.problem({"x": "one", "y": 2})
    assert "y" in schema.problem({"x": 1})


def add_card() -> ToolCard:
    return tool(add).card


def test_a_large_value_is_cut_and_says_so() -> None:
    outcome = success("x" * (2 * MAX_VALUE_BYTES))
    assert isinstance(outcome, Success)
    assert outcome.value.endswith(f"[cut: {2 * MAX_VALUE_BYTES} characters in all]")
    for character in ("x", "\0", "\U0001f40b"):
        outcome = success({"a": character * MAX_VALUE_BYTES})
        assert isinstance(outcome, Success)
        assert len(msgspec.json.encode(outcome.value)) < MAX_VALUE_BYTES, "whole texts would fail the assertion's words"
    assert isinstance(success(object()), Failure)


def test_a_failures_message_is_one_bounded_paragraph() -> None:
    assert failure("error", "a\n\n  b\t" + "c" * 9000).message.startswith("a b ccc")
    assert len(failure("error", "c" * 9000).message) == 2000


GOOD, ERROR, TIMEOUT = Success(value=1), failure("error", "no"), failure("timeout", "late")


def test_the_breaker_opens_after_faults_in_a_row_and_tries_one_call_later() -> None:
    health = Health()
    for _ in range(FAULTS_TO_OPEN):
        assert health.wait_s(0.0) == 0
        health.began()
        health.ended(TIMEOUT, 0.0, 0.0)
    assert health.wait_s(1.0) == COOLDOWN_S - 1
    assert health.wait_s(COOLDOWN_S) == 0
    health.began()
    assert health.wait_s(COOLDOWN_S) > 0, "only one call tries"
    health.ended(TIMEOUT, 1.0, COOLDOWN_S)
    assert health.wait_s(COOLDOWN_S) == 2 * COOLDOWN_S
    health.began()
    health.ended(GOOD, 1.0, 3 * COOLDOWN_S)
    assert health.wait_s(3 * COOLDOWN_S) == 0
    assert health.summary()["failures"] == {"timeout": FAULTS_TO_OPEN + 1}


def test_calls_that_fail_together_are_one_fault() -> None:
    health = Health()
    for _ in range(3 * FAULTS_TO_OPEN):
        health.began()
        health.ended(failure("disconnected", "gone"), 2.0, 2.0)
    assert health.wait_s(2.0) == 0 and health.faults_in_row == 1


def test_errors_that_may_be_the_callers_do_not_open_it() -> None:
    health = Health()
    for _ in range(20):
        health.began()
        health.ended(ERROR, 1.0, 0.0)
    assert health.wait_s(0.0) == 0


@given(st.lists(st.tuples(st.sampled_from([GOOD, ERROR, TIMEOUT]), st.floats(0, 20)), max_size=80))
def test_an_open_breaker_lets_at_most_one_call_through(history: list[tuple[Outcome, float]]) -> None:
    """Against a slow reference: faults in a row decide, and time passes only as told."""
    health, now, row, is_open = Health(), 0.0, 0, False
    for outcome, passed in history:
        now += passed
        if health.wait_s(now) > 0:
            assert is_open
            continue
        health.began()
        if is_open:
            assert health.wait_s(now) > 0
        health.ended(outcome, 0.0, now)
        row = row + 1 if isinstance(outcome, Failure) and outcome.kind in FAULTS else 0
        is_open = row >= FAULTS_TO_OPEN or (is_open and row > 0)


async def test_an_error_in_the_tools_own_words() -> None:
    def refuse() -> int:
        """Refuses."""
        raise ToolError("the moon is in the way", retryable=True)

    assert await tool(refuse).call({}, never) == Failure(kind="error", message="the moon is in the way", retryable=True)
