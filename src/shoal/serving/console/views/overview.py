"""What runs, how far it is, what it earns and costs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from shoal.coordinator.reporting.record import number
from shoal.serving.console.asked import Server
from shoal.serving.console.charts import Curve, curve, lines
from shoal.serving.console.house import House, Watched
from shoal.serving.console.html import (
    Markup,
    ago,
    amount,
    badge,
    cards,
    dollars,
    empty,
    grid,
    join,
    link,
    percent,
    problem,
    seconds,
    section,
    table,
)
from shoal.serving.console.series import Series
from shoal.serving.console.views.happened import happened

SILENT_S = 15.0
"""A coordinator that has said nothing for so long is not there."""

NUM_EVENTS = 12


def render(house: House, query: Mapping[str, str]) -> Markup:
    """The page's parts."""
    parts: list[Markup] = []
    if len(house.runs) > 1:
        parts.append(section("Runs", _runs(house), id_="runs"))
    run = house.run(query.get("run", ""))
    if run is not None:
        parts += _run(run)
    if house.server is not None:
        parts.append(_server(house.server))
    parts.append(_others(house))
    if run is not None and run.folder is not None:
        events = list(run.folder.state.events)
        parts.append(section("What happened last", happened(events, NUM_EVENTS), id_="events"))
    return join(parts)


def state_of(run: Watched) -> tuple[str, str]:
    """How a run is, in a word, and the word's kind."""
    status = run.coordinator.status if run.coordinator is not None else None
    if run.coordinator is not None and status is not None and not run.coordinator.problem:
        if status.failure:
            return "failed", "bad"
        if status.ended:
            return "ends", "warn"
        return ("serving" if status.mode == "serving" else "runs"), "good"
    if run.folder is not None:
        if run.folder.has_ended:
            return ("finished", "good") if run.folder.summary else ("stopped", "warn")
        newest = run.folder.state.newest_at
        if math.isnan(newest):
            return "nothing yet", ""
    if run.coordinator is not None and status is not None and time.monotonic() - run.coordinator.heard_at > SILENT_S:
        return "silent", "bad"
    return "not running", "warn"


def _runs(house: House) -> Markup:
    rows = []
    for run in house.runs.values():
        word, kind = state_of(run)
        state = run.folder.state if run.folder is not None else None
        rows.append((
            link(run.name, "overview", run=run.name),
            badge(word, kind),
            f"{_step(run)} of {_steps(run)}",
            amount(number(state.last, "reward")) if state is not None else "–",
            ago(state.newest_at) if state is not None else "–",
        ))  # fmt: skip
    return table(("run", "state", "step", "reward", "last heard of"), rows, right=(2, 3, 4))


def _run(run: Watched) -> list[Markup]:
    word, kind = state_of(run)
    status = run.coordinator.status if run.coordinator is not None else None
    state = run.folder.state if run.folder is not None else None
    last = state.last if state is not None else {}
    curves = state.curves if state is not None else {}
    facts: list[tuple[str, object, str]] = [("state", badge(word, kind), run.name)]
    if status is None or status.mode != "serving":
        published = f"version {status.published} published" if status is not None and status.published >= 0 else ""
        facts.append(("step", f"{_step(run)}", f"of {_steps(run)}" + (f", {published}" if published else "")))
        facts.append(("reward", amount(number(last, "reward")), "mean of the newest step"))
        facts.append(("held-out accuracy", *_held_out(run)))
        rate = number(last, "rollout_tokens_per_s")
        if status is not None and not (run.coordinator and run.coordinator.problem):
            rate = sum(node.tokens_per_s for node in status.nodes)
        facts.append(("tokens/s", amount(rate, 0), "drawn by all workers"))
        facts.append(("learner busy", percent(number(last, "utilisation")), "of the newest step's time"))
        usd, hourly = number(last, "usd"), number(last, "usd_per_hour")
        if status is not None:
            usd, hourly = status.metrics.get("usd", usd), status.usd_per_hour
        elif run.folder is not None and math.isnan(usd):
            usd = number(run.folder.summary, "usd")
        if math.isfinite(usd) or hourly > 0:
            facts.append(("spent", dollars(usd), f"{dollars(hourly)} an hour"))
        else:
            facts.append(("spent", "0 $", "nothing has a price"))
        if state is not None and math.isfinite(state.started_at):
            facts.append(("time", seconds(state.newest_at - state.started_at), f"last heard of {ago(state.newest_at)}"))
    head = [cards(facts)]
    if run.coordinator is not None and run.coordinator.problem and word in ("silent", "not running"):
        head.append(problem(run.coordinator.problem))
    if status is not None:
        head += [problem(sentence) for sentence in status.silent[:8]]
    if run.folder is not None and run.folder.share_read < 0.999:
        head.append(problem(f"reading the run's files: {run.folder.share_read:.0%}"))
    parts = [section("Run", *head, id_="now")]
    if state is not None:
        charts = grid(
            lines("Reward", [curve("reward", curves.get("reward", Series()))], x="step"),
            lines("Held-out accuracy", held_out_curves(run), unit="%", x="version"),
            lines("Tokens drawn", [curve("tokens/s", curves.get("rollout_tokens_per_s", Series()))], x="step"),
        )
        parts.append(section("Curves", charts, id_="curves"))
    return parts


def held_out_curves(run: Watched) -> list[Curve]:
    """Strict and lenient accuracy over versions, in per cent."""
    evals = sorted(run.folder.state.evals.values(), key=lambda one: one.version) if run.folder is not None else []
    return [
        Curve("strict", tuple((one.version, 100 * one.strict) for one in evals)),
        Curve("lenient", tuple((one.version, 100 * one.lenient) for one in evals)),
    ]


def _held_out(run: Watched) -> tuple[str, str]:
    evals = sorted(run.folder.state.evals.values(), key=lambda one: one.version) if run.folder is not None else []
    if not evals:
        return "–", "not measured yet"
    if len(evals) == 1:
        return percent(evals[0].strict), f"version {evals[0].version}, {evals[0].questions} questions"
    return percent(evals[-1].strict), f"from {percent(evals[0].strict)} at version {evals[0].version}"


def _step(run: Watched) -> int:
    told = run.coordinator.status.step if run.coordinator is not None and run.coordinator.status is not None else 0
    return max(told, run.folder.state.step if run.folder is not None else 0)


def _steps(run: Watched) -> int:
    told = run.coordinator.status.steps if run.coordinator is not None and run.coordinator.status is not None else 0
    return told or (run.folder.steps_wanted if run.folder is not None else 0)


def _server(server: Server) -> Markup:
    if server.problem:
        return section("Server", problem(server.problem), id_="server")
    counters, curves = server.counters, server.curves
    rate = curves["tokens_per_s"].last if "tokens_per_s" in curves else math.nan
    facts = [
        ("models", str(len(server.models)), ", ".join(server.models[:3])),
        ("version", amount(counters.get("shoal_policy_version", math.nan)), "of the weights in place"),
        ("tokens/s", amount(rate, 0), "drawn now"),
        ("being drawn", amount(counters.get("shoal_sequences_live", math.nan)), "sequences"),
        ("waiting", amount(counters.get("shoal_sequences_waiting", math.nan)), "sequences"),
        ("drawn", amount(counters.get("shoal_tokens_drawn_total", math.nan)), "tokens since it started"),
    ]
    names = (("tokens_per_s", "Tokens drawn"), ("live", "Sequences being drawn"), ("waiting", "Sequences waiting"))
    charts = grid(*(lines(title, [curve(title.lower(), curves.get(key, Series()))], x="s") for key, title in names))
    return section("Server", cards(facts), charts, note=server.url, id_="server")


def _others(house: House) -> Markup:
    rows: list[tuple[object, ...]] = []
    if house.agents is not None and house.agents.runs:
        num_open = sum(run.state == "open" for run in house.agents.runs)
        rows.append((link("agent runs", "agents"), len(house.agents.runs), f"{num_open} open"))
    if house.memories is not None and house.memories.rows:
        rows.append((link("memories", "memory"), house.memories.held[0], "active"))
    if not rows:
        if house.runs or house.server is not None:
            return join([])
        return empty("Nothing is watched here yet.", "Name a run: shoal console runs/NAME.")
    return section("Beside it", table(("what", "how many", ""), rows, right=(1,)), id_="others")
