"""What a world model is asked and what it should answer, as text. Pure.

    URL: http://shop.test/category/kitchen                            the part of the page around what is acted on,
    RootWebArea 'Kitchen'                                             menus without their links
        [5] navigation ''
        [11] link 'Green Bowl'
        StaticText '£36'
    Task: Put one Green Bowl into the basket. It is in Kitchen.
    Act: click [11] link 'Green Bowl'

    The link 'Green Bowl' leads to 'Green Bowl'.                       the reason r
    load 'http://shop.test/product/3' 'Green Bowl'                     the change Δ (`script`)
        [5] keep ''
        [10] heading 'Green Bowl'
        …

A second question asks whether a task is done; its answer is yes or no.

1. DynaWeb's model reads the whole tree, and its r is written by a larger model. Here the page is cut to a budget around
   the element, and r names in one sentence what is acted on and what that leads to, made from the real pages.

Invariants: a question depends on instruction, page and act alone; a reason is one line of at most `REASON_CHARS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from shoal.envs.base import EnvironmentSettings
from shoal.envs.dream.script import brief, write_script
from shoal.envs.web.actions import Action, Click, GoBack, Scroll, Select, Stop, Type, write_action
from shoal.envs.web.tree import Node, Page, estimate_tokens
from shoal.protocol.sampling import Grammar

REASON_CHARS = 120
MAX_NAME_CHARS = 48
"""Of a name inside a reason."""
MAX_PAST_ACTS = 12
"""Acts that the second question tells, the newest ones."""
MENU, LINK = "navigation", "link"
MAX_NAMED = 1000

ASKED_NEXT = "What does the act change on the page?"
ASKED_DONE = "Is the task done? Answer yes or no."
YES_NO = Grammar(kind="regex", text="yes|no")


class Sight(EnvironmentSettings):
    """How much of a page a world model sees; kept beside the model, which has learnt it."""

    page_tokens: int = Field(default=288, ge=32, le=16_384)
    """For acts that send a form, or whatever else can change the page, about."""
    link_tokens: int = Field(default=96, ge=32, le=16_384)
    """For a click on a link: what it leads to says more about it than what is around."""
    field_tokens: int = Field(default=96, ge=32, le=16_384)
    """For acts that only fill in a field."""
    done_tokens: int = Field(default=256, ge=32, le=16_384)
    """Of the last page, where it is asked whether a task is done."""


def view(page: Page, around: str, budget_tokens: int) -> tuple[str, tuple[str, ...]]:
    """The lines nearest to element `around` (from the top where there is none), and the elements that they name.

    The line that has the focus is always there, because whatever is acted on takes it; and so are menus, of whose links
    none is shown but the one that is acted on.
    """
    lines: list[tuple[str, Node]] = []

    def meant(node: Node) -> bool:
        return any((one.id and one.id == around) or "focused" in one.states for one in node.walk())

    def enter(node: Node, depth: int) -> None:
        lines.append(("\t" * depth + node.line(), node))
        for child in node.children:
            if node.role != MENU or meant(child):
                enter(child, depth + 1)

    for child in page.root.children:
        enter(child, 1)
    centre = next((place for place, (_, node) in enumerate(lines) if around and node.id == around), 0)
    first = {place for place, (_, node) in enumerate(lines) if "focused" in node.states or node.role == MENU}
    head = [f"URL: {page.url}", page.root.line()]
    left = budget_tokens - sum(map(estimate_tokens, head))
    chosen: set[int] = set()
    for place in sorted(range(len(lines)), key=lambda one: (one not in first, abs(one - centre), one)):
        left -= estimate_tokens(lines[place][0]) + 1
        if left < 0 and chosen:
            break
        chosen.add(place)
    shown = [lines[place] for place in sorted(chosen)]
    text = "\n".join([*head, *(line for line, _ in shown)])
    return text, tuple(node.id for _, node in shown if node.id)


def act_words(action: Action, page: Page) -> str:
    """The act, with what the page says of its element instead of the id alone: `click [11] link 'Kitchen'`."""
    written = write_action(action)
    if isinstance(action, Scroll | GoBack | Stop):
        return written
    node = page.find(action.id)
    return written if node is None else written.replace(f"[{action.id}]", node.line(), 1)


def next_question(instruction: str, page: Page, action: Action, sight: Sight) -> tuple[str, tuple[str, ...]]:
    """The question for the change, and the elements that its answer may name: the page's, or where these are too many
    for a grammar, those that the question shows."""
    around = "" if isinstance(action, Scroll | GoBack | Stop) else action.id
    budget_tokens = sight.page_tokens
    if isinstance(action, Select) or (isinstance(action, Type) and not action.enter):
        budget_tokens = sight.field_tokens
    elif isinstance(action, Click) and (node := page.find(around)) is not None and node.role == LINK:
        budget_tokens = sight.link_tokens
    shown, ids = view(page, around, budget_tokens)
    asked = f"{shown}\nTask: {instruction}\nAct: {act_words(action, page)}\n{ASKED_NEXT}"
    every = tuple(node.id for node in page.root.walk() if node.id)
    return asked, every if len(every) <= MAX_NAMED else ids


def next_answer(before: Page, action: Action, after: Page) -> str:
    """Reason and change, as a world model should write them."""
    return f"{reason(before, action, after)}\n{write_script(brief(before, after))}"


def reason(before: Page, action: Action, after: Page) -> str:
    """One sentence: what is acted on, and what that leads to."""
    node = None if isinstance(action, Scroll | GoBack | Stop) else before.find(action.id)
    what = "The page" if node is None else f"The {node.role} {_named(node.name)}"
    later = None if node is None else after.find(node.id)
    if before == after:
        said = "Nothing changes."
    elif after.url != before.url or after.title != before.title:
        said = f"{what} leads to {_named(after.title)}."
    elif isinstance(action, Type | Select) and later is not None:
        said = f"{what} holds {_named(later.value)} now."
    elif isinstance(action, Click) and node is not None and later is not None and later.states != node.states:
        said = f"{what} is {' '.join(later.states) or 'plain'} now."
    else:
        said = "The page changes." if node is None else f"{what} changes the page."
    return said[:REASON_CHARS]


def _named(name: str) -> str:
    short = name if len(name) <= MAX_NAME_CHARS else name[: MAX_NAME_CHARS - 1] + "…"
    return f"'{short}'"


def done_question(instruction: str, acts: Sequence[str], page: Page, sight: Sight) -> str:
    """Whether a task is done.

    Args:
        acts: as `act_words` says them, in order; the last one may be `stop [answer]`.
        page: the last one.
    """
    shown, _ = view(page, "", sight.done_tokens)
    told = "\n".join(acts[-MAX_PAST_ACTS:]) or "none"
    return f"{shown}\nTask: {instruction}\nActs:\n{told}\n{ASKED_DONE}"
