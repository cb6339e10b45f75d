"""Task files of WebArena and WebVoyager: what is asked, where it begins, and what an answer or a page is compared with.

WebArena's file is a JSON list, WebVoyager's has one JSON object a line. Pages are the user's own servers, or the web.

1. A locator of WebArena that is a function of its own helpers (`func:…`) cannot be computed here; such a task is left
   out and counted, and so is one that needs a judge where there is none.
2. Scores are WebArena's: each check gives 0 or 1, and all must hold; its fuzzy comparison is a judge's yes or no.

Invariant: reading a file runs nothing; every text is bounded.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from shoal.errors import TaskError

MAX_FILE_BYTES = 64 * 2**20
MAX_TEXT_CHARS = 20_000
OR = " |OR| "
NOT_POSSIBLE = "N/A"
"""What WebArena wants to hear, and nothing like it, where a task cannot be done."""


@dataclass(frozen=True, slots=True)
class Words:
    """What a text must be like: all of these."""

    exact: str | None = None
    included: tuple[str, ...] = ()
    like: tuple[str, ...] = ()
    """What it must mean; a judge's to say."""


@dataclass(frozen=True, slots=True)
class PageCheck:
    """A page that must say something in the end."""

    url: str
    """Empty: the page where the agent is."""
    locator: str
    """JavaScript that gives the text; empty: all of the page's HTML."""
    words: Words


@dataclass(frozen=True, slots=True)
class HostedTask:
    """One task on somebody's servers."""

    id: str
    start: str
    instruction: str
    answer: Words | None = None
    urls: tuple[str, ...] = ()
    """Addresses of which the last page must have one; empty: any will do."""
    pages: tuple[PageCheck, ...] = ()
    judged: bool = False
    """Whether it was done is a judge's to say: nothing is there to be compared."""

    @property
    def needs_judge(self) -> bool:
        return self.judged or bool(self.answer and self.answer.like)


@dataclass(frozen=True, slots=True)
class Hosted:
    """The tasks of a file, and why others were left out."""

    tasks: tuple[HostedTask, ...]
    left_out: Mapping[str, int]


def read_hosted(path: Path, sites: Mapping[str, str], *, judge: bool) -> Hosted:
    """The tasks of a file.

    Args:
        sites: WebArena's names of sites (`shopping`, `reddit`, …) and the addresses where they are.
        judge: whether there is one.

    Raises:
        TaskError: the file cannot be read, is of neither kind, or no task of it is left.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TaskError(f"{path} has more than {MAX_FILE_BYTES >> 20} MiB.")
        text = path.read_text(encoding="utf-8")
        items = (
            json.loads(text) if text.lstrip().startswith("[") else [json.loads(one) for one in text.splitlines() if one]
        )
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}.", "Give the path of a task file.") from None
    except ValueError:
        raise TaskError(f"{path} is no JSON.", "Give a task file of WebArena or WebVoyager.") from None
    left_out: dict[str, int] = {}
    tasks = []
    for place, item in enumerate(items):
        try:
            task = _arena(item, sites) if "intent" in item else _voyager(item)
        except _LeftOutError as reason:
            left_out[str(reason)] = left_out.get(str(reason), 0) + 1
            continue
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise TaskError(f"{path}, task {place} lacks {error}.", "Is it a WebArena or WebVoyager file?") from None
        if task.needs_judge and not judge:
            left_out["needs a judge"] = left_out.get("needs a judge", 0) + 1
        else:
            tasks.append(task)
    if not tasks:
        raise TaskError(
            f"{path} has no task that can be asked: {left_out or 'it is empty'}.", "Name its sites, a judge."
        )
    return Hosted(tuple(tasks), left_out)


class _LeftOutError(Exception):
    """Why a task cannot be asked."""


def _arena(item: Mapping[str, Any], sites: Mapping[str, str]) -> HostedTask:
    """One of WebArena's."""

    def placed(text: str) -> str:
        for name in re.findall(r"__([A-Z_]+?)__", text):
            if name.lower() not in sites:
                raise _LeftOutError(f"site {name.lower()} is not named")
            text = text.replace(f"__{name}__", sites[name.lower()].rstrip("/"))
        return text[:MAX_TEXT_CHARS]

    wanted = item["eval"]
    kinds = wanted["eval_types"]
    if unknown := set(kinds) - {"string_match", "url_match", "program_html"}:
        raise _LeftOutError(f"{sorted(unknown)[0]} is not known")
    answer = _words(wanted["reference_answers"] or {}) if "string_match" in kinds else None
    urls = tuple(placed(wanted["reference_url"]).split(OR)) if "url_match" in kinds else ()
    pages = [_page_check(one, placed) for one in (wanted.get("program_html") or [])] if "program_html" in kinds else []
    return HostedTask(
        id=str(item["task_id"]),
        start=placed(item["start_url"]).split(" |AND| ")[0],
        instruction=str(item["intent"])[:MAX_TEXT_CHARS],
        answer=answer,
        urls=urls,
        pages=tuple(pages),
    )


def _page_check(one: Mapping[str, Any], placed: Any) -> PageCheck:
    url, locator = str(one["url"]), str(one.get("locator") or "")
    if url.startswith("func:") or locator.startswith("func:"):
        raise _LeftOutError("a check is a function of WebArena's helpers")
    return PageCheck("" if url == "last" else placed(url), locator, _words(one["required_contents"]))


def _words(wanted: Mapping[str, Any]) -> Words:
    like = wanted.get("fuzzy_match", ())
    exact = wanted.get("exact_match")
    if like == NOT_POSSIBLE:
        exact, like = NOT_POSSIBLE, ()
    return Words(
        exact=None if exact is None else str(exact)[:MAX_TEXT_CHARS],
        included=tuple(str(one)[:MAX_TEXT_CHARS] for one in wanted.get("must_include", ())),
        like=(like,) if isinstance(like, str) else tuple(map(str, like)),
    )


def _voyager(item: Mapping[str, Any]) -> HostedTask:
    """One of WebVoyager's."""
    return HostedTask(
        id=str(item["id"]), start=str(item["web"]), instruction=str(item["ques"])[:MAX_TEXT_CHARS], judged=True
    )


def clean(text: str) -> str:
    """As WebArena compares: without quotes around it, in lower case."""
    text = text.strip()
    for mark in "'\"":
        if len(text) > 1 and text.startswith(mark) and text.endswith(mark):
            text = text[1:-1]
    return text.lower()


def holds(words: Words, said: str) -> bool:
    """Whether a text is what it must be, but for what a judge has to say."""
    said = clean(html.unescape(said))
    if words.exact is not None and clean(words.exact) != said:
        return False
    return all(any(clean(one) in said for one in phrase.split(OR)) for phrase in words.included)


def is_at(url: str, wanted: Sequence[str]) -> bool:
    """Whether an address is one of those wanted: the same place, and every parameter of its query with its value."""
    return not wanted or any(_covers(url, one) for one in wanted)


def _covers(url: str, wanted: str) -> bool:
    here, there = urlsplit(url), urlsplit(wanted)
    if (here.netloc, here.path.rstrip("/")) != (there.netloc, there.path.rstrip("/")):
        return False
    query = parse_qs(here.query)
    return all(set(values) & set(query.get(name, ())) for name, values in parse_qs(there.query).items())


def hosts(tasks: Sequence[HostedTask], sites: Mapping[str, str]) -> Iterator[str]:
    """The hosts that these tasks begin on, and their sites: what pages may reach."""
    for url in dict.fromkeys([*sites.values(), *(task.start for task in tasks)]):
        yield urlsplit(url).netloc
