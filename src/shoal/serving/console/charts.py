"""Charts as SVG, made here, so that pages need no library: curves, bars, a network, lanes over time. Pure.

Colours and fonts are the style sheet's; there are no style attributes, which the pages' policy would refuse.

Invariants: whatever the numbers are, a chart is well-formed and of bounded size; what is not finite is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.serving.console.html import Markup, amount, tag
from shoal.serving.console.series import Series

WIDTH, HEIGHT = 380.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 10.0, 10.0, 24.0
LETTER = 6.0
"""About the width of one."""

MAX_TICKS = 5
MAX_BARS = 64
MAX_LABEL_CHARS = 14
LARGEST = 1e30
"""What is larger, or no number, is left out."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart: points of rising x."""

    name: str
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...] = ()
    """x, least, largest of what each point stands for."""


def curve(name: str, series: Series, scale: float = 1.0) -> Curve:
    """A series as a line, with the range of what its points stand for."""
    points = tuple((p.x, p.mean * scale) for p in series.points)
    joined = any(p.count > 1 for p in series.points)
    band = tuple((p.x, p.low * scale, p.high * scale) for p in series.points) if joined else ()
    return Curve(name, points, band)


def lines(
    title: str,
    curves: Sequence[Curve],
    *,
    unit: str = "",
    x: str = "",
    bound: float | None = None,
    bound_name: str = "",
    zero: bool = True,
) -> Markup:
    """Curves over x, with a bound as a dashed line where there is one."""
    shown = [_drawable(c) for c in curves]
    shown = [c for c in shown if c.points]
    bound = bound if bound is not None and abs(bound) <= LARGEST else None
    if not shown:
        return _figure(title, unit, [tag("p", "not measured yet", class_="soft nothing")], ())
    xs = [px for c in shown for px, _ in c.points]
    ys = [y for c in shown for _, y in c.points]
    ys += [y for c in shown for _, low, high in c.band for y in (low, high)]
    ys += [1.2 * bound] if bound is not None else []  # with room for its name
    low_x, high_x = min(xs), max(xs)
    ticks = _ticks(min([*ys, 0.0] if zero else ys), max(ys))
    low, high = ticks[0], ticks[-1]

    def at_x(value: float) -> float:
        span = high_x - low_x
        return LEFT + (WIDTH - LEFT - RIGHT) * ((value - low_x) / span if span else 0.5)

    def at_y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * ((value - low) / (high - low))

    parts = [_grid_line(tick, at_y(tick)) for tick in ticks]
    for tick in _x_ticks(low_x, high_x):
        if x and at_x(tick) > WIDTH - RIGHT - LETTER * (len(x) + 3):
            continue
        parts.append(_label(amount(tick), at_x(tick), HEIGHT - 8, "middle"))
    if x:
        parts.append(_label(x, WIDTH - RIGHT, HEIGHT - 8, "end"))
    for number, one in enumerate(shown, start=1):
        if one.band:
            upper = [f"{at_x(px):.1f},{at_y(top):.1f}" for px, _, top in one.band]
            lower = [f"{at_x(px):.1f},{at_y(bottom):.1f}" for px, bottom, _ in reversed(one.band)]
            parts.append(tag("polygon", points=" ".join([*upper, *lower]), class_=f"band c{number}"))
        points = [f"{at_x(px):.1f},{at_y(y):.1f}" for px, y in one.points]
        parts.append(tag("polyline", points=" ".join(points), class_=f"line c{number}"))
        if len(points) <= 3:
            for point in points:
                cx, _, cy = point.partition(",")
                parts.append(tag("circle", cx=cx, cy=cy, r="3", class_=f"dot c{number}"))
    if bound is not None:
        y = f"{at_y(bound):.1f}"
        parts.append(tag("line", x1=f"{LEFT:g}", x2=f"{WIDTH - RIGHT:g}", y1=y, y2=y, class_="bound"))
        parts.append(_label(bound_name, WIDTH - RIGHT, at_y(bound) - 4, "end"))
    legend = [(one.name, _last(one)) for one in shown]
    return _figure(title, unit, [_svg(WIDTH, HEIGHT, f"{title}: {_words(legend)}", parts)], legend)


def bars(title: str, heights: Sequence[tuple[str, float]], *, unit: str = "") -> Markup:
    """Bars side by side, each with its label and value."""
    shown = [(name, y) for name, y in heights if 0 <= y <= LARGEST][:MAX_BARS]
    if not shown or not any(y for _, y in shown):
        return _figure(title, unit, [tag("p", "not measured yet", class_="soft nothing")], ())
    ticks = _ticks(0.0, max(y for _, y in shown))
    top, bottom = TOP + 8, HEIGHT - BOTTOM
    parts = [_grid_line(tick, bottom - (bottom - top) * tick / ticks[-1]) for tick in ticks]
    step = (WIDTH - LEFT - RIGHT) / len(shown)
    for number, (name, y) in enumerate(shown):
        height, left = (bottom - top) * y / ticks[-1], LEFT + step * (number + 0.15)
        parts.append(
            tag(
                "rect", tag("title", f"{name}: {amount(y)}"), x=f"{left:.1f}", y=f"{bottom - height:.1f}",
                width=f"{step * 0.7:.1f}", height=f"{height:.1f}", class_="bar c1",
            )
        )  # fmt: skip
        middle = LEFT + step * (number + 0.5)
        if len(shown) <= 12:
            parts.append(_label(amount(y), middle, bottom - height - 3, "middle"))
        if len(shown) <= 12 or number % (len(shown) // 8) == 0:
            parts.append(_label(clipped(name), middle, HEIGHT - 8, "middle"))
    words = f"{title}: " + ", ".join(f"{name} {amount(y)}" for name, y in shown[:MAX_TICKS])
    return _figure(title, unit, [_svg(WIDTH, HEIGHT, words, parts)], ())


def network(
    nodes: Sequence[tuple[str, str]], edges: Sequence[tuple[int, int, str, float]], middle: int | None = 0
) -> Markup:
    """Nodes around a circle, one of them in the middle, and edges between them.

    Args:
        nodes: name and state (a class: active, idle, parked, silent, lost, starting) of each.
        edges: from, to, what is written on it, and how thick it is, 0 to 1.
        middle: the node in the middle; None: all are around.
    """
    width, height = 560.0, 360.0
    around = [number for number in range(len(nodes)) if number != middle]
    places = {middle: (width / 2, height / 2)} if middle is not None else {}
    for at, number in enumerate(around):
        angle = 2 * math.pi * at / len(around) - math.pi / 2
        places[number] = (width / 2 + 195 * math.cos(angle), height / 2 + 138 * math.sin(angle))
    parts = []
    labels = []
    for one, other, words, weight in edges:
        (x1, y1), (x2, y2) = places[one], places[other]
        parts.append(
            tag(
                "line", tag("title", f"{nodes[one][0]} – {nodes[other][0]}: {words}"), x1=f"{x1:.1f}", y1=f"{y1:.1f}",
                x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_="edge", stroke_width=f"{1 + 4 * weight:.1f}",
            )
        )  # fmt: skip
        # Nearer to the outer end, where edges lie further apart.
        share = 0.6 if middle in (one, other) else 0.5
        if other == middle:
            (x1, y1), (x2, y2) = (x2, y2), (x1, y1)
        labels.append(_label(words, x1 + (x2 - x1) * share, y1 + (y2 - y1) * share - 3, "middle", "halo"))
    for number, (name, state) in enumerate(nodes):
        x, y = places[number]
        parts.append(tag("circle", tag("title", name), cx=f"{x:.1f}", cy=f"{y:.1f}", r="9", class_=f"node {state}"))
        labels.append(_label(clipped(name), x, y + 23, "middle", "halo"))
    words = f"{len(nodes)} nodes, {len(edges)} links"
    return tag("figure", _svg(width, height, words, [*parts, *labels]), class_="chart wide")


def stripe(spans: Sequence[tuple[float, float, str, str]], width: float = 1000.0) -> Markup:
    """One lane: spans from 0 to 1 with a class and words each."""
    parts = [
        tag(
            "rect", tag("title", words), x=f"{start * width:.1f}", y="1", height="12",
            width=f"{max(2.0, (end - start) * width):.1f}", class_=kind,
        )
        for start, end, kind, words in spans
    ]  # fmt: skip
    return tag("svg", *parts, viewBox=f"0 0 {width:g} 14", preserveAspectRatio="none", class_="stripe")


def clipped(name: str) -> str:
    return name if len(name) <= MAX_LABEL_CHARS else f"{name[: MAX_LABEL_CHARS - 1]}…"


def _drawable(one: Curve) -> Curve:
    """What of a curve can be drawn."""
    points = tuple(point for point in one.points if all(abs(value) <= LARGEST for value in point))
    band = tuple(point for point in one.band if all(abs(value) <= LARGEST for value in point))
    return Curve(one.name, points, band)


def _svg(width: float, height: float, words: str, parts: Sequence[Markup]) -> Markup:
    return tag("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=words)


def _figure(title: str, unit: str, body: Sequence[Markup], legend: Sequence[tuple[str, str]]) -> Markup:
    head = tag("figcaption", tag("b", title), *([tag("span", unit, class_="soft")] if unit else []))
    keys = [
        tag("span", name, " ", tag("b", last), class_=f"key c{n}") for n, (name, last) in enumerate(legend, start=1)
    ]
    return tag("figure", head, *body, tag("div", *keys, class_="legend"), class_="chart")


def _label(words: str, x: float, y: float, anchor: str, kind: str = "") -> Markup:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=f"label {kind}".strip())


def _grid_line(tick: float, y: float) -> Markup:
    line = tag("line", x1=f"{LEFT:g}", x2=f"{WIDTH - RIGHT:g}", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="gridline")
    return tag("g", line, _label(amount(tick), LEFT - 5, y + 3.5, "end"))


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers around what is shown, two at least."""
    if high - low <= 1e-9 * max(1.0, abs(high), abs(low)):
        high, low = high + (abs(high) or 1.0) / 2, low - (0.0 if low >= 0 else abs(low) / 2)
    rough = (high - low) / (MAX_TICKS - 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _x_ticks(low: float, high: float) -> list[float]:
    inside = [tick for tick in _ticks(low, high) if low <= tick <= high]
    return inside[: 2 * MAX_TICKS] if high > low else [low]


def _last(one: Curve) -> str:
    return amount(one.points[-1][1])


def _words(legend: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {last}" for name, last in legend)
