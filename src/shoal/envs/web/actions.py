"""What an agent can do on a page, as text and as values.

    click [12]          type [7] [two words] [1]          select [9] [Blue]          scroll [down]
    go_back             stop [the answer]

`type` replaces what the field holds; its last part, 1 or 0, says whether Enter is pressed afterwards (1 if left out).

Invariants: `read_action(write_action(a)) == a` for every action that `write_action` takes; whatever the grammar lets
through is an action, and names no element but those it was given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.envs.web.tree import Node, Page
from shoal.errors import ShoalError
from shoal.protocol.sampling import Grammar

MAX_TEXT_CHARS = 500
MAX_WRITTEN_CHARS = 80
"""A grammar lets no longer text be typed or answered."""

TEXT_ROLES = ("textbox", "searchbox", "spinbutton", "combobox", "Date", "ColorWell", "InputTime", "DateTime")
LIST_ROLES = ("combobox", "listbox")

FORMS = "click [id], type [id] [text] [enter 0|1], select [id] [option], scroll [up|down], go_back, stop [answer]"


class ActionError(ShoalError):
    """A reply that is no action, or one that cannot be done here; its text is the agent's next observation."""


@dataclass(frozen=True, slots=True)
class Click:
    id: str


@dataclass(frozen=True, slots=True)
class Type:
    id: str
    text: str
    enter: bool = True


@dataclass(frozen=True, slots=True)
class Select:
    id: str
    option: str


@dataclass(frozen=True, slots=True)
class Scroll:
    direction: Literal["up", "down"]


@dataclass(frozen=True, slots=True)
class GoBack:
    pass


@dataclass(frozen=True, slots=True)
class Stop:
    answer: str = ""


Action = Click | Type | Select | Scroll | GoBack | Stop

_ID = r"\[\s*([A-Za-z0-9]+)\s*\]"
_CLICK = re.compile(rf"click\s*{_ID}")
_TYPE = re.compile(rf"type\s*{_ID}\s*\[(.*?)\](?:\s*\[\s*([01])\s*\])?")
_SELECT = re.compile(rf"select\s*{_ID}\s*\[(.*)\]")
_SCROLL = re.compile(r"scroll\s*\[\s*(up|down)\s*\]")
_STOP = re.compile(r"stop(?:\s*\[(.*)\])?")


def read_action(reply: str) -> Action:
    """The action in a reply: its last line that is one, so that a thought may come first.

    Raises:
        ActionError: there is none.
    """
    for line in reversed(reply.strip().splitlines()):
        action = _read_line(line.strip().strip("`").strip())
        if action is not None:
            return action
    raise ActionError("There is no action in your answer.", f"Write one of: {FORMS}.")


def _read_line(line: str) -> Action | None:
    if len(line) > MAX_TEXT_CHARS + 64:
        return None
    if line == "go_back":
        return GoBack()
    if found := _CLICK.fullmatch(line):
        return Click(found[1])
    if found := _TYPE.fullmatch(line):
        return Type(found[1], found[2], found[3] != "0")
    if found := _SELECT.fullmatch(line):
        return Select(found[1], found[2])
    if found := _SCROLL.fullmatch(line):
        return Scroll("up" if found[1] == "up" else "down")
    if found := _STOP.fullmatch(line):
        return Stop((found[1] or "").strip())
    return None


def write_action(action: Action) -> str:
    """The action as text. What is typed, chosen or answered must be one line without outer white space."""
    match action:
        case Click(id_):
            return f"click [{id_}]"
        case Type(id_, text, enter):
            return f"type [{id_}] [{text}] [{int(enter)}]"
        case Select(id_, option):
            return f"select [{id_}] [{option}]"
        case Scroll(direction):
            return f"scroll [{direction}]"
        case GoBack():
            return "go_back"
        case Stop(answer):
            return f"stop [{answer}]"


def target(action: Action, page: Page) -> Node | None:
    """The element that an action is about; None where it is about none.

    Raises:
        ActionError: the page has no such element.
    """
    if isinstance(action, Scroll | GoBack | Stop):
        return None
    node = page.find(action.id)
    if node is None:
        raise ActionError(f"There is no element [{action.id}] on this page.", "Name one that you can see.")
    return node


def options_of(node: Node) -> list[str]:
    """What can be selected in a list."""
    return [one.name for one in node.walk() if one.role == "option"]


def action_grammar(page: Page, ids: Sequence[str] | None, *, can_scroll: bool = True) -> Grammar:
    """What a reply on this page must be.

    Args:
        ids: the elements that may be named; None lets any number stand for one.
    """
    text = rf"[^\[\]\x00-\x1f]{{0,{MAX_WRITTEN_CHARS}}}"
    if ids is None:
        clicks = types = r"[0-9]{1,6}"
        selects = [rf"select \[[0-9]{{1,6}}\] \[{text}\]"]
    else:
        shown = set(ids)
        nodes = [node for node in page.root.walk() if node.id in shown]
        clicks = "|".join(node.id for node in nodes)
        types = "|".join(node.id for node in nodes if node.role in TEXT_ROLES)
        selects = []
        for node in nodes:
            names = sorted({re.escape(name) for name in options_of(node) if name and not set(name) & set("[]\n")})
            if node.role in LIST_ROLES and names:
                selects.append(rf"select \[{node.id}\] \[({'|'.join(names)})\]")
    forms = [rf"click \[({clicks})\]"] if clicks else []
    forms += [rf"type \[({types})\] \[{text}\] \[[01]\]"] if types else []
    forms += [*selects, "go_back", rf"stop \[{text}\]"]
    forms += [r"scroll \[(up|down)\]"] if can_scroll else []
    return Grammar(kind="regex", text="|".join(forms))
