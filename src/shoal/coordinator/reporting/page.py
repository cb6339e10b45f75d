"""One page about a run: `report.html`, complete in itself, for people on any screen.

The page shows what was gained and how surely, the pictures of `plots`, answers before and after, who did the work,
what was dropped, what happened when, and the configuration. Invariants: it refers to nothing outside itself (pictures
are embedded) and runs no script; every text in it passed through `markup`; it can be written at any moment of a run,
of a crashed one and of an empty one, and replaces the page before it in one step.
"""

from __future__ import annotations

import math
import statistics
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from shoal import __version__
from shoal.coordinator.costs import PER_POINT
from shoal.coordinator.reporting.markup import Markup, join, tag, text
from shoal.coordinator.reporting.plots import draw_all
from shoal.coordinator.reporting.record import Point, RunRecord, number, read_run
from shoal.protocol.event import Event

MAX_SAMPLES = 12
MAX_SAMPLE_CHARS = 2000
MAX_EVENTS_OF_A_KIND = 30
MAX_TABLE_ROWS = 24
MAX_WORKER_ROWS = 64

LOSS_WORDS = ("void", "expired", "rejected", "late", "duplicate", "swept", "dropped", "failed", "refused", "left")
"""Events whose kind has one of these words are counted under what did not count."""

SHOWN_SUMMARY = {"accuracy_before", "accuracy_after", "accuracy_before_lenient", "accuracy_after_lenient"} | {
    "gain_interval", "gain_interval_lenient", "heldout_questions", "seconds", "max_staleness", "S",
    "worker_rollouts", "min_worker_share", "samples", "steps",
}  # fmt: skip
"""Keys of the summary that have a place of their own; other plain values are listed after them."""

COSTS = {
    "usd": "all of it",
    PER_POINT: "a point of held-out accuracy gained (strict)",
    "usd_idle": "machines without work",
    "usd_lost_stale": "rollouts staler than the bound",
    "usd_lost_void": "rollouts that came to nothing",
    "usd_lost_rejected": "rollouts that were rejected",
    "usd_lost_expired": "leases that expired",
    "usd_lost_filtered": "groups without a difference in reward, left out",
}
"""What `coordinator.costs` tells, in the words of the page."""

STEP_COLUMNS = [
    ("step", "step", "{:.0f}"),
    ("reward", "reward", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("grad_norm", "gradient", "{:.2f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("mismatch_kl", "mismatch KL", "{:.2g}"),
    ("staleness_mean", "staleness", "{:.2f}"),
    ("response_tokens_mean", "tokens/response", "{:.1f}"),
    ("tokens_per_s", "tokens/s", "{:.0f}"),
    ("wait_s", "wait s", "{:.1f}"),
    ("train_s", "train s", "{:.1f}"),
]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` (and the pictures under `plots/`) into a run's directory; returns the page.

    Raises:
        RunError: there is no such directory.
    """
    run = read_run(run_dir)
    pictures = draw_all(run)
    name = _setting(run, "run", "name") or run.path.resolve().name
    body = join(
        [
            _head(run, name),
            _headline(run),
            _facts(run),
            _section("Pictures", [_figure(plot.caption, path) for plot, path in pictures]),
            _section("The same questions, before and after", _samples(run)),
            _section("Recent rollouts", _episodes(run)),
            _section("Evaluations", [_evaluations(run)]),
            _section("Who supplied the rollouts", [_workers(run)]),
            _section("What it cost", [_costs(run)]),
            _section("What did not count", [_losses(run)]),
            _section("Details", [_steps(run), _timeline(run), _config(run)]),
        ]
    )
    page = join([Markup("<!doctype html>\n"), tag("html", _html_head(name), tag("body", tag("main", body)), lang="en")])
    target = run_dir / "report.html"
    unfinished = target.with_suffix(".html.tmp")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(target)
    return target


def _html_head(name: str) -> Markup:
    style = Markup(files("shoal.coordinator.reporting").joinpath("page.css").read_text(encoding="utf-8"))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name} · Shoal run report"),
        tag("style", style),
    )


def _head(run: RunRecord, name: str) -> Markup:
    status = "finished" if run.summary else "unfinished: written while it ran, or after it was interrupted"
    if not run.steps and not run.evals:
        status = "nothing measured yet"
    facts = [status, _setting(run, "model", "name"), _setting(run, "learner", "mode"), _when(run.started_at)]
    parts = [tag("h1", name), tag("p", " · ".join(fact for fact in facts if fact), class_="soft")]
    if not run.steps and not run.evals:
        parts.append(tag("p", "This run has no finished step and no evaluation yet.", class_="notice"))
    if run.damaged_lines:
        parts.append(tag("p", f"{run.damaged_lines} lines of its records could not be read.", class_="notice"))
    return tag("header", *parts)


def accuracies(run: RunRecord, suffix: str) -> tuple[float, float]:
    """Accuracy before and after: the summary's, or else those of the first and the last evaluation."""
    before, after = (number(run.summary, f"accuracy_{when}{suffix}") for when in ("before", "after"))
    key = "lenient" if suffix else "strict"
    measured = [point for point in run.evals if math.isfinite(number(point, key))]
    if math.isnan(before) and measured:
        before = number(measured[0], key)
    if math.isnan(after) and len(measured) > 1:
        after = number(measured[-1], key)
    return before, after


def _headline(run: RunRecord) -> Markup:
    cards = []
    for suffix, label in (("", "strict"), ("_lenient", "lenient")):
        before, after = accuracies(run, suffix)
        if math.isnan(before):
            continue
        if math.isnan(after):
            cards.append(_card(f"{label} accuracy", tag("span", _percent(before)), "before training"))
            continue
        gain = 100 * (after - before)
        told = run.summary.get(f"gain_interval{suffix}")
        ends = [number({"end": end}, "end") for end in told] if isinstance(told, list) and len(told) == 2 else []
        sure = Markup()
        if len(ends) == 2 and all(map(math.isfinite, ends)):
            interval = f"95 % confidence, paired: {100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}"
            sure = tag("div", interval, class_="soft")
        big = join([tag("span", f"{_percent(before)} → ", class_="from"), _percent(after)])
        note = tag("span", f"{gain:+.1f} points", class_="up" if gain > 0 else "down")
        cards.append(_card(f"{label} accuracy, held out", big, join([note, sure])))
    return tag("div", *cards, class_="cards") if cards else Markup()


def _card(label: str, big: object, note: object) -> Markup:
    return tag("div", tag("div", label, class_="soft"), tag("div", big, class_="big"), tag("div", note), class_="card")


def _facts(run: RunRecord) -> Markup:
    """The run in a dozen numbers; those that were not measured are left out."""
    rates = [rate for rate in run.column("tokens_per_s") if rate > 0]
    oldest = [value for value in run.column("staleness_max") if math.isfinite(value)]
    bound = "" if run.staleness_bound is None else f" (bound S = {run.staleness_bound})"
    counts = run.worker_rollouts()
    share = min(counts.values()) / (sum(counts.values()) or 1) if counts else math.nan
    questions = max((number(point, "questions") for point in run.evals), default=math.nan)
    rows: list[tuple[str, object]] = [
        ("Learner steps", f"{len(run.steps)}" if run.steps else ""),
        ("Held-out questions", _count(number(run.summary, "heldout_questions"), questions)),
        ("Time", _duration(run)),
        ("Tokens trained on", _count(run.total("tokens") or math.nan)),
        ("Tokens a second, median", _count(statistics.median(rates)) if rates else ""),
        ("Oldest rollout trained on", f"{max(oldest):.0f} versions{bound}" if oldest else ""),
        ("Workers", f"{len(counts)}, the smallest share {_percent(share)}" if counts else ""),
    ]
    for key, value in run.summary.items():
        shown_elsewhere = key in SHOWN_SUMMARY or key in COSTS
        if not shown_elsewhere and isinstance(value, str | int | float) and len(rows) < MAX_TABLE_ROWS:
            rows.append((key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)[:200]))
    return _table(["", ""], [row for row in rows if row[1]], header=False)


def _figure(caption: str, path: Path) -> Markup:
    source = f"data:image/png;base64,{b64encode(path.read_bytes()).decode()}"
    return tag("figure", tag("img", src=source, alt=caption), tag("figcaption", caption))


def _samples(run: RunRecord) -> list[Markup]:
    samples = run.summary.get("samples")
    shown = []
    for sample in samples[:MAX_SAMPLES] if isinstance(samples, list) else []:
        if isinstance(sample, dict):
            said = [_said(when, sample.get(when, "")) for when in ("before", "after")]
            expected = sample.get("answer", "")
            answer = tag("span", f"  answer: {_cut(expected)}" if expected else "", class_="soft")
            asked = tag("div", tag("strong", _cut(sample.get("question", ""))), answer)
            shown.append(tag("div", asked, tag("div", *said, class_="pair"), class_="card sample"))
    return shown


def _said(when: str, reply: object) -> Markup:
    return tag("div", tag("div", when, class_="what"), tag("pre", _cut(reply)), class_=f"said {when}")


def _episodes(run: RunRecord) -> list[Markup]:
    """A few rollouts as they were written down; only where the summary brought no samples."""
    rows = [
        (_cut(episode.turns[0].observation), _cut(episode.turns[-1].completion.text), f"{episode.reward:.2f}")
        for episode in (run.last_episodes(6) if not run.summary.get("samples") else [])
        if episode.outcome == "done"
    ]
    return [_table(["asked", "last reply", "reward"], rows, numeric=1)] if rows else []


def _evaluations(run: RunRecord) -> Markup:
    rows = [
        (
            f"{number(point, 'version'):.0f}",
            _percent(number(point, "strict")),
            _percent(number(point, "lenient")),
            _count(number(point, "questions")),
            _fixed(number(point, "response_tokens_mean"), "{:.1f}"),
        )
        for point in _spread(run.evals)
    ]
    return _table(["version", "strict", "lenient", "questions", "tokens/response"], rows, numeric=5)


def _workers(run: RunRecord) -> Markup:
    counts = run.worker_rollouts()
    total = sum(counts.values()) or 1.0
    rows = [(name, _count(count), _percent(count / total)) for name, count in list(counts.items())[:MAX_WORKER_ROWS]]
    return _table(["worker", "rollouts", "share"], rows, numeric=2)


def _costs(run: RunRecord) -> Markup:
    """Dollars by what they went to, and by machine; nothing where nothing had a price."""
    last = run.steps[-1] if run.steps else {}
    told = {key: number(source, key) for source in (last, run.summary) for key in source if key in COSTS}
    spent = told.get("usd", math.nan)
    rows = [
        (label, f"{told[key]:.4g}", "" if key == PER_POINT else _percent(told[key] / spent))
        for key, label in COSTS.items()
        if math.isfinite(told.get(key, math.nan)) and spent > 0
    ]
    machines = run.summary.get("usd_by_machine")
    each = {name: number(machines, name) for name in machines} if isinstance(machines, dict) else {}
    paid = sorted(((usd, name) for name, usd in each.items() if math.isfinite(usd)), reverse=True)
    rows += [(f"paid for {name}", f"{usd:.4g}", _percent(usd / spent)) for usd, name in paid[:MAX_WORKER_ROWS] if rows]
    return _table(["what", "US dollars", "share"], rows, numeric=2)


def _losses(run: RunRecord) -> Markup:
    """What was sampled and not trained on, and who went: totals of the metrics, and events by kind and reason."""
    rows = [
        ("swept at the buffer's exit, staler than the bound", "", _count(run.total("swept"))),
        ("groups without advantage, skipped by the learner", "", _count(run.total("groups_skipped"))),
    ]
    counted = Counter(
        (event.kind, str(event.data.get("reason", ""))[:120])
        for event in run.events
        if any(word in event.kind for word in LOSS_WORDS)
    )
    rows += [(kind, reason, f"{count}") for (kind, reason), count in counted.most_common(MAX_TABLE_ROWS)]
    return _table(["what", "reason", "times"], rows, numeric=1) if run.steps or counted else Markup()


def _steps(run: RunRecord) -> Markup:
    used = [column for column in STEP_COLUMNS if any(map(math.isfinite, run.column(column[0])))]
    rows = [tuple(_fixed(number(point, key), form) for key, _, form in used) for point in _spread(run.steps)]
    table = _table([label for _, label, _ in used], rows, numeric=len(used))
    return _details(f"Steps ({len(rows)} of {len(run.steps)} shown)", table) if rows else Markup()


def _timeline(run: RunRecord) -> Markup:
    """Events in order, the first of each kind only; what was left out is counted."""
    seen: Counter[str] = Counter()
    rows, start = [], run.started_at
    for event in run.events:
        seen[event.kind] += 1
        if seen[event.kind] <= MAX_EVENTS_OF_A_KIND:
            rows.append((_clock(event.time - start), event.kind, event.node, _event_data(event)))
    left_out = [f"{n - MAX_EVENTS_OF_A_KIND} more {kind}" for kind, n in seen.items() if n > MAX_EVENTS_OF_A_KIND]
    note = tag("p", f"Not listed: {', '.join(left_out)}.", class_="soft") if left_out else Markup()
    table = _table(["after", "event", "node", "data"], rows)
    return _details(f"Events ({len(run.events)})", table, note) if rows else Markup()


def _event_data(event: Event) -> str:
    return _cut(msgspec.json.encode(event.data).decode(errors="replace") if event.data else "", 300)


def _config(run: RunRecord) -> Markup:
    return _details("Configuration", tag("pre", run.config_text)) if run.config_text else Markup()


def _section(title: str, content: Iterable[Markup]) -> Markup:
    body = join(content)
    return tag("section", tag("h2", title), body) if body else Markup()


def _details(title: str, *content: Markup) -> Markup:
    return tag("details", tag("summary", title), *content)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], *, numeric: int = 0, header: bool = True) -> Markup:
    """A table that scrolls by itself on a narrow screen; its last `numeric` columns are numbers."""
    if not rows:
        return Markup()

    def row(cells: Sequence[object], kind: str) -> Markup:
        first = len(cells) - numeric
        classes = ["n" if i >= first else "text" for i in range(len(cells))]
        return tag("tr", *(tag(kind, text(cell), class_=c) for cell, c in zip(cells, classes, strict=True)))

    top = [tag("thead", row(head, "th"))] if header else []
    return tag("div", tag("table", *top, tag("tbody", *(row(cells, "td") for cells in rows))), class_="scroll")


def _spread(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_TABLE_ROWS` points, evenly spread, the first and the last among them."""
    if len(points) <= MAX_TABLE_ROWS:
        return list(points)
    stride = (len(points) - 1) / (MAX_TABLE_ROWS - 1)
    return [points[round(i * stride)] for i in range(MAX_TABLE_ROWS)]


def _setting(run: RunRecord, section: str, key: str) -> str:
    table = run.config.get(section)
    value: Any = table.get(key) if isinstance(table, dict) else None
    return value if isinstance(value, str) else ""


def _cut(value: object, limit: int = MAX_SAMPLE_CHARS) -> str:
    whole = str(value)
    return whole if len(whole) <= limit else f"{whole[:limit]} … ({len(whole) - limit:,} more characters)"


def _fixed(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "–"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "–"


def _count(*values: float) -> str:
    """The first of the values that is a number, with thousands separated; empty where none is."""
    return next((f"{value:,.0f}" for value in values if math.isfinite(value)), "")


def _clock(seconds: float) -> str:
    whole = max(0, round(seconds)) if math.isfinite(seconds) else 0
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _duration(run: RunRecord) -> str:
    told = number(run.summary, "seconds")
    times = [number(point, "time") for point in (*run.steps, *run.evals)]
    last = max((time for time in times if math.isfinite(time)), default=math.nan)
    seconds = told if math.isfinite(told) else last - run.started_at
    return _clock(seconds) if math.isfinite(seconds) else ""


def _when(time: float) -> str:
    if not 0 <= time < 4e9:
        return ""
    return f"started {datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC, Shoal {__version__}"
