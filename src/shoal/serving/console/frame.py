"""What stands around every view: navigation, search, theme, help; and the log-in page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoal.serving.console.house import VIEWS
from shoal.serving.console.html import PREFIX, Markup, join, path, tag, void

SEARCHED = {"agents": "tasks", "memory": "memories", "episodes": "episodes"}
"""Views that can be searched, and for what."""

OF_A_RUN = ("overview", "run", "swarm", "episodes")

SHORTCUTS = (
    ("1 – 7", "go to a view"),
    ("/", "search"),
    ("t", "dark or light"),
    ("?", "this help"),
    ("Esc", "close it"),
)


def page(
    view: str,
    parts: Markup,
    *,
    marks: Mapping[str, str],
    nonce: str,
    theme: str,
    token: str,
    last: str,
    query: Mapping[str, str],
    runs: Sequence[str],
    keyed: bool,
) -> Markup:
    """A whole page."""
    body = join([
        tag("a", "Skip to the content", href="#main", class_="skip"),
        _top(view, query, runs, keyed),
        tag("main", parts, id="main", tabindex="-1"),
        _help(),
        tag("div", "", id="state", class_="state", role="status", title="whether this page is up to date"),
    ])  # fmt: skip
    attributes = {"data_view": view, "data_token": token, "data_last": last}
    return _document(f"{view.capitalize()} · Shoal", body, marks, nonce, theme, attributes)


def login_page(marks: Mapping[str, str], nonce: str, theme: str, *, wrong: bool) -> Markup:
    """Asks for a key."""
    form = tag(
        "form",
        tag("h1", "Shoal"),
        tag("p", "This key is not known here.", class_="problem", role="alert") if wrong else join([]),
        tag("label", "API key ", void("input", type="password", name="key", required="", autofocus="",
                                      autocomplete="current-password")),
        tag("button", "Log in", type="submit"),
        tag("p", "Made by shoal console --new-key NAME; for a server by shoal serve --new-key NAME.", class_="soft"),
        method="post",
        action=f"{PREFIX}/login",
        class_="login",
    )  # fmt: skip
    return _document("Log in · Shoal", tag("main", form), marks, nonce, theme, {})


def _document(
    title: str, body: Markup, marks: Mapping[str, str], nonce: str, theme: str, attributes: Mapping[str, str]
) -> Markup:
    def asset(name: str) -> str:
        return f"{PREFIX}/asset/{name}?v={marks[name]}"

    head = tag(
        "head",
        void("meta", charset="utf-8"),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        void("link", rel="icon", href=asset("icon.svg"), type="image/svg+xml"),
        void("link", rel="stylesheet", href=asset("console.css")),
        tag("script", "", src=asset("console.js"), nonce=nonce, defer=""),
    )
    html = tag("html", head, tag("body", body, **attributes), lang="en", **({"data_theme": theme} if theme else {}))
    return join([Markup("<!doctype html>\n"), html])


def _top(view: str, query: Mapping[str, str], runs: Sequence[str], keyed: bool) -> Markup:
    run = query.get("run", "")
    items = []
    for number, name in enumerate(VIEWS, start=1):
        kept = {"run": run} if name in OF_A_RUN else {}
        here = {"aria_current": "page"} if name == view else {}
        items.append(
            tag("li", tag("a", tag("kbd", str(number)), " ", name.capitalize(), href=path(name, **kept), **here))
        )
    tools: list[Markup] = []
    if len(runs) > 1 and view in OF_A_RUN:
        options = [
            tag("option", name, value=name, **({"selected": ""} if name == run else {})) for name in runs
        ]  # fmt: skip
        tools.append(tag("select", *options, name="run", aria_label="Run", data_goes=""))
    if view in SEARCHED:
        found = void("input", type="search", name="q", value=query.get("q", ""), maxlength="200",
                     placeholder=f"Search {SEARCHED[view]}  /", aria_label=f"Search {SEARCHED[view]}")  # fmt: skip
        hidden = [void("input", type="hidden", name="run", value=run)] if run else []
        tools.append(tag("form", found, *hidden, class_="search", role="search", action=f"{PREFIX}/{view}"))
    tools.append(
        tag("button", "◐", type="button", data_do="theme", title="Dark or light (t)", aria_label="Dark or light")
    )
    tools.append(tag("button", "?", type="button", data_do="help", title="Help (?)", aria_label="Help"))
    if keyed:
        tools.append(tag("button", "Log out", type="button", data_do="logout"))
    return tag(
        "header",
        tag("a", "Shoal", href=PREFIX, class_="brand"),
        tag("nav", tag("ul", *items), aria_label="Views"),
        tag("div", *tools, class_="tools"),
        class_="top",
    )


def _help() -> Markup:
    rows = [join([tag("dt", tag("kbd", key)), tag("dd", words)]) for key, words in SHORTCUTS]
    close = tag("button", "Close", type="button", data_do="close")
    return tag("dialog", tag("h2", "Keys"), tag("dl", *rows, class_="facts"), close, id="help", aria_label="Help")
