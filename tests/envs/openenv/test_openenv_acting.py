"""Replies as actions, observations as text: whatever is read is JSON that a server can take."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from shoal.envs.openenv.acting import Acting, ActionError
from shoal.envs.openenv.session import Tool

BYTES = LLTokenizer("byte")

SCHEMA = {
    "type": "object",
    "properties": {"metadata": {"type": "object"}, "row": {"type": "integer"}, "column": {"type": "integer"}},
    "required": ["row", "column"],
    "additionalProperties": False,
}
MOVE = Tool("move", "Go  somewhere.", {"type": "object", "properties": {"x": {"type": "integer"}}})
WAIT = Tool("wait", None, {"type": "object", "properties": {"for": {"$ref": "#/$defs/T"}}, "$defs": {"T": {}}})

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.text())
def test_text_is_one_field(reply: str) -> None:
    assert json.loads(Acting("text", key="message").read(reply)) == {"message": reply}


@given(st.dictionaries(st.text(), json_values, max_size=4), st.text(st.characters(exclude_characters="{")), st.text())
def test_json_is_found_whatever_stands_around_it(action: dict[str, Any], before: str, after: str) -> None:
    assert json.loads(Acting("json").read(before + json.dumps(action) + after)) == action


@given(st.text() | st.text(st.sampled_from('{}[]":,0e1N ')))
def test_any_reply_is_an_object_or_refused(reply: str) -> None:
    for acting in (Acting("json"), Acting("tool", tools=(MOVE, WAIT))):
        try:
            found = json.loads(acting.read(reply))
        except ActionError:
            continue
        assert isinstance(found, dict)


@pytest.mark.parametrize("reply", ["", "7", "[1]", "{", '{"a": NaN}', '{"a": 1e999}', '{"a":' * 20_000])
def test_what_is_no_object_is_said_to_be_none(reply: str) -> None:
    with pytest.raises(ActionError, match="no JSON object"):
        Acting("json").read(reply)


def test_a_call_names_a_tool_that_there_is() -> None:
    acting = Acting("tool", tools=(MOVE, WAIT))
    read = acting.read('{"tool": "move", "arguments": {"x": 1}}')
    assert json.loads(read) == {"type": "call_tool", "tool_name": "move", "arguments": {"x": 1}}
    for reply in ('{"tool": "fly"}', '{"tool": "move", "arguments": 1}', '{"tool": ["move"]}'):
        with pytest.raises(ActionError, match="the tools are move, wait"):
            acting.read(reply)


def test_the_grammar_is_the_servers_schema_in_its_order() -> None:
    assert Acting("text", key="message").grammar is None
    grammar = Acting("json", schema=SCHEMA).grammar
    assert grammar is not None
    assert list(json.loads(grammar.text)["properties"]) == ["row", "column"]
    calls = Acting("tool", tools=(MOVE, WAIT)).grammar
    assert calls is not None
    move, wait = json.loads(calls.text)["anyOf"]
    assert list(move["properties"]) == ["tool", "arguments"]
    assert move["properties"]["arguments"] == MOVE.inputSchema
    assert wait["properties"]["arguments"] == {"type": "object"}  # its references would point elsewhere here
    assert Acting("json", schema={"description": "x" * 70_000}).grammar is None


def test_an_agent_is_told_what_a_reply_is() -> None:
    assert '"row"' in Acting("json", schema=SCHEMA).told and "metadata" not in Acting("json", schema=SCHEMA).told
    assert "- move: Go somewhere. Arguments: {" in Acting("tool", tools=(MOVE,)).told
    assert Acting("text", key="message").told == ""


def test_observations_are_shown_without_what_changes_from_time_to_time() -> None:
    acting, seen = Acting("json"), {"text": "Higher.", "left": 2, "metadata": {"time": 1.5}}
    assert json.loads(acting.shown(seen, (), 100)) == {"text": "Higher.", "left": 2}
    assert acting.shown(seen, ("text",), 100) == "Higher."
    assert acting.shown(seen, ("left",), 100) == "2"
    assert json.loads(acting.shown(seen, ("text", "left", "none"), 100)) == {"text": "Higher.", "left": 2}
    assert acting.shown(seen, ("metadata",), 100) == '{"time": 1.5}'
    assert acting.shown(seen, ("text",), 4) == "Hig…"
    assert acting.shown({"metadata": {}}, (), 100) == ""


def test_a_tools_answer_is_its_text() -> None:
    acting = Acting("tool", tools=(MOVE,))
    content = [{"type": "text", "text": "moved"}, {"type": "image", "data": "…"}]
    answer: dict[str, Any] = {"tool_name": "move", "result": {"content": content, "is_error": False}}
    assert acting.shown(answer, (), 100) == "moved"
    answer["result"]["is_error"] = True
    assert acting.shown(answer, (), 100) == "error:\nmoved"
    assert acting.shown({"tool_name": "move", "result": None, "error": {"message": "no"}}, (), 100) == "error: no"
    assert acting.shown({"tool_name": "move", "result": 4}, (), 100) == "4"


GUESS = {
    "additionalProperties": False,
    "properties": {
        "metadata": {"additionalProperties": True, "title": "Metadata", "type": "object"},
        "digit": {"title": "Digit", "type": "integer"},
        "why": {"anyOf": [{"maxLength": 20, "type": "string"}, {"type": "null"}], "default": None, "title": "Why"},
        "kind": {"$ref": "#/$defs/Kind"},
    },
    "$defs": {"Kind": {"enum": ["first", "last"], "title": "Kind", "type": "string"}},
    "required": ["digit", "kind"],
    "title": "Guess",
    "type": "object",
}
"""As pydantic writes an action's schema."""


def too_large(reply: str) -> bool:
    """Whether a number in it is beyond the largest float, such as 1e999."""
    numbers: list[float] = []
    json.loads(reply, parse_float=lambda text: numbers.append(float(text)))
    return math.inf in map(abs, numbers)


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_whatever_the_grammar_lets_through_is_read(seed: int) -> None:
    for acting in (Acting("json", schema=GUESS), Acting("tool", tools=(MOVE, WAIT))):
        assert acting.grammar is not None
        text = LLMatcher.grammar_from_json_schema(acting.grammar.text, overrides={"whitespace_flexible": False})
        matcher = LLMatcher(BYTES, text, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        rng, reply = np.random.default_rng(seed), bytearray()
        while not matcher.is_stopped() and len(reply) < 400:
            mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            allowed = [int(token) for token in mask.nonzero()[0] if token < 128]
            # Closing what is open comes first, now and then: texts and numbers end.
            closing = [token for token in allowed if chr(token) in '"}]']
            token = int(rng.choice(closing if closing and rng.random() < 0.5 else allowed or [256]))
            matcher.consume_token(token)
            reply += bytes([token]) if token < 128 else b""
        if matcher.is_stopped() and not too_large(reply.decode()):
            found = json.loads(acting.read(reply.decode()))
            assert "digit" in found if acting.form == "json" else found["tool_name"] in ("move", "wait")
            event("whole")
