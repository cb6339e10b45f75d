"""Trees as text and back, and what an observation shows of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.envs.web.tree import Node, Page, estimate_tokens, read_page, window
from shoal.errors import RecordError

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


@st.composite
def pages(draw: st.DrawFn) -> Page:
    ids = iter(range(1000))

    def node(depth: int) -> Node:
        children = tuple(node(depth + 1) for _ in range(draw(st.integers(0, 3)))) if depth < 4 else ()
        id_ = str(next(ids)) if children or draw(st.booleans()) else ""
        states = draw(st.sampled_from([(), ("checked",), ("checked", "focused")]))
        role = draw(st.sampled_from(["link", "StaticText", "Date"]))
        return Node(id=id_, role=role, name=draw(WORDS), value=draw(WORDS), states=states, children=children)

    children = tuple(node(1) for _ in range(draw(st.integers(0, 5))))
    return Page(url="http://a.test/?q=1", root=Node(role="RootWebArea", name=draw(WORDS), children=children))


@given(pages())
@settings(max_examples=25)
def test_a_page_reads_as_it_was_written(page: Page) -> None:
    assert read_page(page.text()) == page


@given(pages(), st.integers(64, 400))
@settings(max_examples=25)
def test_windows_show_every_line_once_within_their_budget(page: Page, budget: int) -> None:
    total = sum(1 for _ in page.root.walk()) - 1
    seen, start = [], 0
    while True:
        shown = window(page, budget, start)
        assert shown.total == total and shown.start == min(start, total)
        assert ("lines below" in shown.text) == (shown.end < total) and ("lines above" in shown.text) == (start > 0)
        assert shown.end - shown.start <= 1 or estimate_tokens(shown.text) <= budget
        seen += shown.ids
        if shown.end == total:
            break
        assert shown.end > start
        start = shown.end
    assert seen == [node.id for node in page.root.walk() if node.id]


@pytest.mark.parametrize(
    "text",
    [
        "RootWebArea ''",
        "URL: u\nRootWebArea ''\n\t\tlink 'too deep'",
        "URL: u\nRootWebArea ''\n\t[1] link 'a'\n\t[1] link 'b'",
        "URL: u\nRootWebArea ''\nRootWebArea ''",
        "URL: u\nRootWebArea 'it's'",
    ],
)
def test_what_is_no_page_is_refused(text: str) -> None:
    with pytest.raises(RecordError):
        read_page(text)
