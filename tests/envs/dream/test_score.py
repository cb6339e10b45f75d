"""Predictions are judged by what they change."""

from __future__ import annotations

from hypothesis import given, settings
from test_edit import pages

from shoal.envs.dream.score import Match, atoms, compare, mean
from shoal.envs.web.tree import Node, Page


@given(pages(), pages())
@settings(max_examples=60)
def test_only_the_real_page_is_exact(before: Page, after: Page) -> None:
    assert compare(before, after, after) == Match(1.0, 1.0)
    copied = compare(before, after, before)
    assert copied == (Match(1.0, 1.0) if before == after else Match(0.0, 0.0))


@given(pages(), pages(), pages())
@settings(max_examples=60)
def test_f1_is_a_share_and_takes_sides_alike(before: Page, after: Page, other: Page) -> None:
    one, two = compare(before, after, other), compare(before, other, after)
    assert 0 <= one.edit_f1 <= 1 and one.edit_f1 == two.edit_f1
    assert one.exact <= one.edit_f1


def test_half_of_a_change_is_not_all_of_it() -> None:
    def page(*names: str) -> Page:
        rows = tuple(Node(role="link", id=str(place), name=name) for place, name in enumerate(names))
        return Page(url="u", root=Node(role="RootWebArea", children=rows))

    before, after = page("a", "b"), page("a", "x", "c", "d")
    assert atoms(before, after) == {
        ("set", "1", "name", "x"): 1,
        ("insert", "root", "[2] link 'c'"): 1,
        ("insert", "root", "[3] link 'd'"): 1,
    }
    assert compare(before, after, page("a", "x")) == Match(0.0, 0.5)
    assert compare(before, after, page("a", "x", "c", "e")) == Match(0.0, 2 / 3)
    assert mean([Match(0.0, 0.5), Match(1.0, 1.0)]) == {"exact": 0.5, "edit_f1": 0.75}


def test_a_removed_tree_is_as_many_atoms_as_it_has_nodes() -> None:
    inner = Node(role="button", id="3", name="Go")
    group = Node(role="group", id="2", children=(inner, Node(role="StaticText", name="now")))
    before = Page(url="u", root=Node(role="RootWebArea", children=(group, Node(role="StaticText", name="rest"))))
    after = Page(url="u", root=Node(role="RootWebArea"))
    assert sum(atoms(before, after).values()) == 4
