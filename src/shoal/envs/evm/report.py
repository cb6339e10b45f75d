"""An evaluation as one HTML file: the scores, and each episode step by step.

It stands alone: no script, no other file, no address is fetched; light and dark as the reader has it.

Invariant: whatever a model, a contract or a task's file wrote is shown as text and never read as HTML.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from shoal.envs.evm.decoded import number_words
from shoal.envs.evm.evaluation import Act, Played, Turn
from shoal.envs.evm.scores import SCORINGS

MAX_SHOWN_CHARS = 12_000
"""Of one message."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --dim: #667085; --line: #d8dce3; --back: #fff; --card: #f6f7f9;
  --good: #1a7f37; --bad: #c0352b; --accent: #2f5fd0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --dim: #98a1b0; --line: #363c47; --back: #14171c;
  --card: #1c2027; --good: #4ac26b; --bad: #f47067; --accent: #7da7ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem; color: var(--ink); background: var(--back);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1rem 0 .25rem; }
.dim { color: var(--dim); } .good { color: var(--good); } .bad { color: var(--bad); }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .25rem .6rem .25rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { white-space: nowrap; }
.bar { background: var(--line); border-radius: 3px; height: .55rem; min-width: 6rem; margin-top: .45rem; }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--accent); }
details { border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; padding: 0 .8rem; }
details[open] { padding-bottom: .8rem; } details details { background: var(--card); }
summary { cursor: pointer; padding: .4rem 0; display: flex; gap: .8rem; align-items: baseline; }
summary .what { flex: 1; min-width: 0; overflow-wrap: anywhere; }
summary .score { font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem .8rem; margin: .3rem 0; font: 12.5px/1.45 ui-monospace, monospace; }
code { font: 12.5px/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
.turn { border-left: 3px solid var(--line); padding-left: .9rem; margin: .8rem 0; }
"""


def page(title: str, facts: Mapping[str, str], summary: Mapping[str, Any], played: Sequence[Played]) -> str:
    """The whole file.

    Args:
        facts: what was measured and how, shown under the title.
        summary: of `scores.summarise`.
    """
    return "".join(_page(title, facts, summary, played))


def _page(title: str, facts: Mapping[str, str], summary: Mapping[str, Any], played: Sequence[Played]) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>"
    yield '<p class="dim">' + " · ".join(f"{escape(k)} {escape(v)}" for k, v in facts.items()) + "</p>"
    yield "<h2>Scores</h2>"
    yield from _scores(summary)
    if summary["missing"]:
        yield f'<p class="bad">{summary["missing"]} episodes are missing: not played yet, or void.</p>'
    for group in summary["groups"]:
        yield f"<h2>{escape(group)}</h2>\n"
        for one in sorted((p for p in played if p.group == group), key=lambda p: p.key):
            yield from _episode(one)
    yield "</body></html>\n"


def _scores(summary: Mapping[str, Any]) -> Iterator[str]:
    yield '<table><tr><th></th><th class="number">tasks</th>'
    for scoring in SCORINGS:
        yield f'<th class="number">{scoring}</th>'
    yield '<th class="number">of</th><th></th></tr>\n'
    rows = [*summary["splits"].items(), *summary["groups"].items()]
    for name, block in rows:
        title = f"<b>{escape(name)}</b>" if name in summary["splits"] else escape(name)
        yield f'<tr><td>{title}</td><td class="number">{block["tasks"]}</td>'
        for scoring in SCORINGS:
            yield f'<td class="number">{score_words(block, scoring)}</td>'
        share = 100 * block["strict"] / block["maximum"]
        yield f'<td class="number">{block["maximum"]:,}</td>'
        yield f'<td><div class="bar"><i style="width: {share:.1f}%"></i></div></td></tr>\n'
    yield "</table>"


def score_words(block: Mapping[str, Any], scoring: str) -> str:
    """A score and its interval, as the table on the terminal has it, too."""
    interval = block[f"{scoring}_interval"]
    digits = 0 if block["maximum"] > 100 else 1
    ends = f" ({interval[0]:,.{digits}f} to {interval[1]:,.{digits}f})" if interval else ""
    return f"{block[scoring]:,.{digits}f}{ends}"


def _episode(one: Played) -> Iterator[str]:
    colour = "good" if one.strict >= 100 else "bad" if one.strict <= 0 else ""
    yield f'<details><summary><span class="what"><b>{escape(one.task)}</b> '
    yield f'<span class="dim">round {one.round + 1}</span><br>{escape(one.instruction)}</span>'
    yield f'<span class="score {colour}">{one.strict:.0f} strict, {one.paper:.0f} paper</span></summary>\n'
    yield f'<p class="dim">{escape(one.ending)}; steps {one.steps}, at best {one.optimal_steps}; points of checks '
    yield f"{one.points}; tokens {one.tokens}; {one.seconds:.1f} s; seed {one.seed}</p>"
    for number, turn in enumerate(one.turns, start=1):
        yield from _turn(number, turn)
    yield "<h3>Checks</h3><table>"
    for check in one.checks:
        mark, colour = ("✓", "good") if check.passed else ("✗", "bad")
        yield f'<tr><td class="name {colour}">{mark} {escape(check.name)}</td>'
        yield f'<td class="number {colour}">{check.points if check.passed else 0} / {check.points}</td>'
        yield f"<td><code>{escape(check.that)}</code></td></tr>\n"
    yield "</table>"
    if one.holdings:
        yield "<h3>What changed of what the agent holds</h3><table>"
        for name, pair in one.holdings.items():
            before, after = (int(number) for number in pair)
            colour = "good" if after > before else "bad"
            sign = "+" if after > before else ""
            yield f'<tr><td>{escape(name)}</td><td class="number">{number_words(before)}</td>'
            yield f'<td class="number">{number_words(after)}</td>'
            yield f'<td class="number {colour}">{sign}{number_words(after - before)}</td></tr>'
        yield "</table>"
    yield "</details>\n"


def _turn(number: int, turn: Turn) -> Iterator[str]:
    yield f'<div class="turn"><h3>{number}</h3>'
    for message in turn.messages:
        words = f"{message.role}, {len(message.content)} characters"
        if message.role == "system":
            yield f"<details><summary>{escape(words)}</summary><pre>{_text(message.content)}</pre></details>"
        else:
            yield f'<div class="dim">{escape(message.role)}</div><pre>{_text(message.content)}</pre>'
    cut = ", cut off" if turn.finish == "length" else ""
    yield f'<div class="dim">model ({turn.tokens} tokens, {turn.seconds:.1f} s{cut})</div>'
    yield f"<pre>{_text(turn.reply)}</pre>"
    for act in turn.acts:
        yield from _act(act)
    yield "</div>\n"


def _act(act: Act) -> Iterator[str]:
    if act.call:
        mark, colour = ("✓", "good") if act.success else ("✗", "bad")
        outcome = f"in block {act.block}" if act.success else f"reverted: {act.reason}"
        yield f'<div class="{colour}">{mark} <code>{escape(act.call)}</code> {escape(outcome)}</div>'
        for event in act.events:
            yield f'<div class="dim">event <code>{escape(event)}</code></div>'
    elif not act.understood:
        yield f'<div class="bad">✗ {escape(act.feedback)}</div>'
    for asked in act.asked:
        yield f'<div class="dim">asked <code>{escape(asked)}</code></div>'
    if act.wrote and not act.call:
        yield f'<div class="dim">act <code>{escape(act.wrote[:MAX_SHOWN_CHARS])}</code></div>'


def _text(text: str) -> str:
    rest = len(text) - MAX_SHOWN_CHARS
    return escape(text[:MAX_SHOWN_CHARS]) + (f"\n… and {rest:,} more characters" if rest > 0 else "")
