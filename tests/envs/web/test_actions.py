"""Actions as text and back; what a grammar lets through."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from shoal.envs.web.actions import (
    Action,
    ActionError,
    Click,
    GoBack,
    Scroll,
    Select,
    Stop,
    Type,
    action_grammar,
    read_action,
    target,
    write_action,
)
from shoal.envs.web.tree import Node, Page

LIST = Node(id="9", role="combobox", children=(Node(id="10", role="option", name="Blue (dark)"),))
PAGE = Page(
    url="http://a.test/",
    root=Node(role="RootWebArea", children=(Node(id="3", role="link"), Node(id="7", role="textbox"), LIST)),
)
TEXTS = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x17F, exclude_characters="[]`\x7f\x85\xa0"), max_size=30
).map(str.strip)
ACTIONS = st.one_of(
    st.builds(Click, st.just("3")),
    st.builds(Type, st.just("7"), TEXTS, st.booleans()),
    st.builds(Select, st.just("9"), TEXTS),
    st.builds(Scroll, st.sampled_from(["up", "down"])),
    st.builds(GoBack),
    st.builds(Stop, TEXTS),
)


def takes(text: str, ids: tuple[str, ...] | None) -> bool:
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_regex(action_grammar(PAGE, ids).text))
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@given(ACTIONS)
@settings(max_examples=25)
def test_actions_read_as_they_were_written(action: Action) -> None:
    assert read_action(write_action(action)) == action
    assert read_action(f"I think that is next.\n`{write_action(action)}`\n") == action


@given(ACTIONS)
@settings(max_examples=25)
def test_the_grammar_takes_every_action_on_what_is_shown(action: Action) -> None:
    if isinstance(action, Select):
        action = Select("9", "Blue (dark)")
    assert takes(write_action(action), ("3", "7", "9"))
    assert takes(write_action(action), None)


@pytest.mark.parametrize(
    "text",
    ["click [4]", "click [3] ", "type [3] [a] [1]", "select [9] [Green]", "select [7] [a]", "hello", "type [7] [a]"],
)
def test_the_grammar_takes_nothing_else(text: str) -> None:
    assert not takes(text, ("3", "7", "9"))


@pytest.mark.parametrize("reply", ["", "click", "click 3", "click [a b]", "press [3]", "scroll [left]", "type [7]"])
def test_what_is_no_action_is_refused(reply: str) -> None:
    with pytest.raises(ActionError, match="There is no action"):
        read_action(reply)


def test_enter_is_pressed_unless_it_is_said_otherwise() -> None:
    assert read_action("type [7] [a]") == Type("7", "a", enter=True)
    assert read_action("type [7] [a] [0]") == Type("7", "a", enter=False)


def test_an_element_that_is_not_there_is_refused() -> None:
    with pytest.raises(ActionError, match=r"\[4\]"):
        target(Click("4"), PAGE)
