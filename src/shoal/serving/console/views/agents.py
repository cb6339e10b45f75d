"""Runs of agents: what each decided, its calls in lanes over time, tries that were repeated."""

from __future__ import annotations

import math
from collections.abc import Mapping

from shoal.serving.console.charts import stripe
from shoal.serving.console.house import House
from shoal.serving.console.html import (
    Markup,
    ago,
    amount,
    badge,
    cards,
    dollars,
    empty,
    facts,
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
from shoal.serving.console.traces import Decided, Lane, Trace

MAX_LANES_SHOWN = 150
MAX_STEPS_SHOWN = 200
MAX_CALLS_IN_TREE = 40
MARKS = {"done": "✓", "running": "▶", "waits to try again": "↻", "asks for approval": "?"}


def render(house: House, query: Mapping[str, str]) -> Markup:
    """The page's parts."""
    log = house.agents
    if log is None or (not log.runs and not log.problem):
        return empty("No agent has run here yet.", 'Start one: shoal agent "TASK".', "Or name its log: --agents FILE.")
    parts = [problem(log.problem)] if log.problem else []
    chosen = query.get("agent", "") or (log.runs[0].id if log.runs else "")
    wanted = query.get("q", "").casefold()
    rows = []
    for run in log.runs:
        if wanted and wanted not in run.task.casefold() and wanted not in run.id:
            continue
        kind = {"final": "good", "error": "bad"}.get(run.state, "warn")
        name = tag("b", run.id) if run.id == chosen else run.id
        rows.append((link(name, "agents", agent=run.id), badge(run.state, kind), short(run.task, 90), ago(run.started)))
    trace = log.trace(chosen) if chosen else None
    if trace is not None:
        parts += _trace(trace)
    parts.append(section("Runs", table(("run", "state", "task", "begun"), rows, right=(3,)), id_="runs"))
    return join(parts)


def _trace(trace: Trace) -> list[Markup]:
    length = trace.newest - trace.started if math.isfinite(trace.started) else 0.0
    calls_s = sum(a.ended - a.started for lane in trace.lanes.values() for a in lane.attempts if math.isfinite(a.ended))
    at_once = f"{calls_s / length:.1f} × as fast as one by one" if length > 0 and calls_s > length else ""
    head = cards([
        ("state", badge(trace.end or "open", {"final": "good", "error": "bad"}.get(trace.end, "warn")), trace.run),
        ("decisions", amount(trace.num_steps), ""),
        ("calls", amount(trace.num_calls), f"{trace.num_done} ended, {trace.num_failed} failed"),
        ("tries repeated", amount(trace.num_retries), ""),
        ("at once", amount(trace.num_at_once), at_once or "calls at most"),
        ("tokens", amount(trace.tokens), dollars(trace.usd) if trace.usd else ""),
        ("time", seconds(length), ""),
    ])  # fmt: skip
    parts = [section("Task", said(trace.task), head, id_="task")]
    if trace.end:
        parts.append(section("Answer", said(trace.answer, "good" if trace.end == "final" else "bad"), id_="answer"))
    parts.append(section("Calls over time", _lanes(trace), id_="lanes"))
    parts.append(section("Decisions", _tree(trace), id_="tree"))
    return parts


def _lanes(trace: Trace) -> Markup:
    if not trace.lanes:
        return empty("Nothing was called.")
    start, length = trace.started, max(1e-6, trace.newest - trace.started)

    def share(time: float) -> float:
        return min(1.0, max(0.0, (time - start) / length))

    rows = []
    for lane in list(trace.lanes.values())[:MAX_LANES_SHOWN]:
        ended = lane.ended if math.isfinite(lane.ended) else trace.newest
        first = lane.attempts[0].started if lane.attempts else ended
        spans = [(share(lane.planned), share(first), "span waits", f"waits {seconds(first - lane.planned)}")]
        before = math.nan
        for number, attempt in enumerate(lane.attempts, start=1):
            if math.isfinite(before):
                spans.append((share(before), share(attempt.started), "span waits", "waits to try again"))
            ended = attempt.ended if math.isfinite(attempt.ended) else trace.newest
            kind = "fails" if attempt.error else "works" if math.isfinite(attempt.ended) else "runs"
            words = f"try {number}: {seconds(ended - attempt.started)} {short(attempt.error, 200)}".rstrip()
            spans.append((share(attempt.started), share(ended), f"span {kind}", words))
            before = ended
        took = seconds(lane.ended - lane.planned) if math.isfinite(lane.ended) else lane.phase
        tries = badge(f"{lane.num_attempts} tries", "warn") if lane.num_attempts > 1 else ""
        name = tag("span", tag("b", lane.tool), " ", tag("small", lane.id), title=short(lane.arguments, 300))
        rows.append(tag("div", name, stripe(spans), tag("span", took, " ", tries), class_="lane"))
    rest = trace.num_calls - len(rows)
    note = tag("p", f"{rest} further calls are not drawn.", class_="soft") if rest > 0 else join([])
    keys = [tag("span", word, class_=f"key span-{word.split()[0]}") for word in ("works", "fails", "runs", "waits")]
    axis = tag("div", tag("span", "0 s"), tag("span", seconds(length)), class_="axis")
    return tag("div", tag("div", *keys, class_="legend"), axis, *rows, note, class_="lanes")


def _tree(trace: Trace) -> Markup:
    made = [_step(trace, number, one) for number, one in enumerate(trace.steps[:MAX_STEPS_SHOWN], start=1)]
    if trace.num_steps > len(made):
        made.append(tag("li", f"… {trace.num_steps - len(made)} further decisions", class_="soft"))
    return tag("ol", *made, class_="tree")


def _step(trace: Trace, number: int, one: Decided) -> Markup:
    words = one.problem or one.thought or ("answers" if one.answer is not None else "calls")
    kind = "bad" if one.problem else ""
    calls = [_call(trace.lanes[name]) for name in one.calls[:MAX_CALLS_IN_TREE] if name in trace.lanes]
    if len(one.calls) > len(calls):
        calls.append(tag("li", f"… {len(one.calls) - len(calls)} further calls", class_="soft"))
    inner = tag("ul", *calls) if calls else join([])
    answer = said(one.answer, "good") if one.answer is not None else join([])
    is_open = number > len(trace.steps) - 3
    head = tag("span", short(words, 160), class_=kind)
    return tag("li", fold(head, said(words) if len(words) > 160 else join([]), inner, answer,
                          id_=f"{trace.run}-{number}", is_open=is_open))  # fmt: skip


def _call(lane: Lane) -> Markup:
    mark = "✗" if lane.phase == "done" and not lane.ok else MARKS.get(lane.phase, "·")
    kind = "bad" if mark == "✗" else ""
    tries = f", {lane.num_attempts} tries" if lane.num_attempts > 1 else ""
    head = tag("span", f"{mark} {lane.id} {lane.tool}({short(lane.arguments, 80)}){tries} → {short(lane.outcome, 80)}",
               class_=kind)  # fmt: skip
    details = {"state": lane.phase, "after": ", ".join(lane.after) or "nothing", "arguments": said(lane.arguments)}
    for number, attempt in enumerate(lane.attempts, start=1):
        took = seconds(attempt.ended - attempt.started) if math.isfinite(attempt.ended) else "goes on"
        details[f"try {number}"] = f"{took} {attempt.error}".rstrip()
    if lane.phase == "done":
        details["outcome"] = said(lane.outcome)
    return tag("li", fold(head, facts(details), id_=f"call-{lane.id}"))
