"""What the sites share: from a request to a page, and HTML written so that nothing in it is markup by accident.

Invariants: a site's pages and state depend on its seeds and the requests alone; a request that makes no sense is
answered by a page, and changes nothing; only POST changes state, and what answers it is another page to go to, so that
going back never sends a form again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from random import Random
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, urlencode

from shoal.envs.base import stable_int
from shoal.envs.web.gate import Request, Response
from shoal.envs.web.sites.words import people

MAX_FIELDS = 32
MAX_FIELD_CHARS = 500
REFUSED = "refused"
"""Path of the page that says why something was not done."""
NUM_VISITORS = 4
"""Who comes back to a site that is about the same in every episode."""

Form = Mapping[str, str]


class Refused(Exception):
    """What was asked cannot be done; its text is shown on the page."""


class Site(ABC):
    """One site as it stands for one episode.

    Args:
        seed: of what differs from episode to episode.
        content: seed of what the site is about (its products, threads, articles, accounts). Absent: `seed`, so that
            every episode has a site of its own; the same for all, and it is one site that many episodes visit. Each
            then is of one of its few visitors, who finds what they left behind, as it was.
    """

    host: ClassVar[str]
    title: ClassVar[str]
    menu: ClassVar[Mapping[str, str]]
    """Path -> words of the links that every page has."""
    personal: ClassVar[bool] = False
    """Pages depend on who visits; the menu says who does."""

    def __init__(self, seed: int, content: int | None = None) -> None:
        self.seed = seed
        self.content = content
        about = seed if content is None else content
        which = stable_int("visitor", self.host, seed) % NUM_VISITORS
        left = ("site", self.host, seed) if content is None else ("left behind", self.host, content, which)
        self.visitor = people(Random(stable_int("visitors", self.host, about)), NUM_VISITORS)[which]
        self.fill(Random(stable_int(*left)), Random(stable_int("content", self.host, about)))

    @abstractmethod
    def fill(self, rng: Random, content: Random) -> None:
        """Set the state that the two seeds stand for: what the visitor left behind, and what the site is about."""

    @abstractmethod
    def state(self) -> Any:
        """All that requests can change, as a value to compare."""

    @abstractmethod
    def show(self, path: Sequence[str], query: Form) -> tuple[str, str] | None:
        """Title and body of a page; None where there is none. Changes nothing."""

    @abstractmethod
    def submit(self, path: Sequence[str], form: Form) -> str | None:
        """Do what a form asks; where to go then; None where there is no such form.

        Raises:
            Refused: it cannot be done.
        """

    @property
    def start(self) -> str:
        """Where an episode begins."""
        return f"http://{self.host}/"

    def __call__(self, request: Request) -> Response:
        path = [part for part in request.path.split("/") if part]
        if request.method == "POST":
            try:
                onward = self.submit(path, _fields(request.body.decode("utf-8", "replace")))
            except Refused as refused:
                onward = f"/{REFUSED}?{urlencode({'why': str(refused)})}"
            if onward is not None:
                return Response(status=303, location=onward)
        elif path == [REFUSED]:
            return self._page("That did not work", text(_fields(request.query).get("why", "")))
        else:
            found = self.show(path, _fields(request.query))
            if found is not None:
                return self._page(*found)
        return self._page("Not found", text("There is no such page."), 404)

    def _page(self, title: str, body: str, status: int = 200) -> Response:
        links = " ".join(link(path, words) for path, words in self.menu.items())
        who = f' aria-label="{escape(self.visitor)}"' if self.personal else ""
        html = (
            f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title></head>"
            f"<body><nav{who}>{links}</nav><h1>{escape(title)}</h1>{body}</body></html>"
        )
        return Response(html.encode(), status)


def _fields(encoded: str) -> dict[str, str]:
    """The fields of a form, the first of each name, without outer white space."""
    try:
        found = parse_qs(encoded, keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError:
        return {}
    return {name: " ".join(values[0].split())[:MAX_FIELD_CHARS] for name, values in found.items()}


def text(words: object) -> str:
    """A paragraph."""
    return f"<p>{escape(str(words))}</p>"


def heading(words: str) -> str:
    return f"<h2>{escape(words)}</h2>"


def link(path: str, words: str) -> str:
    return f'<a href="{escape(path)}">{escape(words)}</a>'


def lines(items: Iterable[str]) -> str:
    """HTML pieces, one below the other."""
    return "".join(f"<div>{item}</div>" for item in items)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML."""
    top = "".join(f"<th>{escape(one)}</th>" for one in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def cell(words: object) -> str:
    return escape(str(words))


def field(label: str, name: str, value: str = "", kind: str = "text") -> str:
    return f'<div><label>{escape(label)} <input type={kind} name={name} value="{escape(value)}"></label></div>'


def hidden(name: str, value: str) -> str:
    return f'<input type=hidden name={name} value="{escape(value)}">'


def area(label: str, name: str, value: str = "") -> str:
    return f"<div><label>{escape(label)} <textarea name={name}>{escape(value)}</textarea></label></div>"


def tick(label: str, name: str, ticked: bool = False) -> str:
    mark = " checked" if ticked else ""
    return f"<div><label><input type=checkbox name={name} value=yes{mark}> {escape(label)}</label></div>"


def choice(label: str, name: str, options: Iterable[str], chosen: str = "") -> str:
    inner = "".join(f"<option{' selected' if one == chosen else ''}>{escape(one)}</option>" for one in options)
    return f"<div><label>{escape(label)} <select name={name}>{inner}</select></label></div>"


def form(action: str, *fields: str, button: str, method: str = "post") -> str:
    """A form with one button."""
    return f'<form action="{escape(action)}" method={method}>{"".join(fields)}<button>{escape(button)}</button></form>'


def slug(words: str) -> str:
    """Words as a part of a path."""
    return quote(words.lower().replace(" ", "-"), safe="-")


def pick(items: Sequence[Any], number: str) -> Any:
    """The item with this number, or None."""
    return items[int(number)] if number.isdecimal() and int(number) < len(items) else None
