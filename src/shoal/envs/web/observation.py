"""From what Chromium says about a page to the tree that an agent sees. Pure; `tab` asks Chromium.

1. BrowserGym marks elements by writing attributes into the page. Here the numbers are given outside of it, in the same
   order: all standard elements of the document, from 0, each when it is first seen. The page stays as it is.
2. BrowserGym keeps every node of the tree. Here containers that say nothing are left out, what is below them takes
   their place, and neighbouring texts are joined: the tokens of an observation are few.

Frames inside a page are not looked into: they show as `Iframe` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.envs.web.listed import listed
from shoal.envs.web.tree import MAX_DEPTH, MAX_NODES, MAX_URL_CHARS, ROLE, ROOT_ROLE, Node, Page

MAX_VALUE_CHARS = 2000
MAX_NAME_CHARS = 300
"""Longer names and texts are cut, and end with `…`."""

STANDARD_TAGS = frozenset(
    listed(
        """a abbr acronym address applet area article aside audio b base basefont bdi bdo big blockquote body br
    button canvas caption center cite code col colgroup data datalist dd del details dfn dialog dir div dl
    dt em embed fieldset figcaption figure font footer form frame frameset h1 h2 h3 h4 h5 h6 head header
    hgroup hr html i iframe img input ins kbd label legend li link main map mark menu meta meter nav
    noframes noscript object ol optgroup option output p param picture pre progress q rp rt ruby s samp
    script search section select small source span strike strong style sub summary sup svg table tbody td
    template textarea tfoot th thead time title tr track tt u ul var video wbr"""
    )
)
FRAME_TAGS = ("iframe", "frame")
ELEMENT_NODE = 1

TEXT_ROLE = "StaticText"
SILENT = frozenset({"InlineTextBox", "LineBreak", "ListMarker"})
"""Roles that are left out with what is below them."""
FIELD_ROLES = frozenset({"textbox", "searchbox", "spinbutton", "Date", "InputTime"})
"""Their value is all that is in them."""
HOLLOW = frozenset(
    listed(
        """none generic presentation GenericContainer paragraph Section MenuListPopup rowgroup LayoutTable
    LayoutTableRow LayoutTableCell strong emphasis superscript subscript mark time code DescriptionList term
    definition Legend Pre listitem list form"""
    )
)
"""Roles that say nothing: a node is left out unless it has a name of its own or can be clicked."""
NAMED_BY_CONTENT = frozenset(
    listed(
        """link button heading option tab menuitem cell gridcell columnheader rowheader row treeitem checkbox radio"""
    )
)

CELL_ROLES = frozenset({"cell", "gridcell"})
"""Left out where all that is in them is one element that says the same."""
ANNOUNCING = frozenset({"status", "log", "alert"})
"""Left out while they announce nothing."""

_FLAGS = ("disabled", "focused", "readonly", "required", "selected", "multiselectable", "multiline", "modal")
_TRISTATES = {"checked": "checked", "pressed": "pressed"}


@dataclass
class Numbering:
    """The numbers that one document's elements have got so far."""

    ids: dict[int, str] = field(default_factory=dict)
    """Backend node id -> id."""
    num_elements: int = 0
    num_frames: int = 0

    def see(self, elements: Iterable[tuple[int, str]]) -> None:
        """Number what is new among these elements, given as backend node id and tag in document order."""
        for backend, tag in elements:
            if backend in self.ids or tag not in STANDARD_TAGS:
                continue
            if tag in FRAME_TAGS:
                self.ids[backend] = _letters(self.num_frames)
                self.num_frames += 1
            else:
                self.ids[backend] = str(self.num_elements)
                self.num_elements += 1


def _letters(number: int) -> str:
    """a, b, …, z, aA, aB, …, as BrowserGym names frames."""
    letters = [number % 26]
    while number := number // 26:
        number -= 1
        letters.insert(0, number % 26)
    return "".join(chr((65 if place else 97) + letter) for place, letter in enumerate(letters))


@dataclass(frozen=True)
class Snapshot:
    """What `DOMSnapshot.captureSnapshot` says of the main document; nodes by their backend ids."""

    document: int
    elements: tuple[tuple[int, str], ...]
    """Node and tag, in document order."""
    clickable: frozenset[int]
    """Nodes that listen to clicks."""
    hidden: frozenset[int]
    """Elements whose `id` attribute is one of those asked for."""


def read_snapshot(snapshot: Mapping[str, Any], hidden_ids: frozenset[str] = frozenset()) -> Snapshot:
    """The parts of a snapshot that count; `hidden_ids` are values of the attribute `id`."""
    strings: Sequence[str] = snapshot["strings"]
    nodes = snapshot["documents"][0]["nodes"]
    backends: Sequence[int] = nodes["backendNodeId"]
    elements, hidden = [], set()
    for backend, name, kind, attributes in zip(
        backends, nodes["nodeName"], nodes["nodeType"], nodes["attributes"], strict=True
    ):
        if kind != ELEMENT_NODE:
            continue
        elements.append((backend, strings[name].lower()))
        pairs = zip(attributes[0::2], attributes[1::2], strict=True) if hidden_ids else ()
        if any(strings[key] == "id" and strings[value] in hidden_ids for key, value in pairs):
            hidden.add(backend)
    # Pages that listen to every click do so on their outermost elements.
    outer = {backend for backend, tag in elements if tag in ("html", "body")}
    clickable = frozenset(backends[index] for index in nodes.get("isClickable", {}).get("index", ())) - outer
    return Snapshot(backends[0], tuple(elements), clickable, frozenset(hidden))


def build_page(url: str, ax_nodes: Sequence[Mapping[str, Any]], numbering: Numbering, snapshot: Snapshot) -> Page:
    """The tree of a page, without what the snapshot hides.

    Args:
        ax_nodes: from `Accessibility.getFullAXTree`.
        numbering: has seen the snapshot's elements.
    """
    by_id = {str(node["nodeId"]): node for node in ax_nodes[:MAX_NODES]}
    if not ax_nodes:
        return Page(url=url[:MAX_URL_CHARS], root=Node(role=ROOT_ROLE))

    def build(node: Mapping[str, Any], depth: int, listens: bool = False) -> list[Node]:
        role = _text(node.get("role"))
        backend = node.get("backendDOMNodeId", 0)
        if role in SILENT or backend in snapshot.hidden or depth > MAX_DEPTH * 2:
            return []
        name = _clean(_text(node.get("name")))
        if role == TEXT_ROLE:
            return [Node(role=TEXT_ROLE, name=name)] if name else []
        # A list that listens does so for its items.
        clicks = backend in snapshot.clickable or (listens and role == "listitem")
        listens = role == "list" and clicks
        children = _joined([one for child in node.get("childIds", ()) for one in _child(str(child), depth, listens)])
        if role == "LabelText":
            # The field says the label's words as its name.
            fields = {one.name for one in children if one.role != TEXT_ROLE}
            return [one for one in children if one.role != TEXT_ROLE or one.name not in fields]
        id_ = numbering.ids.get(backend, "")
        if node.get("ignored") or not id_ or (role in HOLLOW and not name and not clicks):
            return children
        if role in ANNOUNCING and not name and not children:
            return []
        alike = [one.name for one in children] == [name]
        if alike and not clicks and (role in HOLLOW or (role in CELL_ROLES and children[0].id)):
            return children
        if not re.fullmatch(ROLE, role):
            role = "generic"
        if name and all(one.role == TEXT_ROLE for one in children):
            said = " ".join(one.name for one in children)
            if role in NAMED_BY_CONTENT or said == name:
                children = []
        if role in HOLLOW and not name and children and all(one.role == TEXT_ROLE for one in children):
            name, children = _clean(" ".join(one.name for one in children)), []
        states = _states(node)
        if role in HOLLOW and clicks:
            states.append("clickable")
        value = _text(node.get("value"))[:MAX_VALUE_CHARS]
        if role in FIELD_ROLES:
            children = []
        return [Node(id=id_, role=role, name=name, value=value, states=tuple(sorted(states)), children=tuple(children))]

    def _child(id_: str, depth: int, listens: bool = False) -> list[Node]:
        node = by_id.get(id_)
        return [] if node is None else build(node, depth + 1, listens)

    top = ax_nodes[0]
    children = _joined([one for child in top.get("childIds", ()) for one in _child(str(child), 0)])
    return Page(
        url=url[:MAX_URL_CHARS],
        root=Node(role=ROOT_ROLE, name=_clean(_text(top.get("name"))), children=tuple(children)),
    )


def _text(value: Any) -> str:
    found = value.get("value") if isinstance(value, Mapping) else None
    return "" if found is None else str(found)


def _clean(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_NAME_CHARS else text[: MAX_NAME_CHARS - 1] + "…"


def _joined(nodes: list[Node]) -> list[Node]:
    """Neighbouring texts become one."""
    found: list[Node] = []
    for node in nodes:
        if node.role == TEXT_ROLE and found and found[-1].role == TEXT_ROLE:
            found[-1] = Node(role=TEXT_ROLE, name=_clean(f"{found[-1].name} {node.name}"))
        else:
            found.append(node)
    return found


def _states(node: Mapping[str, Any]) -> list[str]:
    values = {str(one.get("name")): _text(one.get("value")) for one in node.get("properties", ())}
    states = [flag for flag in _FLAGS if values.get(flag) == "True"]
    for name, shown in _TRISTATES.items():
        if values.get(name) in ("true", "mixed"):
            states.append(shown if values[name] == "true" else "mixed")
    if "expanded" in values:
        states.append("expanded" if values["expanded"] == "True" else "collapsed")
    if values.get("invalid", "false") not in ("false", ""):
        states.append("invalid")
    return states
