"""What a process holds, sampled, and whether it grows: pure but for `sample`.

    growth = slope x length of the second half / median of the second half

The slope is Theil and Sen's, the median of the slopes between all pairs of samples: one spike, or a step that is taken
back, moves it little, a steady leak moves it fully. A count that stays the same has growth 0.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

MAX_SAMPLES = 400
"""Of which slopes are made; of more, every n-th."""


class Sample(NamedTuple):
    """What one process holds."""

    at_s: float
    memory_mb: float
    """Resident memory that is no file's."""
    descriptors: int
    threads: int
    files: int
    """Below its folders of temporary files and caches."""


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median slope, by Theil and Sen; 0 for fewer than two points."""
    points = points[:: max(1, -(-len(points) // MAX_SAMPLES))]
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x2 > x1]
    return statistics.median(slopes) if slopes else 0.0


def growth(points: Sequence[tuple[float, float]]) -> float:
    """Of the second half of (time, value), as a share of its median."""
    if len(points) < 4:
        return 0.0
    middle_s = (points[0][0] + points[-1][0]) / 2
    late = [(at_s, value) for at_s, value in points if at_s >= middle_s]
    usual = statistics.median(value for _, value in late)
    return slope(late) * (late[-1][0] - late[0][0]) / usual if usual else float(late[-1][1] > 0)


def sample(pid: int, now_s: float, folders: Sequence[Path]) -> Sample:
    """A process now.

    Raises:
        OSError: there is none.
    """
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return Sample(
        now_s,
        int(status["RssAnon"].split()[0]) / 1000,
        len(os.listdir(f"/proc/{pid}/fd")),
        int(status["Threads"]),
        sum(len(names) for folder in folders for _, _, names in os.walk(folder)),
    )
