"""Tool calls and reasoning are written and read as each model family does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serving.dialect import Call, Dialect, Family, Reply
from shoal.serving.reading import Reader
from shoal.serving.schema import ChatMessage, Tool

TOOLS = [Tool.model_validate({"type": "function", "function": {"name": name}}) for name in ("add", "look_up")]
CALL = {"name": "add", "arguments": '{"a": [1, 2]}'}
FAMILIES: tuple[Family, ...] = ("hermes", "llama", "mistral")


@pytest.mark.parametrize(
    ("template", "family", "native"),
    [
        ("{{ messages }}", "hermes", False),
        ("{% if tools %}<tool_call>{% endif %}", "hermes", True),
        ("{% if tools %}<|python_tag|> ipython{% endif %}", "llama", True),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral", True),
    ],
)
def test_the_template_says_the_dialect(template: str, family: str, native: bool) -> None:
    dialect = Dialect.of(template)
    assert (dialect.family, dialect.native_tools) == (family, native)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read(family: Family) -> None:
    dialect = Dialect(family)
    message = ChatMessage.model_validate_json(
        json.dumps({"role": "assistant", "tool_calls": [{"id": "1", "function": CALL}]})
    )
    (rendered,) = dialect.messages([message], [])
    assert dialect.read(rendered["content"], TOOLS).calls == (Call("add", '{"a": [1, 2]}'),)
    assert dialect.read(rendered["content"], []) == Reply(rendered["content"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text",
    ["", "hello", "{", "[1]", "<tool_call>", "<tool_call>{}</tool_call>", '{"name": "unknown", "parameters": {}}',
     '<tool_call>{"name": "add", "arguments": 3}</tool_call>', "[" * 5000,
     '<tool_call>{"name": ["add"], "arguments": {}}</tool_call>', '{"name": {}, "parameters": {}}',
     '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
     '{"name": "add", "parameters": {"a": "\\ud800"}}', '[{"name": "add", "arguments": {"\\udfff": 1}}]'],
)  # fmt: skip
def test_what_is_no_call_stays_content(family: Family, text: str) -> None:
    assert Dialect(family).read(text, TOOLS) == Reply(text)


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', '{"a": Infinity}', "{"])
def test_arguments_that_are_no_text_or_no_json_stay_as_they_were_sent(arguments: str) -> None:
    call = {"id": "1", "function": {"name": "add", "arguments": arguments}}
    message = ChatMessage.model_validate_json(json.dumps({"role": "assistant", "tool_calls": [call]}))
    (native,), (written,) = Dialect(native_tools=True).messages([message], []), Dialect().messages([message], [])
    assert native["tool_calls"][0]["function"]["arguments"] == arguments
    assert json.dumps(arguments) in written["content"] and written["content"].encode()


def test_several_calls_and_the_text_around_them() -> None:
    first = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    second = '<tool_call>{"name": "look_up", "arguments": {"q": "é"}}</tool_call>'
    text = f"First.\n{first}\n{second}"
    reply = Dialect().read(text, TOOLS)
    assert reply.content == "First."
    assert [call.name for call in reply.calls] == ["add", "look_up"]
    assert json.loads(reply.calls[1].arguments) == {"q": "é"}


def test_reasoning_stands_apart() -> None:
    dialect = Dialect(thinks=True)
    assert dialect.read("<think>\nhm\n</think>\n\n42", []) == Reply("42", "hm")
    assert dialect.read("42", []) == Reply("42")


def test_tools_are_described_where_the_template_does_not() -> None:
    messages = [ChatMessage(role="system", content="Be kind."), ChatMessage(role="user", content="x")]
    described = Dialect().messages(messages, TOOLS)
    assert [m["role"] for m in described] == ["system", "user"]
    assert described[0]["content"].startswith("Be kind.") and "look_up" in described[0]["content"]
    assert Dialect(native_tools=True).messages(messages, TOOLS)[0]["content"] == "Be kind."


PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "\n", "a", " b", "<", "<tool", "_call>", "</tool_call>", "{", "[", "}",
                     '<tool_call>{"name": "add", "arguments": {}}</tool_call>']),
    max_size=12,
)  # fmt: skip


@given(PIECES, st.sampled_from(FAMILIES), st.booleans(), st.booleans())
def test_a_stream_shows_what_the_whole_is(pieces: list[str], family: Family, thinks: bool, with_tools: bool) -> None:
    tools: list[Any] = TOOLS if with_tools else []
    dialect = Dialect(family, thinks=thinks)
    reader = Reader(dialect, tools, thinking=False)
    reasoning = content = ""
    for piece in pieces:
        more, shown = reader.push(piece)
        reasoning += more
        content += shown
    rest, calls = reader.rest()
    whole = dialect.read("".join(pieces), tools)
    assert calls == whole.calls
    assert whole.reasoning.startswith(reasoning.strip())
    if not calls:
        assert content + rest == whole.content
