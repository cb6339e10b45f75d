"""Searching the web by a search service of the user's choice, and reading pages."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Annotated, Any
from urllib.parse import quote, urljoin, urlsplit

import httpx
import msgspec
from pydantic import BaseModel, Field

from shoal.agents.builtin.fetch import fetch
from shoal.agents.builtin.text import chunks, html_text
from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool, ToolError
from shoal.agents.tools.toolbox import Callee
from shoal.errors import ConfigError

QUERY = "{query}"
"""Stands in a search service's address for what is looked for."""

MAX_RESULTS = 20
MAX_TEXT_CHARS = 500
LISTS = (("results",), ("items",), ("organic",), ("organic_results",), ("web", "results"), ("data",))
"""Where search services have their results."""

TITLES, ADDRESSES, SNIPPETS = ("title", "name"), ("url", "link", "href"), ("content", "snippet", "description", "text")
"""What they call a result's parts."""

Address = Annotated[str, Field(min_length=8, max_length=2000, description="with http:// or https://")]


class Result(BaseModel):
    """A page that a search found."""

    title: str
    url: str
    snippet: str


class Page(BaseModel):
    """A part of a page's text."""

    url: str
    chunk: int
    chunks: int
    """How many the page has."""
    text: str


def web_tools(search_url: str = "", allow: Sequence[str] = ()) -> Sequence[Callee]:
    """Tools that search and read the web.

    Args:
        search_url: a SearXNG instance, or any service's address with `{query}` in it; without one nothing is searched.
        allow: hosts that may be read although they are not public.

    Raises:
        ConfigError: the search service's address is none.
    """

    async def read_page(url: Address, chunk: Annotated[int, Field(ge=0, description="from 0")] = 0) -> Page:
        """One chunk of a web page's text, and how many there are; read the others at the same time."""
        found = await fetch(url, allow=allow)
        if found.kind not in ("text/html", "application/xhtml+xml") and not found.kind.startswith("text/"):
            raise ToolError(f"{url} is no page of text but {found.kind or 'of no kind that is known'}")
        parts = chunks(html_text(found.text) if found.kind.endswith(("html", "xml")) else found.text)
        if chunk >= len(parts):
            raise ToolError(f"{url} has {len(parts)} chunks, counted from 0")
        return Page(url=found.url, chunk=chunk, chunks=len(parts), text=parts[chunk])

    use = Use(idempotent=True, max_concurrency=8, timeout_s=60)
    if not search_url:
        return [FunctionTool(read_page, use)]
    service = _service(search_url)

    async def search_web(
        query: Annotated[str, Field(min_length=1, max_length=500)],
        count: Annotated[int, Field(ge=1, le=MAX_RESULTS)] = 5,
    ) -> list[Result]:
        """Search the web; returns titles, addresses and a few words of the pages that fit best."""
        found = await fetch(service.replace(QUERY, quote(query, safe="")), allow=[*allow, urlsplit(service).netloc])
        return read_results(found.text, found.url)[:count]

    return [FunctionTool(search_web, use), FunctionTool(read_page, use)]


def _service(given: str) -> str:
    url = given if QUERY in given else f"{given.rstrip('/')}/search?q={QUERY}&format=json"
    try:
        parsed = httpx.URL(url.replace(QUERY, "x"))
    except httpx.InvalidURL as error:
        raise ConfigError(f"{given!r} is no address of a search service: {error}.") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(
            f"{given!r} is no address of a search service.",
            f"Name a SearXNG instance, or an address with {QUERY} in it.",
        )
    return url


def read_results(text: str, url: str) -> list[Result]:
    """Results out of a service's answer: JSON as services have it, else the links of a page."""
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return _links(text, url)
    for path in LISTS:
        listed: Any = found
        for key in path:
            listed = listed.get(key) if isinstance(listed, dict) else None
        if isinstance(listed, list):
            made = (_result(one, url) for one in listed if isinstance(one, dict))
            return [one for one in made if one is not None]
    raise ToolError("the search service's answer has no list of results")


def _result(entry: dict[str, Any], base: str) -> Result | None:
    address = _first(entry, ADDRESSES)
    if not address:
        return None
    return Result(title=_first(entry, TITLES), url=urljoin(base, address), snippet=_first(entry, SNIPPETS))


def _first(entry: dict[str, Any], names: Sequence[str]) -> str:
    found = next((entry[name] for name in names if isinstance(entry.get(name), str)), "")
    return " ".join(found.split())[:MAX_TEXT_CHARS]


class _Anchors(HTMLParser):
    """Links with their words."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._address = ""
        self._words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self._address, self._words = dict(attrs).get("href") or "", []

    def handle_data(self, data: str) -> None:
        self._words.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "a" and self._address:
            self.found.append((self._address, " ".join("".join(self._words).split())))
            self._address = ""


def _links(page: str, base: str) -> list[Result]:
    """The links of a page that lead to other hosts: what a page of results has besides its own furniture."""
    anchors = _Anchors()
    anchors.feed(page)
    anchors.close()
    own = urlsplit(base).netloc
    found: dict[str, Result] = {}
    for address, words in anchors.found:
        url = urljoin(base, address)
        parts = urlsplit(url)
        if words and parts.scheme in ("http", "https") and parts.netloc != own:
            found.setdefault(url, Result(title=words[:MAX_TEXT_CHARS], url=url[:2000], snippet=""))
    return list(found.values())
