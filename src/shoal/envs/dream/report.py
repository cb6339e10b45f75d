"""Dreams as one HTML file: page by page what was expected, what really came, and what differs.

It stands alone: no script, no other file, no address is fetched; light and dark as the reader has it. Pure.

Invariant: whatever a page or a model wrote is shown as text and never read as HTML.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from typing import Any

from shoal.envs.dream.score import Match
from shoal.envs.web.tree import Page

MAX_LINES = 200
"""Of one comparison."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --dim: #667085; --line: #d8dce3; --back: #fff; --card: #f6f7f9;
  --good: #1a7f37; --bad: #c0352b; --come: #e3f5e7; --gone: #fbe5e3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --dim: #98a1b0; --line: #363c47; --back: #14171c;
  --card: #1c2027; --good: #4ac26b; --bad: #f47067; --come: #173322; --gone: #3b1d1d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem; color: var(--ink); background: var(--back);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.dim { color: var(--dim); } .good { color: var(--good); } .bad { color: var(--bad); }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem 1.2rem .25rem 0;
  border-bottom: 1px solid var(--line); } td { font-variant-numeric: tabular-nums; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; padding: 0 .8rem; }
summary { cursor: pointer; padding: .4rem 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: .8rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem .8rem; margin: .3rem 0; font: 12.5px/1.45 ui-monospace, monospace; }
ins { background: var(--come); text-decoration: none; display: block; }
del { background: var(--gone); display: block; } pre span { display: block; }
img { max-width: 100%; border: 1px solid var(--line); border-radius: 6px; }
code { font: 12.5px/1.45 ui-monospace, monospace; }
"""


@dataclass(frozen=True, slots=True)
class Scene:
    """One act in a dream, and what it really led to."""

    act: str
    reason: str
    before: Page
    dreamt: Page
    real: Page
    match: Match
    screenshot: bytes = b""
    """The real page after the act, PNG; empty where none was taken."""


@dataclass(frozen=True, slots=True)
class Story:
    """One dream along a real episode."""

    title: str
    instruction: str
    scenes: tuple[Scene, ...]


def page(
    title: str, facts: Mapping[str, str], tables: Mapping[str, Sequence[Mapping[str, Any]]], stories: Sequence[Story]
) -> str:
    """The whole file.

    Args:
        facts: what was measured and how, shown under the title.
        tables: headings and rows; the keys of a table's first row are its columns.
    """
    return "".join(_page(title, facts, tables, stories))


def _page(
    title: str, facts: Mapping[str, str], tables: Mapping[str, Sequence[Mapping[str, Any]]], stories: Sequence[Story]
) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>"
    yield '<p class="dim">' + " · ".join(f"{escape(k)} {escape(v)}" for k, v in facts.items()) + "</p>"
    for heading, rows in tables.items():
        if rows:
            yield f"<h2>{escape(heading)}</h2>"
            yield from _table(rows)
    if stories:
        yield "<h2>Dreams</h2>"
    for story in stories:
        yield from _story(story)
    yield "</body></html>\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = list(rows[0])
    yield "<table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in columns) + "</tr>\n"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escape(_cell(row.get(name)))}</td>" for name in columns) + "</tr>\n"
    yield "</table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) >= 2 else f"{value:.3f}"
    return str(value)


def _story(story: Story) -> Iterator[str]:
    exact = sum(scene.match.exact == 1 for scene in story.scenes)
    yield f"<details><summary><b>{escape(story.title)}</b> {escape(story.instruction)} "
    yield f'<span class="dim">{exact} of {len(story.scenes)} pages exact</span></summary>\n'
    for number, scene in enumerate(story.scenes, start=1):
        yield from _scene(number, scene)
    yield "</details>\n"


def _scene(number: int, scene: Scene) -> Iterator[str]:
    colour = "good" if scene.match.exact == 1 else "bad"
    yield f"<h3>{number}. <code>{escape(scene.act)}</code></h3>"
    yield f"<p>{escape(scene.reason)} "
    yield f'<span class="{colour}">edit F1 {scene.match.edit_f1:.2f}</span></p><div class="sides">'
    yield f'<div><div class="dim">what the dream changed</div>{_compared(scene.before, scene.dreamt)}</div>'
    if scene.match.exact < 1:
        yield '<div><div class="dim">from the dream (struck out) to what really came</div>'
        yield f"{_compared(scene.dreamt, scene.real)}</div>"
    if scene.screenshot:
        data = b64encode(scene.screenshot).decode()
        yield f'<div><div class="dim">the real page</div><img alt="" src="data:image/png;base64,{data}"></div>'
    yield "</div>\n"


def _compared(old: Page, new: Page) -> str:
    """Two trees, line by line: what went, what came, what stayed."""
    before, after = old.text().split("\n"), new.text().split("\n")
    shown: list[str] = []
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            shown += [f"<span>{escape(line)}</span>" for line in before[i1:i2]]
            continue
        shown += [f"<del>{escape(line)}</del>" for line in before[i1:i2]]
        shown += [f"<ins>{escape(line)}</ins>" for line in after[j1:j2]]
    rest = len(shown) - MAX_LINES
    return f"<pre>{''.join(shown[:MAX_LINES])}{f'… and {rest} more lines' if rest > 0 else ''}</pre>"
