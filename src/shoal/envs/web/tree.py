"""What an agent sees of a page: its accessibility tree, as a value and as text.

    URL: http://shop.test/cart
    RootWebArea 'Your cart'
        [14] link 'Home'
        [21] textbox 'Quantity', value='2', focused
        StaticText 'Total: 30'

Ids are those that BrowserGym calls `bid`: elements numbered in document order when they are first seen, kept as long as
the element lives. Text that belongs to no element of its own has no id.

Invariants: trees are immutable and bounded, and no id occurs twice in one; `read_page(page.text()) == page`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from shoal.errors import RecordError
from shoal.protocol.codec import Record

ROOT_ROLE = "RootWebArea"
MAX_NODES = 20_000
MAX_DEPTH = 128
MAX_URL_CHARS = 2048

ID = r"[a-zA-Z]{0,8}[0-9]{1,7}|[a-z][A-Z]{0,7}"
ROLE = r"[A-Za-z][A-Za-z0-9_-]{0,40}"
STATE = r"[a-z]{2,20}"
QUOTED = r"'(?:[^'\\\n]|\\['\\nrt])*'"
_LINE = re.compile(rf"(\t*)(?:\[({ID})\] )?({ROLE}) ({QUOTED})(?:, value=({QUOTED}))?((?:, {STATE})*)")
_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_UNESCAPES = {shown[1]: char for char, shown in _ESCAPES.items()}


class Node(Record, frozen=True):
    """One node of a tree."""

    role: str
    id: str = ""
    """Empty for text and for the root."""
    name: str = ""
    value: str = ""
    states: tuple[str, ...] = ()
    """Such as `checked`, `disabled`, `expanded`; sorted."""
    children: tuple[Node, ...] = ()

    def walk(self) -> Iterator[Node]:
        """This node and all below it, in document order."""
        yield self
        for child in self.children:
            yield from child.walk()

    def line(self) -> str:
        """The node alone, without what is below it."""
        head = f"[{self.id}] " if self.id else ""
        value = f", value={quote(self.value)}" if self.value else ""
        return f"{head}{self.role} {quote(self.name)}{value}" + "".join(f", {state}" for state in self.states)

    def lines(self, depth: int = 0) -> Iterator[str]:
        """The node and all below it, one line each, indented by tabs."""
        yield "\t" * depth + self.line()
        for child in self.children:
            yield from child.lines(depth + 1)


class Page(Record, frozen=True):
    """A page as it stands: where it is, and its tree."""

    url: str
    root: Node

    @property
    def title(self) -> str:
        return self.root.name

    def check(self) -> None:
        seen: set[str] = set()
        if len(self.url) > MAX_URL_CHARS:
            raise RecordError(f"a page's URL has more than {MAX_URL_CHARS} characters.")
        pending, count = [(self.root, 0)], 0
        while pending:
            node, depth = pending.pop()
            count += 1
            if count > MAX_NODES or depth > MAX_DEPTH:
                raise RecordError(f"a page has more than {MAX_NODES} nodes, or is deeper than {MAX_DEPTH}.")
            if node.id in seen:
                raise RecordError(f"a page has the id {node.id} twice.")
            if node.id:
                seen.add(node.id)
            pending += [(child, depth + 1) for child in node.children]

    def text(self) -> str:
        """All of it."""
        return "\n".join([f"URL: {self.url}", *self.root.lines()])

    def find(self, id_: str) -> Node | None:
        """The element with this id."""
        return next((node for node in self.root.walk() if node.id == id_), None) if id_ else None


def quote(text: str) -> str:
    """`text` in single quotes on one line."""
    return "'" + "".join(_ESCAPES.get(char, char) for char in text) + "'"


def unquote(text: str) -> str:
    """What `quote` was given."""
    return re.sub(r"\\(.)", lambda found: _UNESCAPES[found[1]], text[1:-1])


def read_line(line: str) -> tuple[int, Node]:
    """Depth and node of one line.

    Raises:
        RecordError: it is none.
    """
    found = _LINE.fullmatch(line)
    if found is None:
        raise RecordError(f"{line[:80]!r} is no line of a tree.")
    tabs, id_, role, name, value, states = found.groups()
    node = Node(
        id=id_ or "",
        role=role,
        name=unquote(name),
        value=unquote(value) if value else "",
        states=tuple(states.split(", ")[1:]),
    )
    return len(tabs), node


def read_nodes(lines: list[str]) -> list[Node]:
    """The trees that these lines hold, one after another.

    Raises:
        RecordError: a line is no node, or is indented too far.
    """
    roots: list[Node] = []
    stack: list[tuple[Node, list[Node]]] = []

    def fold(depth: int) -> None:
        while len(stack) > depth:
            node, children = stack.pop()
            done = Node(
                id=node.id,
                role=node.role,
                name=node.name,
                value=node.value,
                states=node.states,
                children=tuple(children),
            )
            (stack[-1][1] if stack else roots).append(done)

    for line in lines:
        depth, node = read_line(line)
        if depth > len(stack) or depth > MAX_DEPTH:
            raise RecordError(f"{line[:80]!r} is indented too far.")
        fold(depth)
        stack.append((node, []))
    fold(0)
    return roots


def read_page(text: str) -> Page:
    """The page that `Page.text` wrote.

    Raises:
        RecordError: it is none.
    """
    first, _, rest = text.partition("\n")
    if not first.startswith("URL: "):
        raise RecordError("a page's text begins with its URL.")
    roots = read_nodes(rest.split("\n"))
    if len(roots) != 1:
        raise RecordError(f"a page has one root, and this one has {len(roots)}.")
    page = Page(url=first.removeprefix("URL: "), root=roots[0])
    page.check()
    return page


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a page that one observation shows."""

    text: str
    ids: tuple[str, ...]
    """Elements that it shows."""
    start: int
    """Its first line, counted from the root."""
    end: int
    total: int


def estimate_tokens(text: str) -> int:
    """About how many tokens a model's tokenizer makes of it: no word is free, digits and marks count one each.

    Rather too many than too few for tokenizers of 30,000 words and more, on English pages.
    """
    return sum(1 + (len(word) - 1) // 6 for word in re.findall(r"[A-Za-z]+|[^\sA-Za-z]|[\n\t]+", text))


def window(page: Page, budget_tokens: int, start: int = 0) -> Window:
    """What fits into `budget_tokens` (by `estimate_tokens`) from line `start` on; where it is cut, a mark says so.

    The URL and the root are always shown, and at least one line more.
    """
    head = [f"URL: {page.url}", page.root.line()]
    nodes = [(depth, node) for depth, node in _below(page.root, 1)]
    total = len(nodes)
    start = max(0, min(start, total - 1)) if total else 0
    if start:
        head.append(f"({start} lines above: scroll [up])")
    left = (
        budget_tokens
        - sum(estimate_tokens(line) + 1 for line in head)
        - estimate_tokens("(999 lines below: scroll [down])")
    )
    shown: list[str] = []
    ids: list[str] = []
    end = start
    for depth, node in nodes[start:]:
        line = "\t" * depth + node.line()
        left -= estimate_tokens(line) + 1
        if left < 0 and shown:
            break
        shown.append(line)
        end += 1
        if node.id:
            ids.append(node.id)
    if end < total:
        shown.append(f"({total - end} lines below: scroll [down])")
    return Window("\n".join([*head, *shown]), tuple(ids), start, end, total)


def _below(node: Node, depth: int) -> Iterator[tuple[int, Node]]:
    for child in node.children:
        yield depth, child
        yield from _below(child, depth + 1)
