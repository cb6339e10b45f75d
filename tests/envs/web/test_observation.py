"""Numbers of elements are BrowserGym's, and containers that say nothing are left out."""

from __future__ import annotations

from typing import Any

from shoal.envs.web.observation import Numbering, Snapshot, build_page
from shoal.envs.web.tree import Node


def ax(id_: int, role: str, name: str = "", children: tuple[int, ...] = (), **more: Any) -> dict[str, Any]:
    return {
        "nodeId": str(id_),
        "role": {"value": role},
        "name": {"value": name},
        "childIds": [str(one) for one in children],
        "backendDOMNodeId": id_,
        **more,
    }


def test_elements_are_numbered_in_document_order_and_keep_their_numbers() -> None:
    numbering = Numbering()
    numbering.see([(10, "html"), (11, "head"), (12, "body"), (13, "path"), (14, "iframe"), (15, "a")])
    assert numbering.ids == {10: "0", 11: "1", 12: "2", 14: "a", 15: "3"}
    numbering.see([(10, "html"), (20, "div"), (15, "a"), (21, "iframe")])
    assert (numbering.ids[20], numbering.ids[15], numbering.ids[21]) == ("4", "3", "b")


def test_frames_count_as_letters() -> None:
    numbering = Numbering()
    numbering.see([(number, "iframe") for number in range(28)])
    assert [numbering.ids[n] for n in (0, 25, 26, 27)] == ["a", "z", "aA", "aB"]


def test_a_cell_that_is_one_link_and_a_form_without_a_name_say_nothing_of_their_own() -> None:
    nodes = [
        ax(1, "RootWebArea", "Rows", (2,)),
        ax(2, "form", "", (3, 9)),
        ax(3, "row", "", (4, 6, 8)),
        ax(4, "cell", "Ada Dunn", (5,)),
        ax(5, "link", "Ada Dunn", (10,)),
        ax(10, "StaticText", "Ada Dunn"),
        ax(6, "cell", "Editor", (7,)),
        ax(7, "StaticText", "Editor"),
        ax(8, "cell", "see Ben", (11, 12)),
        ax(11, "StaticText", "see"),
        ax(12, "link", "Ben", ()),
        ax(9, "form", "Search", ()),
    ]
    numbering = Numbering()
    tags = {2: "form", 3: "tr", 4: "td", 5: "a", 6: "td", 8: "td", 12: "a", 9: "form"}
    numbering.see(tags.items())
    page = build_page("http://a.test/", nodes, numbering, Snapshot(1, (), frozenset(), frozenset()))
    row, search = page.root.children
    assert [(one.role, one.name) for one in row.children] == [
        ("link", "Ada Dunn"),
        ("cell", "Editor"),
        ("cell", "see Ben"),
    ]
    assert [one.role for one in row.children[2].children] == ["StaticText", "link"]
    assert (search.role, search.name) == ("form", "Search")


def test_a_page_keeps_what_says_something() -> None:
    nodes = [
        ax(1, "RootWebArea", "Shop", (2,)),
        ax(2, "generic", "", (3, 6, 8)),
        ax(3, "paragraph", "", (4, 5)),
        ax(4, "StaticText", "Total:"),
        ax(5, "StaticText", " 30  pounds"),
        ax(6, "link", "Home", (7,)),
        ax(7, "StaticText", "Home"),
        ax(8, "generic", "", (9,)),
        ax(9, "checkbox", "Agree", (), properties=[{"name": "checked", "value": {"value": "true"}}]),
    ]
    numbering = Numbering()
    numbering.see([(2, "div"), (3, "p"), (6, "a"), (8, "div"), (9, "input")])
    page = build_page("http://a.test/", nodes, numbering, Snapshot(1, (), frozenset({8}), frozenset()))
    box = Node(id="4", role="checkbox", name="Agree", states=("checked",))
    assert page.root == Node(
        role="RootWebArea",
        name="Shop",
        children=(
            Node(role="StaticText", name="Total: 30 pounds"),
            Node(id="2", role="link", name="Home"),
            Node(id="3", role="generic", states=("clickable",), children=(box,)),
        ),
    )
    hidden = build_page("http://a.test/", nodes, numbering, Snapshot(1, (), frozenset(), frozenset({6})))
    assert [node.role for node in hidden.root.walk()] == ["RootWebArea", "StaticText", "checkbox"]
