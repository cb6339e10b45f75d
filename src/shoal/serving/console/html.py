"""Pieces of pages that all views use: tables, cards, facts, links, and how numbers and times are written.

Invariant: everything goes through `markup.tag` and `markup.text`, so nothing that is not `Markup` stays unescaped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote, urlencode

from shoal.coordinator.reporting.markup import Markup, join, tag, text

PREFIX = "/console"

MAX_SHOWN_CHARS = 20_000
"""Of one text; what is longer is cut, and says so."""


def void(name: str, /, **attributes: str) -> Markup:
    """An element that has no end, such as `input`."""
    return Markup(tag(name, **attributes).removesuffix(f"</{name}>"))


def path(view: str, **query: object) -> str:
    """A view's address."""
    asked = urlencode({key: str(value) for key, value in query.items() if value not in ("", None)})
    return f"{PREFIX}/{quote(view)}" + (f"?{asked}" if asked else "")


def link(label: object, view: str, /, **query: object) -> Markup:
    return tag("a", label, href=path(view, **query))


def section(title: str, *content: object, note: str = "", id_: str = "") -> Markup:
    """A titled part; one with an id keeps its place when it is replaced."""
    head = tag("h2", title, *([tag("small", note)] if note else []))
    attributes = {"class_": "part"} | ({"data_part": id_} if id_ else {})
    return tag("section", head, *content, **attributes)


def cards(facts: Iterable[tuple[str, object, str]]) -> Markup:
    """Large numbers: label, value, a remark."""
    made = [
        tag(
            "div",
            tag("div", label, class_="label"),
            tag("div", value, class_="big"),
            tag("div", remark, class_="remark"),
            class_="card",
        )
        for label, value, remark in facts
    ]
    return tag("div", *made, class_="cards")


def grid(*content: object) -> Markup:
    """Things side by side, as many as fit."""
    return tag("div", *content, class_="grid")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[int] = ()) -> Markup:
    """A table that scrolls in itself where it is too wide; columns in `right` hold numbers."""

    def cell(kind: str, at: int, value: object) -> Markup:
        return tag(kind, value, class_="n") if at in right else tag(kind, value)

    head = tag("tr", *(cell("th", at, column) for at, column in enumerate(columns)))
    body = [tag("tr", *(cell("td", at, value) for at, value in enumerate(row))) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex="0")


def facts(pairs: Mapping[str, object]) -> Markup:
    """Names and values, one below the other."""
    return tag("dl", *(join([tag("dt", name), tag("dd", value)]) for name, value in pairs.items()), class_="facts")


def badge(word: str, kind: str = "") -> Markup:
    """A short word that stands out; `kind` is good, bad, warn, or nothing."""
    return tag("span", word, class_=f"badge {kind}".strip())


def empty(words: str, *hints: object) -> Markup:
    """What is said where there is nothing to show."""
    return tag("div", tag("p", words), *(tag("p", hint, class_="soft") for hint in hints), class_="empty")


def problem(words: str) -> Markup:
    return tag("p", words, class_="problem", role="status")


def fold(summary: object, *content: object, id_: str, is_open: bool = False) -> Markup:
    """A part that opens and closes; it keeps its state when the page is brought up to date."""
    attributes = {"data_fold": id_} | ({"open": ""} if is_open else {})
    return tag("details", tag("summary", summary), *content, **attributes)


def said(words: str, kind: str = "") -> Markup:
    """A text of a model, a tool or a page, as it is."""
    shown = words if len(words) <= MAX_SHOWN_CHARS else f"{words[:MAX_SHOWN_CHARS]}\n… {len(words):,} characters in all"
    return tag("pre", shown, class_=f"said {kind}".strip())


def short(words: str, limit: int = 100) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(words.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def amount(value: float, digits: int = 3) -> str:
    """A number as people write it; a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size and (size >= 1e6 or size < 10**-digits):
        for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
            if size >= limit:
                return f"{value / limit:.3g} {unit}"
        return f"{value:.2g}"
    if value == int(value):
        return f"{value:,.0f}"
    places = max(0, digits - int(math.log10(size))) if size >= 1 else digits
    written = f"{value:,.{places}f}"
    return written.rstrip("0").rstrip(".") if places else written


def percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "–"


def seconds(value: float) -> str:
    """A length of time."""
    if not math.isfinite(value):
        return "–"
    if value < 0.001:
        return f"{value * 1e6:.0f} µs"
    if value < 1:
        return f"{value * 1e3:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    if value < 7200:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h" if value < 172_800 else f"{value / 86_400:.0f} days"


def ago(unix: float, now: float | None = None) -> str:
    """How long ago a time was."""
    if not math.isfinite(unix):
        return "–"
    return f"{seconds(max(0.0, (time.time() if now is None else now) - unix))} ago"


def clock(unix: float) -> str:
    """A time of day on this machine."""
    if not math.isfinite(unix) or not 0 <= unix < 1e11:
        return "–"
    return time.strftime("%H:%M:%S", time.localtime(unix))


def num_bytes(value: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"


def dollars(value: float) -> str:
    return f"{value:,.2f} $" if math.isfinite(value) else "–"


__all__ = [
    "PREFIX", "Markup", "ago", "amount", "badge", "cards", "clock", "dollars", "empty", "facts", "fold", "grid", "join",
    "link", "num_bytes", "path", "percent", "problem", "said", "seconds", "section", "short", "table", "tag", "text",
    "void",
]  # fmt: skip
