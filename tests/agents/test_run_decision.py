"""What a model may write, and what becomes of it."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from agent_cases import add, call, tool
from hypothesis import given
from hypothesis import strategies as st

from shoal.agents.scheduler.decision import (
    BRIEF_CALLS,
    MAX_CALLS,
    MAX_SCHEMA_BYTES,
    bind,
    decision_schema,
    filled,
    parse,
    references,
)
from shoal.agents.scheduler.records import Call
from shoal.agents.tools.card import ToolCard
from shoal.agents.tools.outcome import Success

CARDS = {"add": tool(add).card}


def test_the_schema_takes_what_is_possible_and_nothing_else() -> None:
    full, brief = decision_schema(CARDS, "full"), decision_schema(CARDS, "brief")
    call_ = {"id": "a", "tool": "add", "arguments": {"x": 1, "y": 2}}
    reference = {"id": "b", "tool": "add", "arguments": {"x": {"$result": "a"}, "y": 2}, "after": ["a"]}
    assert jsonschema_rs.is_valid(full, {"thought": "", "calls": [call_, reference]})
    assert jsonschema_rs.is_valid(full, {"thought": "", "answer": "3"})
    assert jsonschema_rs.is_valid(brief, {"calls": [{"tool": "add", "arguments": {"x": 1, "y": 2}}]})
    one = {"tool": "add", "arguments": {"x": 1, "y": 2}}
    assert not jsonschema_rs.is_valid(brief, {"calls": [one] * (BRIEF_CALLS + 1)})
    for wrong in (
        {"thought": "", "calls": []},
        {"thought": "", "calls": [{**call_, "tool": "subtract"}]},
        {"thought": "", "calls": [{**call_, "arguments": {"x": "1", "y": 2}}]},
        {"thought": "", "calls": [call_], "answer": "3"},
    ):
        assert not jsonschema_rs.is_valid(full, wrong)
    for schema in (decision_schema(CARDS, "brief", must_answer=True), decision_schema({}, "brief")):
        assert jsonschema_rs.is_valid(schema, {"answer": "3"})
        assert not jsonschema_rs.is_valid(schema, {"calls": [{"tool": "add", "arguments": {"x": 1, "y": 2}}]})


def test_many_tools_leave_their_arguments_open() -> None:
    wide = {"type": "object", "properties": {f"p{n}": {"type": "string", "description": "d" * 80} for n in range(20)}}
    cards = {f"t{n}": ToolCard(name=f"t{n}", description="", parameters=wide) for n in range(100)}
    schema = decision_schema(cards, "full")
    assert len(json.dumps(schema)) < MAX_SCHEMA_BYTES
    assert jsonschema_rs.is_valid(
        schema, {"thought": "", "calls": [{"id": "a", "tool": "t7", "arguments": {"p1": "x"}}]}
    )


@given(st.text(max_size=200))
def test_any_text_is_a_decision_or_a_problem(text: str) -> None:
    for candidate in (text, "{" + text + "}", '{"calls": ' + text + "}", '{"answer": ' + json.dumps(text) + "}"):
        decision, problem = parse(candidate)
        assert (decision is None) == bool(problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no", "not a JSON object"),
        ('{"calls": [{"tool": 7}]}', "form asked for"),
        ('{"calls": [{"tool": "add"}], "answer": "3"}', "not both"),
        (json.dumps({"calls": [{"tool": "add"}] * (MAX_CALLS + 1)}), "calls; 1000 are allowed"),
        ("{" + '{"a":' * 5000 + "}", "form asked for"),
        ("x" * (1 << 21), "characters"),
    ],
)
def test_what_is_wrong_is_said(text: str, problem: str) -> None:
    assert problem in parse(text)[1]


def test_fenced_json_is_read() -> None:
    decision, _ = parse('Of course:\n```json\n{"answer": "3"}\n```')
    assert decision is not None and decision.answer == "3"


names = st.sampled_from(["", "a", "b", "c", "old", "c1", "c2", "not possible", "x" * 70])
drawn = st.builds(
    lambda name, after, uses: Call(
        id=name, tool="add", arguments={"x": [{"$result": one} for one in uses]}, after=tuple(after)
    ),
    names,
    st.lists(names, max_size=3),
    st.lists(names, max_size=2),
)


@given(st.lists(drawn, max_size=8))
def test_bound_calls_have_new_ids_and_can_all_run(calls: list[Call]) -> None:
    known = {"old", "c1"}
    bound, refused = bind(tuple(calls), known, 2)
    ids = [one.id for one in bound]
    assert len(bound) == len(calls) and len(set(ids)) == len(ids) and not known & set(ids)
    done = set(known)
    left = {one.id: one for one in bound if one.id not in refused}
    while ready := [name for name, one in left.items() if set(one.after) <= done | set(refused)]:
        done.update(ready)
        for name in ready:
            del left[name]
    assert not left, "what is not refused must be able to run"
    for one in bound:
        assert set(references(one.arguments)) <= set(one.after)


def test_ids_that_are_taken_are_replaced_where_they_are_referred_to() -> None:
    calls = (call("a", "add", x=1, y=2), call("b", "add", x={"$result": "a"}, y=[{"$result": "z"}]))
    bound, refused = bind(calls, {"a", "z"}, 3)
    assert [one.id for one in bound] == ["c3", "b"]
    assert bound[1].arguments == {"x": {"$result": "c3"}, "y": [{"$result": "z"}]}
    assert bound[1].after == ("c3", "z") and not refused


def test_a_cycle_and_an_unknown_dependency_are_refused_and_the_rest_runs() -> None:
    calls = (
        call("a", "add", "b"),
        call("b", "add", x={"$result": "a"}),
        call("c", "add", "nowhere"),
        call("d", "add", "d"),
        call("e", "add"),
    )
    _, refused = bind(calls, set(), 1)
    assert set(refused) == {"a", "b", "c", "d"}


def test_results_are_filled_in_where_they_are_referred_to() -> None:
    outcomes = {"a": Success(value=[1, {"$result": "b"}])}
    value: Any = {"x": {"$result": "a"}, "y": [{"$result": "a", "and": "more"}, "$result"]}
    # What a result holds is data: a reference that a tool wrote is not followed.
    assert filled(value, outcomes.get) == {
        "x": [1, {"$result": "b"}],
        "y": [{"$result": "a", "and": "more"}, "$result"],
    }
