"""Policies for MiniWoB++ that press, tick, choose and unfold what the instruction names."""

from __future__ import annotations

import re

from shoal.envs.web.actions import Click, Select
from shoal.envs.web.miniwob_policy import ordinal, quoted, solves, submit
from shoal.envs.web.policy import Lost, Policy, nodes, one
from shoal.envs.web.tree import Node, Page

LIKE_WORDS = (
    "big large huge enormous gigantic",
    "small tiny little mini petite",
    "red scarlet crimson vermillion",
    "happy cheerful joyful gleeful delighted",
    "sad unhappy sorrowful miserable tragic",
    "angry mad furious irritated",
    "evil wicked immoral sinful corrupt depraved",
    "wrong incorrect mistaken erroneous",
    "real genuine actual",
    "strange odd peculiar unusual weird",
    "stop cease halt end finish",
    "scared terrified panicked fearful frightened afraid",
    "quiet calm peaceful serene mild",
    "old aged archaic",
    "love like adore favor",
    "kill murder assassinate",
    "keep retain preserve sustain maintain",
    "hide conceal camouflage",
    "hate despise loathe detest dislike",
    "funny humorous amusing comical laughable",
    "fat fleshy plump chubby",
    "stupid dumb dull unwise",
    "delicious savory delectable appetizing",
    "cut slice carve chop",
    "brave courageous fearless",
    "begin start initiate launch",
    "answer reply response",
    "television televisions TV TVs",
    "house home houses homes",
    "fire flame fires flames",
    "pig pork swine pig",
    "rabbit rabbits bunny bunnies",
    "car cars automobile automobiles vehicle vehicles",
)
"""The words that the page itself takes to be alike."""


@solves("click-test", "click-test-2", "click-test-transfer", "click-button", "unicode-test", "focus-text")
def press(goal: str, page: Page) -> Policy:
    found = re.search(r"button (ONE|TWO)", goal)
    if "textbox" in goal:
        yield Click(one(page, "textbox"))
    elif found or quoted(goal):
        yield Click(one(page, "button", found[1] if found else quoted(goal)[0]))
    else:
        yield Click(one(page, "button"))


@solves("click-button-sequence")
def press_both(_: str, page: Page) -> Policy:
    page = yield Click(one(page, "button", "ONE"))
    yield Click(one(page, "button", "TWO"))


@solves("focus-text-2")
def focus_nth(goal: str, page: Page) -> Policy:
    yield Click(one(page, "textbox", nth=ordinal(goal)))


@solves("click-dialog")
def close_dialog(_: str, page: Page) -> Policy:
    yield Click(one(page, "button", "Close"))


@solves("click-dialog-2")
def answer_dialog(goal: str, page: Page) -> Policy:
    (label,) = quoted(goal)
    yield Click(one(page, "button", "Close" if label == "x" else label))


@solves("click-link")
def follow(goal: str, page: Page) -> Policy:
    yield Click(one(page, "generic", quoted(goal)[0]))


@solves("click-widget")
def press_widget(goal: str, page: Page) -> Policy:
    (kind,) = quoted(goal)
    if kind == "textarea":
        yield Click(one(page, "textbox", where=lambda node: "multiline" in node.states))
    else:
        role = {"text": "textbox"}.get(kind, kind)
        yield Click(one(page, role, where=lambda node: "multiline" not in node.states))


@solves(
    "click-checkboxes", "click-checkboxes-large", "click-checkboxes-transfer", "click-checkboxes-soft", "click-option"
)
def tick(goal: str, page: Page) -> Policy:
    wanted = re.fullmatch(r"Select (?:words similar to )?(.*) and click Submit\.?", goal)
    names = [] if wanted is None or wanted[1] == "nothing" else wanted[1].split(", ")
    if "words similar to" in goal:
        alike = {word for line in LIKE_WORDS if set(names) & set(line.split()) for word in line.split()}
        names = [node.name for node in nodes(page, "checkbox") if node.name in alike]
    role = "radio" if nodes(page, "radio") else "checkbox"
    for name in names:
        page = yield Click(one(page, role, name))
    yield submit(page)


@solves("choose-list", "click-scroll-list")
def choose(goal: str, page: Page) -> Policy:
    found = re.fullmatch(r"Select (.*) from the (?:scroll )?list and click Submit\.?", goal)
    if found is None:
        raise Lost(f"{goal!r} names nothing to select.")
    for name in found[1].split(", "):
        page = yield Select(one(page, where=lambda node: node.role in ("combobox", "listbox")), name)
    yield submit(page)


@solves("click-collapsible", "click-collapsible-nodelay")
def expand_andsubmit(_: str, page: Page) -> Policy:
    page = yield Click(one(page, "tab"))
    yield submit(page)


@solves(
    "click-collapsible-2",
    "click-collapsible-2-nodelay",
    "click-tab-2",
    "click-tab-2-easy",
    "click-tab-2-medium",
    "click-tab-2-hard",
)
def look_into_each(goal: str, page: Page) -> Policy:
    (name,) = quoted(goal)
    for number in range(len(nodes(page, "tab"))):
        if not _links(page, name):
            page = yield Click(one(page, "tab", nth=number))
    yield Click(_links(page, name)[0].id)


def _links(page: Page, name: str) -> list[Node]:
    return nodes(page, name=name, where=lambda node: node.role == "generic" and "clickable" in node.states)


@solves("click-tab")
def open_tab(goal: str, page: Page) -> Policy:
    found = re.search(r"Tab #\d+", goal)
    yield Click(one(page, "link", found[0] if found else ""))
