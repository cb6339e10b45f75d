"""Policies for MiniWoB++ that look for something: in lists, trees, pages of results and calendars."""

from __future__ import annotations

import re

from shoal.envs.web.actions import Click, Type
from shoal.envs.web.listed import listed
from shoal.envs.web.miniwob_policy import MAX_TRIES, ordinal, quoted, solves, submit
from shoal.envs.web.policy import Lost, Policy, nodes, one, texts
from shoal.envs.web.tree import Page

MONTHS = listed("""January February March April May June July August September October November December""")


@solves("buy-ticket")
def buy(goal: str, page: Page) -> Policy:
    said = texts(page)
    durations = [int(h) * 60 + int(m) for h, m in re.findall(r"Duration: (\d+)h (\d+)m", " ".join(said))]
    buttons = nodes(page, "button")
    prices = [int(re.sub(r"\D", "", node.name)) for node in buttons]
    values = durations if "duration" in goal else prices
    best = max(values) if "longest" in goal or "most expensive" in goal else min(values)
    yield Click(buttons[values.index(best)].id)


@solves("search-engine")
def search(goal: str, page: Page) -> Policy:
    wanted = ordinal(goal)
    page = yield Type(one(page, "textbox"), quoted(goal)[0], enter=False)
    page = yield Click(one(page, "button", "Search"))
    for _ in range(wanted // 3):
        page = yield Click(one(page, name=">"))
    results = nodes(
        page, where=lambda node: node.role in ("link", "generic") and not re.fullmatch(r"\d+|[<>]", node.name)
    )
    yield Click(results[wanted % 3].id)


@solves("phone-book")
def call(goal: str, page: Page) -> Policy:
    found = re.search(r"Find (.*) in the contact book and click on their (.*)\.", goal)
    if found is None:
        raise Lost(f"{goal!r} names nobody.")
    which = {"phone number": 0, "email": 1, "address": 2}[found[2]]
    for _ in range(MAX_TRIES):
        if nodes(page, "heading", found[1]):
            yield Click(one(page, "link", nth=which))
            return
        page = yield Click(one(page, "link", ">"))


@solves("navigate-tree")
def unfold(goal: str, page: Page) -> Policy:
    (name,) = quoted(goal)
    opened: set[str] = set()
    for _ in range(MAX_TRIES):
        found = nodes(page, name=name)
        if found:
            yield Click(found[-1].id)
            return
        folded = [
            node.children[-1].id
            for node in nodes(page, "listitem")
            if node.children and node.children[-1].id not in opened
        ]
        if not folded:
            raise Lost(f"the tree holds no {name!r}.")
        opened.add(folded[0])
        page = yield Click(folded[0])


@solves("choose-date", "choose-date-easy", "choose-date-medium", "choose-date-nodelay")
def pick_date(goal: str, page: Page) -> Policy:
    month, day, year = (int(number) for number in re.findall(r"\d+", goal)[:3])
    page = yield Click(one(page, "textbox"))
    for _ in range(MAX_TRIES):
        said = " ".join(texts(page))
        found = re.search(rf"({'|'.join(MONTHS)}) (\d{{4}})", said)
        if found is None:
            raise Lost("the calendar does not show its month.")
        ahead = (year - int(found[2])) * 12 + month - 1 - MONTHS.index(found[1])
        if not ahead:
            break
        page = yield Click(one(page, name="Next" if ahead > 0 else "Prev"))
    page = yield Click(one(page, "link", str(day)))
    yield submit(page)
