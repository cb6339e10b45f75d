"""A curve of bounded size, whatever the length of a run: neighbouring points become one as there come more.

Invariants: at most `MAX_POINTS` points are kept; each stands for as many values in a row as the others (the last one
for as many or fewer), by its first x and their mean, least and largest; no value is lost from these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_POINTS = 1024
"""More than a screen has columns for one curve; even, so that points join in pairs."""


@dataclass(slots=True)
class Point:
    """One or more values in a row."""

    x: float
    mean: float
    low: float
    high: float
    count: int


class Series:
    """One curve, whose x rises."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._stride = 1

    def __len__(self) -> int:
        return sum(point.count for point in self.points)

    def add(self, x: float, y: float) -> None:
        """One more value; what is not finite is left out, and what came at `x` and later is replaced."""
        if not (math.isfinite(x) and math.isfinite(y)):
            return
        while self.points and self.points[-1].x >= x:
            self.points.pop()
        last = self.points[-1] if self.points else None
        if last is not None and last.count < self._stride:
            last.mean += (y - last.mean) / (last.count + 1)
            last.low, last.high = min(last.low, y), max(last.high, y)
            last.count += 1
            return
        if len(self.points) == MAX_POINTS:
            self._join()
        self.points.append(Point(x, y, y, y, 1))

    @property
    def last(self) -> float:
        """The newest value, or the mean of the newest few; NaN where there is none."""
        return self.points[-1].mean if self.points else math.nan

    def _join(self) -> None:
        self.points = [_joined(a, b) for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
        self._stride *= 2


def _joined(one: Point, other: Point) -> Point:
    count = one.count + other.count
    mean = one.mean * (one.count / count) + other.mean * (other.count / count)
    return Point(one.x, mean, min(one.low, other.low), max(one.high, other.high), count)
