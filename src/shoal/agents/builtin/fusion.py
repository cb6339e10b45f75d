"""Reciprocal rank fusion of several rankings (Cormack, Clarke & Büttcher 2009). Pure.

score(d) = Σ_{r in rankings} 1 / (k + rank_r(d)), ranks from 1, k = 60 as in the paper; where a ranking does not have d,
it adds nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

K = 60


def fused(rankings: Sequence[Sequence[int]], count: int) -> list[tuple[int, float]]:
    """The numbers and scores of the `count` best over all rankings, best first; ties by number."""
    scores: dict[int, float] = defaultdict(float)
    for ranking in rankings:
        for rank, number in enumerate(ranking, start=1):
            scores[number] += 1 / (K + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:count]
