"""One run: reward, held-out accuracy, staleness, utilisation, mismatch, broadcast, and what happened."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from shoal.coordinator.reporting.record import number
from shoal.serving.console.charts import bars, curve, lines, network
from shoal.serving.console.house import House
from shoal.serving.console.html import (
    Markup,
    amount,
    empty,
    facts,
    fold,
    grid,
    join,
    num_bytes,
    percent,
    problem,
    said,
    seconds,
    section,
    table,
    tag,
)
from shoal.serving.console.runs import RunFolder
from shoal.serving.console.series import Series
from shoal.serving.console.views.happened import happened
from shoal.serving.console.views.overview import held_out_curves

NUM_EVENTS = 100
MAX_MATRIX = 24
MAX_DRAWN = 16
MAX_FIGURES = 200


def render(house: House, query: Mapping[str, str]) -> Markup:
    """The page's parts."""
    run = house.run(query.get("run", ""))
    if run is None or run.folder is None:
        return empty("There is no run's folder here.", "Name one: shoal console runs/NAME.")
    folder = run.folder
    state, c = folder.state, folder.state.curves

    def one(title: str, key: str, name: str, unit: str = "", scale: float = 1.0) -> Markup:
        return lines(title, [curve(name, c.get(key, Series()), scale)], unit=unit, x="step")

    bound = folder.staleness_bound
    learning = grid(
        one("Reward", "reward", "reward"),
        lines("Held-out accuracy", held_out_curves(run), unit="%", x="version"),
        one("Loss", "loss", "loss"),
    )
    ages = range(max([*state.staleness, bound or 0], default=0) + 1) if state.staleness else ()
    freshness = grid(
        lines(
            "Staleness of what was trained on",
            [curve("mean", c.get("staleness_mean", Series())), curve("oldest", c.get("staleness_max", Series()))],
            unit="versions",
            x="step",
            bound=bound,
            bound_name=f"bound S = {bound}",
        ),
        bars("Rollouts by staleness", [(str(age), state.staleness[age]) for age in ages], unit="versions"),
        _mismatch(c),
    )
    time = grid(
        one("Learner busy", "utilisation", "busy", "% of the time", 100.0),
        lines(
            "A step's time",
            [curve(what, c.get(f"{what}_s", Series())) for what in ("train", "wait", "publish")],
            unit="s",
            x="step",
        ),
        one("Tokens drawn by workers", "rollout_tokens_per_s", "tokens/s"),
        one("Length of a response", "response_tokens_mean", "tokens", "tokens"),
        one("Entropy of the policy", "entropy", "entropy", "nats a token"),
        one("Norm of the gradient", "grad_norm", "norm"),
    )
    notes = [problem(f"reading the run's files: {folder.share_read:.0%}")] if folder.share_read < 0.999 else []
    if state.num_damaged:
        notes.append(problem(f"{state.num_damaged} lines of its files could not be read."))
    return join([
        *notes,
        section("Learning", learning, id_="learning"),
        section("How fresh the rollouts are", freshness, id_="freshness"),
        section("Where the time goes", time, id_="time"),
        section("Broadcast: who feeds whom", feeding(folder), id_="feeding"),
        section("Who gave the rollouts", _workers(folder), id_="workers"),
        section("Figures", fold("all of the newest step", _figures(folder), id_="figures"), id_="figures"),
        section("What happened", _kinds(folder), happened(list(state.events), NUM_EVENTS), id_="events"),
        section("Outcome", _summary(folder), id_="summary") if folder.summary else join([]),
        section("Configuration", fold("config.toml", said(folder.config_text), id_="config"), id_="config"),
    ])  # fmt: skip


def _mismatch(curves: Mapping[str, Series]) -> Markup:
    return lines(
        "Mismatch of rollouts and learner",
        [curve("KL", curves.get("mismatch_kl", Series()), 1000.0)],
        unit="nats / 1000 a token",
        x="step",
    )


def feeding(folder: RunFolder) -> Markup:
    """From whom each worker took how much, and how long its newest version took."""
    state = folder.state
    if not state.fed:
        return empty(
            "No worker has told yet from whom it got new weights.",
            "Workers that the run itself starts read them from this disk.",
        )
    totals: dict[str, int] = {}
    for row in state.fed.values():
        for source, count in row.items():
            totals[source] = totals.get(source, 0) + count
    sources = sorted(totals, key=lambda source: -totals[source])[:MAX_MATRIX]
    most = max(totals.values()) or 1
    rows: list[Sequence[object]] = []
    for taker in sorted(state.fed)[:MAX_MATRIX]:
        newest = state.arrivals.get(taker, {})
        took, version = newest.get("seconds"), newest.get("version")
        shares = [_tinted(state.fed[taker][source], most) for source in sources]
        seen = seconds(float(took)) if isinstance(took, int | float) else "–"
        rows.append((tag("b", taker), version if isinstance(version, int) else "–", seen, *shares))
    columns = ("worker", "newest version", "it took", *(f"from {source}" for source in sources))
    shown = table(columns, rows, right=range(1, len(columns)))
    names = list(dict.fromkeys([*sources, *sorted(state.fed)]))
    if len(names) > MAX_DRAWN:
        return shown
    edges = [
        (names.index(source), names.index(taker), num_bytes(count), count / most)
        for taker, row in state.fed.items()
        for source, count in row.items()
        if count and source in names
    ]
    return tag("div", network([(name, "active") for name in names], edges), shown, class_="beside")


def _tinted(count: int, most: int) -> Markup:
    level = min(4, math.ceil(4 * count / most)) if count else 0
    return tag("span", num_bytes(count) if count else "–", class_=f"heat h{level}")


def _workers(folder: RunFolder) -> Markup:
    rollouts = folder.state.rollouts
    if not rollouts:
        return empty("No rollout has been trained on yet.")
    total = rollouts.total() or 1
    rows = [(name, f"{count:,}", percent(count / total)) for name, count in rollouts.most_common(MAX_MATRIX)]
    return table(("worker", "rollouts", "share"), rows, right=(1, 2))


def _kinds(folder: RunFolder) -> Markup:
    kinds = folder.state.kinds
    return facts({kind: f"{count:,}" for kind, count in kinds.most_common(16)}) if kinds else join([])


def _figures(folder: RunFolder) -> Markup:
    known = {name: number(folder.state.last, name) for name in folder.state.last}
    return facts({name: amount(value) for name, value in sorted(known.items())[:MAX_FIGURES] if math.isfinite(value)})


def _summary(folder: RunFolder) -> Markup:
    plain = {
        key: amount(value) if isinstance(value, int | float) else value
        for key, value in folder.summary.items()
        if isinstance(value, int | float | str) and not isinstance(value, bool)
    }
    return facts(plain)
