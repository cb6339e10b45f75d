"""Policies for MiniWoB++ that read something and write it into fields."""

from __future__ import annotations

import re

from shoal.envs.web.actions import Click, Select, Type
from shoal.envs.web.miniwob_policy import MAX_TRIES, fields, ordinal, quoted, solves, submit
from shoal.envs.web.observation import TEXT_ROLE
from shoal.envs.web.policy import Lost, Policy, nodes, one, texts
from shoal.envs.web.tree import Page


@solves("enter-text", "enter-text-dynamic", "enter-password")
def enter(goal: str, page: Page) -> Policy:
    (text,) = quoted(goal)
    for number in range(len(fields(page))):
        page = yield Type(one(page, "textbox", nth=number), text, enter=False)
    yield submit(page)


@solves("enter-text-2")
def enter_cased(goal: str, page: Page) -> Policy:
    (text,) = quoted(goal)
    text = text.upper() if "upper case" in goal else text.lower()
    page = yield Type(one(page, "textbox"), text, enter=False)
    yield submit(page)


@solves("enter-date")
def enter_date(goal: str, page: Page) -> Policy:
    month, day, year = re.findall(r"\d+", goal)[:3]
    page = yield Type(one(page, "Date"), f"{year}-{month}-{day}", enter=False)
    yield submit(page)


@solves("enter-time")
def enter_time(goal: str, page: Page) -> Policy:
    hour, minute = re.findall(r"\d+", goal)[:2]
    afternoon = "PM" in goal
    hours = int(hour) % 12 + 12 * afternoon if "AM" in goal or afternoon else int(hour)
    page = yield Type(one(page, "InputTime"), f"{hours:02d}:{minute}", enter=False)
    yield submit(page)


@solves("login-user", "login-user-popup")
def log_in(goal: str, page: Page) -> Policy:
    for number, text in enumerate(quoted(goal)[:2]):
        page = yield Type(one(page, "textbox", nth=number), text, enter=False)
        popup = nodes(page, name="Cancel") or nodes(page, name="No")
        if popup:
            page = yield Click(popup[0].id)
            page = yield Type(one(page, "textbox", nth=number), text, enter=False)
    yield submit(page)


@solves("copy-paste", "copy-paste-2")
def copy(goal: str, page: Page) -> Policy:
    nth = ordinal(goal) if re.search(r"\d(st|nd|rd|th)", goal) else 0
    sources = [node for node in fields(page) if node.value]
    page = yield Type(one(page, "textbox", where=lambda node: not node.value), sources[nth].value, enter=False)
    yield submit(page)


@solves("scroll-text")
def last_word(_: str, page: Page) -> Policy:
    text, field = fields(page)
    page = yield Type(field.id, text.value.split()[-1].strip(".,?!"), enter=False)
    yield submit(page)


@solves("find-word")
def nth_word(goal: str, page: Page) -> Policy:
    text = next(node.name for node in page.root.walk() if node.role == TEXT_ROLE)
    page = yield Type(one(page, "textbox"), text.split()[ordinal(goal)].strip(".,?!"), enter=False)
    yield submit(page)


@solves("simple-arithmetic")
def calculate(_: str, page: Page) -> Policy:
    found = re.search(r"(\d+) ([x+-]) (\d+) =", " ".join(texts(page)))
    if found is None:
        raise Lost("there is no sum on the page.")
    left, right = int(found[1]), int(found[3])
    result = {"x": left * right, "+": left + right, "-": left - right}[found[2]]
    page = yield Type(one(page, "textbox"), str(result), enter=False)
    yield submit(page)


@solves("simple-algebra")
def solve_for_x(_: str, page: Page) -> Policy:
    said = " ".join(texts(page))
    found = re.search(r"(x|\d+) ([+-]) (x|\d+) = (-?\d+)", said)
    if found is None:
        raise Lost(f"{said[:60]!r} holds no equation.")
    left, sign, right, total = found.groups()
    if left == "x":
        result = int(total) - int(right) if sign == "+" else int(total) + int(right)
    else:
        result = int(total) - int(left) if sign == "+" else int(left) - int(total)
    page = yield Type(one(page, "textbox"), str(result), enter=False)
    yield submit(page)


@solves("read-table", "read-table-2")
def look_up(goal: str, page: Page) -> Policy:
    cells = [node.name for node in nodes(page, "cell")]
    table = dict(zip(cells[0::2], cells[1::2], strict=False))
    found = re.search(r"value of (.*) into the", goal)
    asked = [found[1]] if found else [text.rstrip(":") for text in texts(page) if text.endswith(":")]
    for number, key in enumerate(asked):
        page = yield Type(one(page, "textbox", nth=number), table[key], enter=False)
    yield submit(page)


@solves("multi-layouts", "multi-orderings")
def search_film(goal: str, page: Page) -> Policy:
    found = re.fullmatch(r"Search for (.*) movies directed by (.*) from year (\d+)\.", goal)
    if found is None:
        raise Lost(f"{goal!r} describes no film.")
    wanted = {"genre": found[1], "director": found[2], "year": found[3]}
    said = [text.lower().replace("date", "year") for text in texts(page)]
    labels = [key for text in said for key in wanted if key in text]
    for number, key in enumerate(dict.fromkeys(labels)):
        page = yield Type(one(page, "textbox", nth=number), wanted[key], enter=False)
    yield submit(page)


@solves("use-autocomplete", "use-autocomplete-nodelay")
def complete(goal: str, page: Page) -> Policy:
    start, *ends = quoted(goal)
    page = yield Type(one(page, "textbox"), start, enter=False)
    for _ in range(MAX_TRIES):
        fits = [
            node
            for node in nodes(page)
            if node.role in ("menuitem", "option", "generic", "listitem")
            and node.name.startswith(start)
            and node.name.endswith(ends[0] if ends else "")
        ]
        if fits:
            page = yield Click(fits[0].id)
            break
        page = yield Click(one(page, "textbox"))
    yield submit(page)


@solves("use-spinner")
def spin(goal: str, page: Page) -> Policy:
    found = re.search(r"Select (-?\d+)", goal)
    page = yield Type(one(page, "spinbutton"), found[1] if found else "0", enter=False)
    yield submit(page)


@solves("form-sequence-2")
def radio_andordinal(goal: str, page: Page) -> Policy:
    first, second = (int(number) - 1 for number in re.findall(r"(\d+)(?:st|nd|rd|th)", goal))
    page = yield Click(one(page, "radio", nth=first))
    page = yield Type(one(page, "textbox", nth=second), quoted(goal)[0], enter=False)
    yield submit(page)


@solves("form-sequence-3")
def drop_and_press(goal: str, page: Page) -> Policy:
    found = re.search(r"Choose (.*) from the dropdown", goal)
    page = yield Select(one(page, "combobox"), found[1] if found else "")
    yield Click(one(page, "button", quoted(goal)[0]))


@solves("find-greatest")
def pick_greatest(_: str, page: Page) -> Policy:
    cards = nodes(page, "generic", where=lambda node: node.name.isdigit())
    page = yield Click(max(cards, key=lambda node: int(node.name)).id)
    yield submit(page)


@solves("odd-or-even")
def sort_parity(_: str, page: Page) -> Policy:
    numbers = [int(text) for text in texts(page) if re.fullmatch(r"-?\d+", text)]
    for place, number in enumerate(numbers):
        page = yield Click(one(page, "button", "Odd" if number % 2 else "Even", nth=place))
    yield submit(page)


@solves("guess-number")
def guess(_: str, page: Page) -> Policy:
    low, high = 0, 9
    while low <= high:
        middle = (low + high) // 2
        page = yield Type(one(page, "spinbutton"), str(middle), enter=False)
        page = yield submit(page)
        said = " ".join(texts(page))
        if "higher" in said:
            low = middle + 1
        elif "lower" in said:
            high = middle - 1
        else:
            return


@solves("generate-number")
def generate(goal: str, page: Page) -> Policy:
    limits = [int(number) for number in re.findall(r"\d+", goal)]

    def fits(number: int) -> bool:
        if limits:
            return number > limits[0] if "greater than" in goal else number < limits[0]
        return number % 2 == int("odd" in goal)

    for _ in range(MAX_TRIES):
        page = yield Click(one(page, "button", "Generate"))
        shown = next((int(text) for text in texts(page) if text.isdigit()), None)
        if shown is not None and fits(shown):
            break
    yield submit(page)
