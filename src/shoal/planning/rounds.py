"""How long a round of speculative decoding takes on a ring of stages, and what it earns: the paper's formulas and ours.

Deviations from DSD (arXiv 2511.11733):
1. The paper counts N − 1 links, since it stops where the last stage has its answer. The token must also come back to
   where the next one starts: a ring of N stages has N links.
2. The paper's round takes k·t0, the compute of k single steps. A pass over γ + 1 tokens is not γ + 1 passes: what it
   takes, T_verify(γ + 1), is measured (in bf16 on a CPU eight tokens take about what one does).
3. The paper leaves out the drafter. Here its time counts.

Words: N stages, t0 compute of a step over all stages, t1 one-way delay of a link, γ drafted tokens, k tokens a round.

    the paper   plain  k·(t0 + (N−1)·t1)      DSD    k·t0 + (N−1)·t1        saved a token  (N−1)·t1·(k−1)/k
    ours        plain  k·(T_verify(1) + N·t1) round  t_draft(γ) + T_verify(γ+1) + N·t1
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """Seconds by the number of tokens a row: measured at some, straight between them, the last slope beyond.

    Args:
        points: tokens -> seconds; at least one.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        assert self.points and all(tokens >= 0 and seconds >= 0 for tokens, seconds in self.points)
        assert all(a[0] < b[0] for a, b in zip(self.points, self.points[1:], strict=False))

    @staticmethod
    def measured(points: Mapping[int, float]) -> Curve:
        """Of measurements, made monotone: more tokens never take less time but for noise."""
        rising: list[tuple[int, float]] = []
        for tokens, seconds in sorted(points.items()):
            rising.append((tokens, max(seconds, rising[-1][1]) if rising else seconds))
        return Curve(tuple(rising))

    @staticmethod
    def linear(base_s: float, per_token_s: float) -> Curve:
        """base + tokens × slope."""
        return Curve(((0, base_s), (1, base_s + per_token_s)))

    def at(self, tokens: int) -> float:
        """Seconds for so many tokens."""
        points = self.points
        if len(points) == 1 or tokens <= points[0][0]:
            return points[0][1]
        index = min(max(1, bisect_left(points, tokens, key=lambda point: point[0])), len(points) - 1)
        (x0, y0), (x1, y1) = points[index - 1], points[index]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


@dataclass(frozen=True)
class Ring:
    """A target and its drafter, as measured."""

    verify: Curve
    """T_verify(tokens a row), summed over the stages."""
    draft: Curve
    """t_draft(γ); its value at 0 is not used."""
    num_links: int = 0
    """N for a ring of N > 1 stages; 0 on one machine."""
    link_s: float = 0.0
    """t1, the mean over the ring's links."""
    payload_s: float = 0.0
    """What a drafter's place adds: bytes that cross its closing link, and are no part of a plain step."""

    def __post_init__(self) -> None:
        assert self.num_links >= 0 and self.link_s >= 0 and self.payload_s >= 0

    @property
    def delay_s(self) -> float:
        """N·t1."""
        return self.num_links * self.link_s

    def plain_s(self) -> float:
        """A step without speculation."""
        return self.verify.at(1) + self.delay_s

    def round_s(self, gamma: int) -> float:
        """A round with γ drafts; with none it is a plain step."""
        if gamma == 0:
            return self.plain_s()
        return self.draft.at(gamma) + self.verify.at(gamma + 1) + self.delay_s + self.payload_s


def paper_plain_s(tokens: float, step_s: float, num_stages: int, link_s: float) -> float:
    """k·(t0 + (N−1)·t1)."""
    return tokens * (step_s + (num_stages - 1) * link_s)


def paper_round_s(tokens: float, step_s: float, num_stages: int, link_s: float) -> float:
    """k·t0 + (N−1)·t1."""
    return tokens * step_s + (num_stages - 1) * link_s


def paper_saving_s(tokens: float, num_stages: int, link_s: float) -> float:
    """(N−1)·t1·(k−1)/k an accepted token."""
    return (num_stages - 1) * link_s * (tokens - 1) / tokens


@dataclass(frozen=True)
class Site:
    """A machine on which the drafter may run."""

    name: str
    draft: Curve
    """t_draft there."""
    upload_bytes: Curve
    """Bytes by γ that cross the closing link only because the drafter is here: beside the last stage the drafted ids;
    beside the first the accepted ids, the features of an `eagle` head, and for sampled drafts their distributions
    (they must reach the verifier)."""


def place(sites: tuple[Site, ...], ring: Ring, gamma: int, bytes_per_s: float) -> tuple[Site, Ring]:
    """Where the round with γ drafts is shortest, and the ring as seen from there; the first of equals.

    The N links are crossed wherever the drafter is: it closes the ring either before or after the last of them.
    """
    assert sites and bytes_per_s > 0
    rings = [
        Ring(ring.verify, site.draft, ring.num_links, ring.link_s, site.upload_bytes.at(gamma) / bytes_per_s)
        for site in sites
    ]
    best = min(range(len(sites)), key=lambda index: rings[index].round_s(gamma))
    return sites[best], rings[best]
