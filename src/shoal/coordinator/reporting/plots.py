"""The pictures of a run: what it learned, how stale, how busy, how far from the behaviour policy, who did the work.

Matplotlib is imported when the first picture is drawn, and only its Agg canvas: no window, no global state. Each
picture is a pure function of a `RunRecord`; one that has nothing to show is left out, and an old file of it removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.coordinator.reporting.record import RunRecord, number, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, GREY, INK = "#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#a0aec0", "#2d3748"

WIDTH_INCHES = 8.6
DOTS_PER_INCH = 150

MAX_BARS = 80
"""Longer runs are drawn with several steps to a bar."""

MAX_WORKERS = 16
"""Workers drawn one by one, the largest; the last bar is the mean of the others."""

STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": "#cbd5e0",
    "axes.labelcolor": "#4a5568",
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#edf2f7",
    "xtick.color": "#718096",
    "ytick.color": "#718096",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """One picture: its file name, what it shows, and how it is drawn (false where there is nothing to draw)."""

    name: str
    caption: str
    inches_high: float
    draw: Callable[[RunRecord, Figure], bool]


def draw_plots(run_dir: Path) -> list[Path]:
    """Draw every picture that the run has data for into `run_dir/plots`; returns the files, in reading order.

    Raises:
        RunError: there is no such directory.
    """
    return [path for _, path in draw_all(read_run(run_dir))]


def draw_all(run: RunRecord) -> list[tuple[Plot, Path]]:
    """As `draw_plots`, for a run already read; each file with what it shows."""
    folder = run.path / "plots"
    drawn = []
    for plot in PLOTS:
        path = folder / f"{plot.name}.png"
        if not (run.steps or run.evals) or not _draw(plot, run, path):
            path.unlink(missing_ok=True)
            continue
        drawn.append((plot, path))
    return drawn


def _draw(plot: Plot, run: RunRecord, path: Path) -> bool:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.04)
        figure = Figure(figsize=(WIDTH_INCHES, plot.inches_high), dpi=DOTS_PER_INCH, layout=layout)
        FigureCanvasAgg(figure)
        if not plot.draw(run, figure):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return True


def _learning(run: RunRecord, figure: Figure) -> bool:
    top, bottom = figure.subplots(2, 1, sharex=True)
    for key, colour, above in (("lenient", ORANGE, True), ("strict", BLUE, False)):
        points = [(number(e, "version"), 100 * number(e, key)) for e in run.evals if math.isfinite(number(e, key))]
        if points:
            x, y = zip(*points, strict=True)
            top.plot(x, y, color=colour, marker="o", markersize=5, label=key)
            _label_ends(top, points, colour, above)
    top.set_ylim(0, 112)
    top.set_yticks(range(0, 101, 20))
    _titles(top, "Accuracy on held-out questions", "%")
    if top.lines:
        top.legend(loc="lower right", ncols=2)
    reward = run.column("reward")
    if any(map(math.isfinite, reward)):
        _raw_and_smooth(bottom, _xs(run), reward, GREEN)
        if min(filter(math.isfinite, reward)) >= 0:
            bottom.set_ylim(bottom=0)
    _titles(bottom, "Reward of the rollouts trained on", "mean reward", "policy version (step)")
    return bool(top.lines or bottom.lines)


def _staleness(run: RunRecord, figure: Figure) -> bool:
    mean, worst = run.column("staleness_mean"), run.column("staleness_max")
    if not any(map(math.isfinite, mean + worst)):
        return False
    over_time, histogram = figure.subplots(1, 2, width_ratios=(2.2, 1))
    x = _xs(run)
    over_time.fill_between(x, worst, step="mid", color=ORANGE, alpha=0.22, linewidth=0, label="oldest rollout")
    over_time.plot(x, mean, color=BLUE, label="mean", marker=_marker(x))
    if run.staleness_bound is not None:
        over_time.axhline(run.staleness_bound, color=INK, linestyle=(0, (4, 3)), linewidth=1.1)
        over_time.annotate(
            f"bound S = {run.staleness_bound}", (1, run.staleness_bound), (-2, 4), textcoords="offset points",
            xycoords=over_time.get_yaxis_transform(), ha="right", fontsize=9,
        )  # fmt: skip
    over_time.set_ylim(0, max([run.staleness_bound or 0, 1, *filter(math.isfinite, worst)]) * 1.3)
    _titles(over_time, "Staleness of what was trained on", "versions", "step")
    over_time.yaxis.get_major_locator().set_params(integer=True)
    over_time.legend(loc="upper left", ncols=2)

    counts = {int(k): v for k, v in run.family("staleness").items() if k.isdecimal() and len(k) < 6}
    what = "rollouts"
    if not counts:
        what = "steps"
        for value in filter(math.isfinite, worst):
            counts[int(value)] = counts.get(int(value), 0.0) + 1
    total = sum(counts.values()) or 1.0
    keys = range(max([*counts, run.staleness_bound or 0]) + 1) if counts else range(1)
    bars = histogram.bar(list(keys), [100 * counts.get(k, 0) / total for k in keys], color=BLUE, width=0.7)
    histogram.bar_label(bars, fmt=lambda share: f"{share:.0f} %" if share else "", fontsize=9, padding=2)
    histogram.set_xticks(list(keys) if len(keys) <= 12 else list(keys)[:: len(keys) // 8])
    histogram.margins(y=0.18)
    title = "Rollouts by staleness" if what == "rollouts" else "Steps by oldest rollout"
    _titles(histogram, title, f"% of {what}", "versions")
    return True


def _utilisation(run: RunRecord, figure: Figure) -> bool:
    parts = [("train", "train_s", BLUE), ("publish", "publish_s", PURPLE), ("wait for rollouts", "wait_s", "#e2a36b")]
    columns = {key: [x if math.isfinite(x) else 0.0 for x in run.column(key)] for _, key, _ in parts}
    totals = {key: sum(column) for key, column in columns.items()}
    whole = sum(totals.values())
    if not whole:
        return False
    axes = figure.subplots()
    x, width, binned = _bins(_xs(run), columns)
    floor = [0.0] * len(x)
    for label, key, colour in parts:
        share = 100 * totals[key] / whole
        axes.bar(x, binned[key], width * 0.86, bottom=floor, color=colour, label=f"{label} {share:.0f} %")
        floor = [f + b for f, b in zip(floor, binned[key], strict=True)]
    axes.margins(x=0.01)
    axes.set_ylim(0, max(floor) * 1.18)
    axes.legend(loc="upper right", ncols=3)
    _titles(axes, "Where the learner's time went", "seconds a step", "step")
    return True


def _policy(run: RunRecord, figure: Figure) -> bool:
    panels = [
        ("mismatch_kl", "Mismatch of rollouts and trainer (KL)", "nats / 1000 a token", ORANGE),
        ("entropy", "Entropy of the policy", "nats a token", BLUE),
        ("grad_norm", "Norm of the gradient, before clipping", "", GREEN),
        ("clip_fraction", "Tokens whose ratio was clipped", "%", PURPLE),
    ]
    grid = figure.subplots(2, 2, sharex=True)
    x, any_drawn = _xs(run), False
    for axes, (key, title, unit, colour) in zip(grid.flat, panels, strict=True):
        scale = {"%": 100.0, "nats / 1000 a token": 1000.0}.get(unit, 1.0)
        y = [scale * value for value in run.column(key)]
        if any(map(math.isfinite, y)):
            any_drawn = True
            _raw_and_smooth(axes, x, y, colour)
            if min(filter(math.isfinite, y)) >= 0:
                axes.set_ylim(bottom=0)
        else:
            _nothing(axes)
        _titles(axes, title, unit, "step" if axes in grid[1] else "")
    return any_drawn


def _publication(run: RunRecord, figure: Figure) -> bool:
    series = [("publish_s", "publish (learner)", PURPLE), ("broadcast_s", "until the last worker has it", ORANGE)]
    axes, longest = figure.subplots(), 0.0
    for key, label, colour in series:
        points = [(x, y) for x, y in zip(_xs(run), run.column(key), strict=True) if y > 0]
        if points:
            x, y = zip(*points, strict=True)
            longest = max(longest, *y)
            axes.plot(x, y, color=colour, marker=_marker(x), label=f"{label}, median {sorted(y)[len(y) // 2]:.2g} s")
    if not longest:
        return False
    axes.set_ylim(0, 1.3 * longest)
    axes.legend(loc="upper right", ncols=2)
    _titles(axes, "Time to publish a snapshot", "seconds", "step")
    return True


def _feeding(run: RunRecord, figure: Figure) -> bool:
    """Who got how much from whom, over the whole run."""
    fed: dict[str, dict[str, float]] = {}
    for event in run.events:
        told = event.data.get("by_source") if event.kind == "snapshot.arrived" else None
        if isinstance(told, dict):
            row = fed.setdefault(str(event.data.get("name", event.node)), {})
            for source in told:
                amount = number(told, source)
                row[source] = row.get(source, 0.0) + (amount if math.isfinite(amount) else 0.0)
    totals: dict[str, float] = {}
    for row in fed.values():
        for source, amount in row.items():
            totals[source] = totals.get(source, 0.0) + amount
    if not totals:
        return False
    sources = sorted(totals, key=lambda source: -totals[source])[:MAX_WORKERS]
    takers = sorted(fed)[:MAX_WORKERS]
    figure.set_size_inches(WIDTH_INCHES, 1.5 + 0.34 * max(len(takers), 3))
    axes = figure.subplots()
    table = [[fed[taker].get(source, 0.0) / 1e6 for source in sources] for taker in takers]
    picture = axes.imshow(table, aspect="auto", cmap="Blues", vmin=0)
    largest = max(max(row) for row in table)
    for y, row_mb in enumerate(table):
        for x, amount in enumerate(row_mb):
            if amount and len(sources) <= 10:
                colour = "white" if amount > 0.6 * largest else INK
                axes.text(x, y, f"{amount:,.0f}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(sources)), [_short(source, 14) for source in sources])
    axes.set_yticks(range(len(takers)), [_short(taker) for taker in takers])
    axes.grid(visible=False)
    figure.colorbar(picture, ax=axes, label="MB")
    _titles(axes, "Who fed whom with new weights", "", "from")
    return True


def _workers(run: RunRecord, figure: Figure) -> bool:
    counts = run.worker_rollouts()
    total = sum(counts.values())
    if not total:
        return False
    shown = list(counts.items())[:MAX_WORKERS]
    others = len(counts) - len(shown)
    if others:
        rest = total - sum(count for _, count in shown)
        shown.append((f"{others} others, mean", rest / others))
    figure.set_size_inches(WIDTH_INCHES, 1.15 + 0.36 * max(len(shown), 2))
    axes = figure.subplots()
    names = [_short(name) for name, _ in shown]
    bars = axes.barh(range(len(shown)), [count for _, count in shown], color=BLUE, height=0.62)
    axes.bar_label(bars, [f"{count:,.0f}  ({100 * count / total:.0f} %)" for _, count in shown], padding=5, fontsize=9)
    if others:
        bars[-1].set_color(GREY)
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.set_ylim(max(len(shown), 2) - 0.5, -0.5)
    axes.margins(x=0.16)
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    _titles(axes, "Rollouts that each worker supplied", "", "rollouts")
    return True


def _throughput(run: RunRecord, figure: Figure) -> bool:
    x, rate, length = _xs(run), run.column("tokens_per_s"), run.column("response_tokens_mean")
    if not any(map(math.isfinite, rate + length)):
        return False
    left, right = figure.subplots(1, 2)
    for axes, y, title, unit, colour in (
        (left, rate, "Tokens sampled, all workers", "tokens a second", GREEN),
        (right, length, "Length of a response, mean", "tokens", BLUE),
    ):
        if any(map(math.isfinite, y)):
            _raw_and_smooth(axes, x, y, colour)
            axes.set_ylim(bottom=0)
            axes.margins(y=0.15)
        else:
            _nothing(axes)
        _titles(axes, title, unit, "step")
    points = [(number(e, "version"), number(e, "response_tokens_mean")) for e in run.evals]
    points = [point for point in points if math.isfinite(point[1])]
    if points:
        right.plot(*zip(*points, strict=True), "o", color=ORANGE, markersize=5, label="held-out, greedy")
        right.legend(loc="upper right")
        right.set_ylim(0, max(y for _, y in [*points, *zip(x, filter(math.isfinite, length), strict=False)]) * 1.3)
    return True


PLOTS = (
    Plot("learning", "What the policy learned: held-out accuracy, and the reward of the rollouts.", 5.2, _learning),
    Plot("staleness", "How many versions old the rollouts were when they were trained on.", 3.2, _staleness),
    Plot("utilisation", "How the learner spent its time.", 3.0, _utilisation),
    Plot("policy", "How far the policy moved from the one that sampled, and how steadily.", 4.8, _policy),
    Plot("publication", "How long a new version takes to reach the workers.", 2.8, _publication),
    Plot("feeding", "From whom each worker took new weights.", 2.6, _feeding),
    Plot("workers", "Who supplied the rollouts.", 2.6, _workers),
    Plot("throughput", "How fast tokens came, and how long the responses were.", 3.0, _throughput),
)
"""In reading order."""


def _xs(run: RunRecord) -> list[float]:
    return run.column("step")


def _titles(axes: Axes, title: str, y: str, x: str = "") -> None:
    axes.set_title(title)
    axes.set_ylabel(y)
    axes.set_xlabel(x)
    if "step" in x or "version" in x:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))


def _marker(x: Sequence[float]) -> str:
    """Dots where there are few points, so that a run of one step shows something."""
    return "o" if len(x) <= 3 else ""


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_yticks([])


def _raw_and_smooth(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    """The values, pale, and their centred mean over about a tenth of the run."""
    if len(x) < 8:
        axes.plot(x, y, color=colour, marker="o", markersize=4)
        return
    reach = min(100, max(2, len(x) // 20))
    smooth = []
    for i in range(len(y)):
        near = [value for value in y[max(0, i - reach) : i + reach + 1] if math.isfinite(value)]
        smooth.append(sum(near) / len(near) if near else math.nan)
    axes.plot(x, y, color=colour, alpha=0.3, linewidth=1.0)
    axes.plot(x, smooth, color=colour)


def _label_ends(axes: Axes, points: Sequence[tuple[float, float]], colour: str, above: bool) -> None:
    """The first and the last value, written above or below their points."""
    for x, y in {points[0], points[-1]}:
        axes.annotate(
            f"{y:.0f} %", (x, y), (0, 7 if above else -15), textcoords="offset points",
            ha="center", fontsize=9, color=colour, fontweight="bold",
        )  # fmt: skip


def _bins(x: Sequence[float], columns: dict[str, list[float]]) -> tuple[list[float], float, dict[str, list[float]]]:
    """Means over neighbouring steps, so that there are at most `MAX_BARS`; with the width of a bar in steps."""
    size = max(1, math.ceil(len(x) / MAX_BARS))
    starts = range(0, len(x), size)

    def mean(values: Sequence[float], start: int) -> float:
        part = values[start : start + size]
        return sum(part) / len(part)

    return [mean(x, s) for s in starts], float(size), {k: [mean(v, s) for s in starts] for k, v in columns.items()}


def _short(name: str, limit: int = 24) -> str:
    """A worker's name for an axis: shortened, and free of what matplotlib would read as mathematics."""
    plain = name.replace("$", r"\$")
    return plain if len(plain) <= limit else f"{plain[: limit - 1]}…"
