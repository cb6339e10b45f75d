"""What changed between two pages, as edits; and a page with the edits applied. Pure.

An edit names an element by its id, the root by `root`, and a text, which has no id, by its parent and place: `12.3` is
the child number 3 (from 0) of element 12, at the moment when the edit is applied.

`load` says the same change as another document that takes the page's place, in which elements of the old page that have
others below them stand for themselves (a menu in one line); what is a line by itself is written out, so that a document
reads alike wherever it was come from.

Invariants: `apply(diff(a, b), a) == b` for any two pages, and `apply((load(a, b),), a) == b` where there is a `load`;
what `diff` gives has at most as many edits as the pages have nodes and fields, and never mentions what stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Literal, get_args

from msgspec.structs import replace

from shoal.envs.web.tree import ROOT_ROLE, Node, Page
from shoal.errors import RecordError

ROOT = "root"
MAX_EDITS = 50_000
KEEP = "keep"
"""The role of a node in `Load` that stands for the old page's element with its id, and all below that."""

Field = Literal["role", "name", "value", "states"]
FIELDS: tuple[Field, ...] = get_args(Field)


class EditError(RecordError):
    """An edit that does not fit the page."""


@dataclass(frozen=True, slots=True)
class Navigate:
    """The page is at another address."""

    url: str


@dataclass(frozen=True, slots=True)
class Remove:
    """A node goes, with all below it."""

    target: str


@dataclass(frozen=True, slots=True)
class Set:
    """One field of a node changes; `states` are joined by spaces."""

    target: str
    field: Field
    value: str


@dataclass(frozen=True, slots=True)
class Insert:
    """A node comes, with all below it, as child number `index` of an element or the root."""

    parent: str
    index: int
    node: Node


@dataclass(frozen=True, slots=True)
class Load:
    """Another document takes the page's place."""

    url: str
    title: str
    nodes: tuple[Node, ...]
    """What is below the root."""


Edit = Navigate | Remove | Set | Insert | Load
Script = tuple[Edit, ...]


@dataclass(eq=False)
class _Draft:
    """A node that can be changed."""

    node: Node
    children: list[_Draft] = field(default_factory=list)

    @classmethod
    def of(cls, node: Node) -> _Draft:
        return cls(node, [cls.of(child) for child in node.children])

    def done(self) -> Node:
        return replace(self.node, children=tuple(child.done() for child in self.children))

    def walk(self) -> Iterator[_Draft]:
        yield self
        for child in self.children:
            yield from child.walk()


def _with_field(node: Node, which: Field, value: str) -> Node:
    match which:
        case "role":
            return replace(node, role=value)
        case "name":
            return replace(node, name=value)
        case "value":
            return replace(node, value=value)
        case "states":
            return replace(node, states=tuple(value.split()))


def read_field(node: Node, which: Field) -> str:
    """A field as `Set` writes it."""
    return " ".join(node.states) if which == "states" else str(getattr(node, which))


def diff(before: Page, after: Page) -> Script:
    """The edits that make `after` of `before`: removals first, then changes, then insertions."""
    removals: list[Edit] = []
    changes: list[Edit] = [Navigate(after.url)] if after.url != before.url else []
    insertions: list[Edit] = []

    def change(target: str, old: Node, new: Node) -> None:
        for which in FIELDS:
            if read_field(old, which) != read_field(new, which):
                changes.append(Set(target, which, read_field(new, which)))

    def compare(at: str, old: Node, new: Node) -> None:
        change(at, old, new)
        steps = _align(old.children, new.children)
        for o, n in reversed(steps):
            if o is not None and n is None:
                removals.append(Remove(old.children[o].id or f"{at}.{o}"))
        stayed = 0
        for o, n in steps:
            if o is not None and n is not None:
                if old.children[o].id:
                    compare(old.children[o].id, old.children[o], new.children[n])
                else:
                    change(f"{at}.{stayed}", old.children[o], new.children[n])
                stayed += 1
        insertions.extend(Insert(at, n, new.children[n]) for o, n in steps if o is None and n is not None)

    compare(ROOT, before.root, after.root)
    return (*removals, *changes, *insertions)


def load(before: Page, after: Page) -> Load | None:
    """The one edit that makes `after` of `before` as another document; None where it cannot say that."""
    root = after.root
    if replace(root, name="", children=()) != Node(role=ROOT_ROLE) or any(node.role == KEEP for node in root.walk()):
        return None
    old = {node.id: node for node in before.root.walk() if node.id}

    def brief(node: Node) -> Node:
        if node.id and node.children and old.get(node.id) == node:
            return Node(role=KEEP, id=node.id)
        return replace(node, children=tuple(map(brief, node.children)))

    return Load(after.url, after.title, tuple(map(brief, root.children)))


def _loaded(edit: Load, old: dict[str, Node], *, strict: bool) -> Node:
    """The new document's root.

    Raises:
        EditError: with `strict`, it keeps what is not there, or has an id twice.
    """
    seen: set[str] = set()

    def full(node: Node) -> Iterator[Node]:
        kept = node.role == KEEP
        found = old.get(node.id) if kept else node
        ids = [] if found is None else [one.id for one in (found.walk() if kept else (found,)) if one.id]
        if found is None or len(set(ids)) < len(ids) or seen.intersection(ids):
            if strict:
                raise EditError(f"[{node.id}] is not there to be kept, or is there twice.")
            return
        seen.update(ids)
        below = found.children if kept else tuple(one for child in node.children for one in full(child))
        yield replace(found, children=below)

    return Node(role=ROOT_ROLE, name=edit.title, children=tuple(one for node in edit.nodes for one in full(node)))


def _align(old: Sequence[Node], new: Sequence[Node]) -> list[tuple[int | None, int | None]]:
    """Places of children side by side: pairs that stay, old ones that go, new ones that come; in the new order."""
    # A node without an id is the same only if all of it is.
    matcher = SequenceMatcher(None, [one.id or one for one in old], [one.id or one for one in new], autojunk=False)
    found: list[tuple[int | None, int | None]] = []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            found += zip(range(i1, i2), range(j1, j2), strict=True)
            continue
        while i1 < i2 and j1 < j2 and _is_text(old[i1]) and _is_text(new[j1]):
            found.append((i1, j1))
            i1, j1 = i1 + 1, j1 + 1
        found += [(place, None) for place in range(i1, i2)] + [(None, place) for place in range(j1, j2)]
    return found


def _is_text(node: Node) -> bool:
    return not node.id and not node.children


def apply(script: Sequence[Edit], page: Page, *, strict: bool = True) -> Page:
    """The page with the edits done, one after another.

    Args:
        strict: False leaves out what does not fit: a target that is not there (any more), an id that is there already.

    Raises:
        EditError: an edit does not fit, with `strict`; or there are too many.
        RecordError: what comes out is too large for a page.
    """
    if len(script) > MAX_EDITS:
        raise EditError(f"a script has more than {MAX_EDITS} edits.")
    root = _Draft.of(page.root)
    url = page.url
    parents: dict[str, _Draft] = {}
    nodes: dict[str, _Draft] = {ROOT: root}

    def enter(draft: _Draft) -> None:
        for child in draft.children:
            if child.node.id:
                nodes[child.node.id], parents[child.node.id] = child, draft
            enter(child)

    enter(root)

    def become(edit: Load) -> None:
        nonlocal root, url
        old = {one: draft.done() for one, draft in nodes.items() if one != ROOT}
        root, url = _Draft.of(_loaded(edit, old, strict=strict)), edit.url
        parents.clear()
        nodes.clear()
        nodes[ROOT] = root
        enter(root)

    def find(target: str) -> tuple[_Draft | None, _Draft]:
        """Parent and node."""
        if target in nodes:
            return parents.get(target), nodes[target]
        at, dot, place = target.rpartition(".")
        if dot and at in nodes and place.isdecimal() and int(place) < len(nodes[at].children):
            child = nodes[at].children[int(place)]
            if not child.node.id:
                return nodes[at], child
        raise EditError(f"there is no node [{target}] on the page.")

    def do(edit: Edit) -> None:
        nonlocal url
        match edit:
            case Navigate(to):
                url = to
            case Load():
                become(edit)
            case Remove(target):
                parent, draft = find(target)
                if parent is None:
                    raise EditError("the root cannot be removed.")
                parent.children.remove(draft)
                for one in draft.walk():
                    nodes.pop(one.node.id, None)
                    parents.pop(one.node.id, None)
            case Set(target, which, value):
                _, draft = find(target)
                draft.node = _with_field(draft.node, which, value)
            case Insert(at, index, node):
                if at not in nodes or not 0 <= index <= len(nodes[at].children):
                    raise EditError(f"nothing can be inserted into [{at}] at {index}.")
                ids = [one.id for one in node.walk() if one.id]
                if len(set(ids)) < len(ids) or any(one in nodes for one in ids):
                    raise EditError("an inserted node has an id that is on the page already.")
                draft = _Draft.of(node)
                nodes[at].children.insert(index, draft)
                if node.id:
                    nodes[node.id], parents[node.id] = draft, nodes[at]
                enter(draft)

    for edit in script:
        try:
            do(edit)
        except EditError:
            if strict:
                raise
    changed = Page(url=url, root=root.done())
    changed.check()
    return changed
