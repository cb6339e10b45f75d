"""Edits between pages: exact, as text and back, and never more than the pages have."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from shoal.envs.dream.edit import KEEP, EditError, Insert, Load, Navigate, Remove, Script, Set, apply, diff, load
from shoal.envs.dream.script import MUCH_LONGER, SAME, brief, read_script, script_grammar, write_script
from shoal.envs.web.tree import Node, Page, estimate_tokens
from shoal.errors import RecordError

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=8)
STATES = st.lists(st.sampled_from(["checked", "disabled", "expanded", "focused"]), max_size=2, unique=True).map(
    lambda found: tuple(sorted(found))
)
URLS = st.sampled_from(["http://a.test/", "http://a.test/b", "http://a.test/it's?q=\\"])


PRINTED = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=("Cc", "Cf", "Zl")), max_size=8
)


@st.composite
def pages(draw: st.DrawFn, words: st.SearchStrategy[str] = WORDS) -> Page:
    """Small trees over few ids, so that two of them share some, in other places and with other words."""
    free = draw(st.permutations([str(number) for number in range(12)]))
    free = free[: draw(st.integers(0, 12))]

    def node(depth: int) -> Node:
        id_ = free.pop() if free and draw(st.integers(0, 3)) else ""
        children = tuple(node(depth + 1) for _ in range(draw(st.integers(0, 3)))) if depth < 4 else ()
        role = draw(st.sampled_from(["link", "button", "group"])) if id_ or children else "StaticText"
        return Node(id=id_, role=role, name=draw(words), value=draw(words), states=draw(STATES), children=children)

    children = tuple(node(1) for _ in range(draw(st.integers(0, 4))))
    return Page(url=draw(URLS), root=Node(role="RootWebArea", name=draw(words), children=children))


def words(script: Script) -> int:
    return estimate_tokens(write_script(script))


def size(page: Page) -> int:
    return sum(1 for _ in page.root.walk())


@given(pages(), pages())
@settings(max_examples=80)
def test_a_difference_applied_is_the_other_page(before: Page, after: Page) -> None:
    script = diff(before, after)
    assert apply(script, before) == after
    assert len(script) <= size(before) + 4 * size(after) + 1


@given(pages(), pages())
@settings(max_examples=80)
def test_another_document_keeps_what_stayed_and_is_the_other_page(before: Page, after: Page) -> None:
    whole = load(before, after)
    assert whole is not None
    assert apply((whole,), before) == after
    old = {node.id: node for node in before.root.walk() if node.id}
    for node in after.root.walk():
        if node.id and node.children and old.get(node.id) == node and node in after.root.children:
            assert Node(role=KEEP, id=node.id) in whole.nodes
    script = brief(before, after)
    assert apply(read_script(write_script(script)), before) == after
    edits = diff(before, after)
    another = (before.url, before.title) != (after.url, after.title)
    assert script == edits or words(script) < words(edits) * (MUCH_LONGER if another else 1)
    assert script == (whole,) or words(edits) * (MUCH_LONGER if another else 1) <= words((whole,))


def test_a_document_that_cannot_be_is_refused_or_mended() -> None:
    link = Node(id="1", role="link", name="a")
    page = Page(url="u", root=Node(role="RootWebArea", name="old", children=(link,)))
    for nodes, mended in (
        ((Node(role=KEEP, id="9"),), ()),
        ((Node(role=KEEP, id="1"), Node(role="button", id="1")), (link,)),
    ):
        with pytest.raises(EditError):
            apply((Load("v", "new", nodes),), page)
        made = apply((Load("v", "new", nodes),), page, strict=False)
        assert made == Page(url="v", root=Node(role="RootWebArea", name="new", children=mended))


@given(pages())
@settings(max_examples=20)
def test_a_page_does_not_differ_from_itself(page: Page) -> None:
    assert diff(page, page) == ()
    assert write_script(()) == SAME


@given(pages(), pages())
@settings(max_examples=40)
def test_scripts_read_as_they_were_written(before: Page, after: Page) -> None:
    script = diff(before, after)
    assert read_script(write_script(script)) == script


@given(pages(), pages(), pages())
@settings(max_examples=40)
def test_a_script_for_another_page_does_what_it_can_or_says_why_not(before: Page, after: Page, other: Page) -> None:
    script = diff(before, after)
    mended = apply(script, other, strict=False)
    mended.check()
    with contextlib.suppress(EditError):
        assert apply(script, other) == mended


def test_a_small_change_is_a_small_script() -> None:
    rows = tuple(Node(id=str(n), role="link", name=f"row {n}") for n in range(30))
    text = Node(role="StaticText", name="Total: 5")
    before = Page(url="u", root=Node(role="RootWebArea", children=(*rows, text)))
    after = Page(
        url="u",
        root=Node(role="RootWebArea", children=(*rows[:4], *rows[5:], Node(role="StaticText", name="Total: 4"))),
    )
    assert diff(before, after) == (Remove("4"), Set("root.29", "name", "Total: 4"))


def test_a_move_is_a_removal_and_an_insertion() -> None:
    button = Node(id="3", role="button", name="Go")
    left, right = Node(id="1", role="group"), Node(id="2", role="group")
    before = Page(
        url="u", root=Node(role="RootWebArea", children=(Node(id="1", role="group", children=(button,)), right))
    )
    after = Page(
        url="u", root=Node(role="RootWebArea", children=(left, Node(id="2", role="group", children=(button,))))
    )
    assert diff(before, after) == (Remove("3"), Insert("2", 0, button))


@pytest.mark.parametrize(
    "text",
    ["", "remove 12", "remove [12] ", "set [1] colour 'red'", "insert [1] 0", "insert [1] 0\n\tlink 'a'\n\tlink 'b'"],
)
def test_what_is_no_script_is_refused(text: str) -> None:
    with pytest.raises(RecordError):
        read_script(text)


@pytest.mark.parametrize(
    "edit", [Remove("9"), Remove("root"), Set("root.4", "name", "x"), Insert("1", 5, Node(role="link"))]
)
def test_an_edit_that_does_not_fit_is_refused_or_left_out(edit: Remove | Set | Insert) -> None:
    page = Page(url="u", root=Node(role="RootWebArea", children=(Node(id="1", role="link"),)))
    with pytest.raises(EditError):
        apply((edit,), page)
    assert apply((edit, Navigate("v")), page, strict=False) == Page(url="v", root=page.root)


@given(pages(PRINTED), pages(PRINTED))
@settings(max_examples=20)
def test_the_grammar_takes_every_real_script(before: Page, after: Page) -> None:
    """The words of real pages have no control characters."""
    tokenizer = LLTokenizer("byte")
    reasoned = f"It leads there.\n{write_script(brief(before, after))}"
    for text, chars in ((write_script(diff(before, after)), 0), (reasoned, 40)):
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(script_grammar(before, reason_chars=chars).text))
        tokens = tokenizer.tokenize_str(text)
        assert matcher.try_consume_tokens(tokens) == len(tokens), f"{matcher.get_error()}: {text}"
        assert matcher.is_accepting()


def test_the_grammar_names_no_element_that_is_not_there() -> None:
    page = Page(url="http://a.test/b", root=Node(role="RootWebArea", children=(Node(id="12", role="link"),)))
    tokenizer = LLTokenizer("byte")
    for text, taken in (
        ("remove [12]", True),
        ("remove [13]", False),
        ("set [12.0] name 'a'", True),
        ("go", False),
        ("load 'http://a.test/c' 'C'\n\t[12] keep ''\n\t[14] link 'x', focused", True),
        ("load 'http://b.test/c' 'C'", False),
        ("load 'http://a.test/c' 'C'\n\t[13] keep ''", False),
        ("load 'http://a.test/c' 'C'\n\t[14] banana 'x'", False),
        ("set [12] states 'checked focused'", True),
        ("set [12] states 'happy'", False),
    ):
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(script_grammar(page).text))
        tokens = tokenizer.tokenize_str(text)
        assert (matcher.try_consume_tokens(tokens) == len(tokens)) is taken, text
