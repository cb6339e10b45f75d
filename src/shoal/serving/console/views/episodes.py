"""Episodes step by step: what was read, what was done, what it earned; pages as trees, JSON laid out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from shoal.envs.web.tree import Node, read_line
from shoal.errors import RecordError
from shoal.protocol.episode import Episode, Turn
from shoal.serving.console.episodes import MAX_LISTED, Listed, episode, listed, search, steps
from shoal.serving.console.house import House, Watched
from shoal.serving.console.html import (
    Markup,
    amount,
    badge,
    cards,
    clock,
    empty,
    fold,
    join,
    link,
    problem,
    said,
    seconds,
    section,
    short,
    table,
    tag,
)

MAX_TURNS = 200
MAX_NODES = 3000
MAX_JSON_CHARS = 20_000
MAX_DEPTH = 64
"""Of the tree that is shown; what is deeper stands at this level."""

OPEN_DEPTH = 4
"""Levels of a page's tree that are open at first."""


def render(house: House, query: Mapping[str, str]) -> Markup:
    """The page's parts."""
    run = house.run(query.get("run", ""))
    if run is None or run.folder is None:
        return empty("There is no run's folder here.", "Name one: shoal console runs/NAME.")
    folder = run.folder.path
    known = steps(folder)
    if not known:
        return empty("No episode has been trained on yet.", "They are kept where output.keep_episodes is true.")
    step, index = number(query.get("step")), number(query.get("episode"))
    step = known[-1] if step is None or step not in known else step
    words = query.get("q", "")
    parts: list[Markup] = []
    if index is not None:
        found = episode(folder, step, index)
        parts.append(problem("There is no such episode.") if found is None else _one(run, step, index, found))
    rows = search(folder, words) if words else listed(folder, step)
    title = f"Episodes with “{short(words, 40)}”" if words else f"Episodes of step {step}"
    parts.append(section(title, _steps(run, known, step), _rows(run, rows), id_=f"list-{step}"))
    return join(parts)


def number(text: str | None) -> int | None:
    """A small whole number, or None."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else None


def _steps(run: Watched, known: Sequence[int], step: int) -> Markup:
    at = known.index(step)
    near = sorted({known[0], *known[max(0, at - 3) : at + 4], known[-1]})
    made = [
        tag("b", f"step {one}") if one == step else link(f"step {one}", "episodes", run=run.name, step=one)
        for one in near
    ]
    return tag("p", *(part for one in made for part in (one, " ")), class_="picks")


def _rows(run: Watched, found: Sequence[Listed]) -> Markup:
    if not found:
        return empty("None was found.")
    rows = [
        (
            link(f"{one.step}/{one.index}", "episodes", run=run.name, step=one.step, episode=one.index),
            one.env,
            short(one.task, 40),
            _reward(one.outcome, one.reward),
            one.turns,
            one.tokens,
            one.version,
            short(one.asked, 90),
        )
        for one in found
    ]
    note = tag("p", f"The first {MAX_LISTED} are shown.", class_="soft") if len(found) == MAX_LISTED else join([])
    columns = ("episode", "environment", "task", "reward", "turns", "tokens", "version", "asked")
    return join([table(columns, rows, right=(3, 4, 5, 6)), note])


def _reward(outcome: str, reward: float) -> Markup:
    if outcome == "void":
        return badge("void", "warn")
    return badge(amount(reward), "good" if reward >= 1 else "bad" if reward <= 0 else "")


def _one(run: Watched, step: int, index: int, found: Episode) -> Markup:
    took = found.finished_at - found.started_at
    head = cards([
        ("reward", _reward(found.outcome, found.reward), found.void_reason or found.outcome),
        ("environment", found.task.env, short(found.task.id, 60)),
        ("turns", len(found.turns), f"{found.num_tokens} tokens drawn"),
        ("policy version", found.version, f"temperature {found.temperature:g}"),
        ("time", seconds(took) if took >= 0 else "–", clock(found.started_at)),
        ("number", found.index, f"of {short(found.group, 24)}"),
        ("worker", found.worker[:8] or "–", short(found.worker[8:], 24)),
    ])  # fmt: skip
    near = [
        link(words, "episodes", run=run.name, step=step, episode=other)
        for words, other in (("← before", index - 1), ("after →", index + 1))
        if other >= 0
    ]
    picks = tag("p", *(part for one in near for part in (one, " ")), class_="picks")
    turns = [_turn(at, turn, found.parents[at]) for at, turn in enumerate(found.turns[:MAX_TURNS])]
    output = join([tag("h3", "What its program gave"), said(found.output)]) if found.output else join([])
    return section(
        f"Episode {step}/{index}",
        picks,
        head,
        _checks(found.reward_parts),
        *turns,
        output,
        id_=f"episode-{step}-{index}",
    )


def _checks(parts: Mapping[str, float]) -> Markup:
    """What the reward consists of: checks that hold or don't, and other numbers."""
    if not parts:
        return join([])
    made = []
    for name, value in parts.items():
        mark = "✓" if value >= 1 else "✗" if value == 0 else amount(value)
        made.append(badge(f"{mark} {name}", "good" if value >= 1 else "bad" if value == 0 else ""))
        made.append(Markup(" "))
    return tag("p", tag("span", "Checks and parts of the reward: ", class_="soft"), *made, class_="picks")


def _turn(at: int, turn: Turn, parent: int) -> Markup:
    completion = turn.completion
    mean = sum(completion.logprobs) / len(completion.logprobs) if completion.logprobs else 0.0
    notes = [
        f"{len(turn.context_ids)} tokens read",
        f"{len(completion.token_ids)} drawn",
        f"ended: {completion.finish}",
    ]
    notes += [f"mean log-probability {mean:.2f}", f"version {min(completion.versions, default=0)}"]
    if parent not in (-1, at - 1):
        notes.append(f"continues turn {parent + 1}")
    if turn.grammar is not None:
        notes.append(f"held to a grammar ({turn.grammar.kind})")
    return tag(
        "article",
        tag("h3", f"Turn {at + 1} ", tag("small", ", ".join(notes))),
        observed(turn.observation, f"turn-{at}"),
        acted(completion.text),
        class_="turn",
    )


def observed(text: str, id_: str) -> Markup:
    """What the environment said: a page as its tree, anything else as it is."""
    return page(text, id_) or said(text, "read")


def acted(text: str) -> Markup:
    """What the model wrote; JSON laid out."""
    if text[:1] in "{[" and len(text) <= MAX_JSON_CHARS:
        try:
            return said(json.dumps(json.loads(text), indent=2, ensure_ascii=False), "acted")
        except (ValueError, RecursionError):
            pass
    return said(text, "acted")


def page(text: str, id_: str) -> Markup | None:
    """An observation of a web page as a tree that opens and closes; None where it is none.

    Lines that are no nodes (the agent's last act, marks of what was cut off) stay as they are.
    """
    at = text.find("URL: ")
    if at < 0 or (at > 0 and text[at - 1] != "\n"):
        return None
    before, lines = text[:at].strip(), text[at:].split("\n")
    entries: list[tuple[int, Node | str]] = []
    for line in lines[1:MAX_NODES]:
        try:
            entries.append(read_line(line))
        except RecordError:
            entries.append((1, line))
    if not any(isinstance(node, Node) for _, node in entries):
        return None
    made = [said(before, "read")] if before else []
    made += [tag("p", tag("code", lines[0]), class_="soft"), tag("ul", *_branches(entries, 0, id_)[0], class_="page")]
    return tag("div", *made, class_="said read")


def _branches(entries: Sequence[tuple[int, Node | str]], at: int, id_: str) -> tuple[list[Markup], int]:
    """The nodes from `at` on that are at least as deep, and where the next begins."""
    depth, made = entries[at][0], []
    while at < len(entries) and entries[at][0] >= depth:
        node, number_ = entries[at][1], at
        at += 1
        label = _label(node)
        if at < len(entries) and entries[at][0] > entries[number_][0] and entries[number_][0] < MAX_DEPTH:
            inner, at = _branches(entries, at, id_)
            is_open = entries[number_][0] < OPEN_DEPTH
            made.append(tag("li", fold(label, tag("ul", *inner), id_=f"{id_}-{number_}", is_open=is_open)))
        else:
            made.append(tag("li", label))
    return made, at


def _label(node: Node | str) -> Markup:
    if isinstance(node, str):
        return tag("span", node, class_="soft")
    parts: list[object] = [tag("code", f"[{node.id}] ") if node.id else "", tag("b", node.role), f" {node.name}"]
    if node.value:
        parts.append(tag("code", f" = {node.value}"))
    parts += [join([" ", badge(state)]) for state in node.states]
    return tag("span", *parts)
