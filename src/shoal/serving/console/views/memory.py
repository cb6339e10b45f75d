"""What is remembered: entries and their weights, and of one entry how it came to be, its evidence and its audit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from shoal.serving.console.charts import Curve, bars, lines
from shoal.serving.console.house import House
from shoal.serving.console.html import (
    Markup,
    ago,
    amount,
    badge,
    cards,
    clock,
    empty,
    facts,
    grid,
    join,
    link,
    num_bytes,
    problem,
    said,
    section,
    short,
    table,
    tag,
)
from shoal.serving.console.memories import Memories, Remembered

MAX_ROWS = 300
MAX_EVIDENCE = 100
KINDS = {"active": "good", "candidate": "warn", "demoted": "warn", "rejected": "bad", "removed": ""}
ID_CHARS = 10


def render(house: House, query: Mapping[str, str]) -> Markup:
    """The page's parts."""
    memories = house.memories
    if memories is None or (not memories.rows and not memories.problem):
        return empty("Nothing is remembered here yet.", "See shoal memory --help, or name a folder: --memory FOLDER.")
    parts = [problem(memories.problem)] if memories.problem else []
    if entry := query.get("entry", ""):
        found = memories.memory(entry)
        parts.append(problem("There is no such memory.") if found is None else _one(found))
    parts += _all(memories, query)
    return join(parts)


def _all(memories: Memories, query: Mapping[str, str]) -> list[Markup]:
    wanted, status = query.get("q", "").casefold(), query.get("status", "")
    counts: dict[str, int] = {}
    for row in memories.rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    shown = [
        row
        for row in memories.rows
        if status in ("", row.status)
        and (wanted in f"{row.text}\n{row.family}".casefold() or row.id.startswith(wanted))
    ]
    rows = [
        (
            link(row.id[:ID_CHARS], "memory", entry=row.id),
            badge(row.status, KINDS[row.status]),
            amount(row.weight),
            row.uses,
            amount(row.utility),
            row.family,
            row.rule,
            short(row.text, 120),
        )
        for row in shown[:MAX_ROWS]
    ]
    head = cards([
        ("active", memories.held[0], num_bytes(memories.held[1])),
        *((name, counts.get(name, 0), "") for name in ("candidate", "demoted", "rejected", "removed")),
    ])  # fmt: skip
    tenths = Counter(min(9, int(10 * row.weight)) for row in memories.rows if row.status == "active")
    spread = [(f"{tenth / 10:.1f}", float(tenths[tenth])) for tenth in range(10)]
    start = min((moments[0].at for _, moments in memories.weightiest if moments), default=0.0)
    weights = [
        Curve(short(row.text, 24), tuple((moment.at - start, moment.weight) for moment in moments))
        for row, moments in memories.weightiest
    ]
    charts = grid(bars("Active memories by weight", spread), lines("Weights of the weightiest", weights, x="s"))
    states = [link("all", "memory"), *(link(name, "memory", status=name) for name in KINDS)]
    picks = tag("p", *(part for one in states for part in (one, " ")), class_="picks")
    columns = ("entry", "status", "weight", "uses", "utility", "about", "made by", "text")
    return [
        section("Memories", head, charts, id_="all"),
        section("Entries", picks, table(columns, rows, right=(2, 3, 4)), note=f"{len(shown)} of them", id_="entries"),
    ]


def _one(found: Remembered) -> Markup:
    memory, entry = found.memory, found.memory.entry
    start = found.moments[0].at if found.moments else 0.0
    weight = Curve("weight", tuple((moment.at - start, moment.weight) for moment in found.moments))
    gains = Curve("gain of a trial", tuple(
        (float(n), trial.with_memory.reward - trial.without.reward) for n, trial in enumerate(found.trials, start=1)
    ))  # fmt: skip
    about = facts({
        "status": badge(memory.status, KINDS[memory.status]),
        "weight": amount(memory.weight),
        "uses": memory.uses,
        "utility": amount(memory.utility),
        "evidence that it helps": amount(memory.gain),
        "evidence that it harms": amount(memory.loss),
        "about": entry.family,
        "made by": entry.provenance.rule,
        "from task": entry.source_task or "–",
        "entries": len(memory.members),
        "written down": ago(memory.created_us / 1e6),
    })  # fmt: skip
    events = [
        (clock(moment.at), moment.kind, moment.node, amount(moment.weight), short(moment.said, 120))
        for moment in reversed(found.moments)
    ]
    audits = [
        (node, badge("holds", "good") if not wrong else badge("does not hold", "bad"), wrong or "")
        for node, wrong in found.audits
    ]
    trials = [
        (
            short(trial.task.id, 60),
            amount(trial.without.reward),
            amount(trial.with_memory.reward),
            amount(trial.with_memory.reward - trial.without.reward),
            f"{trial.without.steps} → {trial.with_memory.steps}",
            f"{trial.without.tokens} → {trial.with_memory.tokens}",
        )
        for trial in found.trials[:MAX_EVIDENCE]
    ]
    body = [
        said(entry.text),
        about,
        grid(
            lines("Weight after each event", [weight], x="s"),
            lines("Reward with it less reward without", [gains], x="trial", bound=0.0 if found.trials else None),
        ),
        tag("h3", f"Evidence: {len(found.trials)} trials") if found.trials else tag("h3", "No trial has been kept"),
        table(("task", "without", "with", "gain", "steps", "tokens"), trials, right=(1, 2, 3, 4, 5))
        if trials
        else join([]),
        tag("h3", "Audit: each decision recomputed from the trials kept here"),
        table(("decided by", "verdict", "what is wrong"), audits) if audits else empty("Nothing was decided yet."),
        tag("h3", "Life"),
        table(("time", "event", "node", "weight after", ""), events, right=(3,)),
    ]
    return section(f"Memory {memory.id[:ID_CHARS]}", *body, id_=f"memory-{memory.id[:ID_CHARS]}")
