"""Which node computes which of a model's layers, and in which order a token visits them. Pure.

A token's round goes from the requester through all stages and back:

    requester ──▶ stage 1 ──▶ … ──▶ stage k ──▶ requester        k stages, k + 1 links

    t_i    = c_i · s_i                      c_i layers at s_i seconds a layer
    round  = Σ t_i + Σ delays               one batch's time for a token
    worst  = max t_i                        a stage is busy for so long with each batch
    cycle  = max(round, M · worst)          time a token of each of M batches that are under way together

Least cycle first, then least round, then least worst: with one batch under way that is the shortest round, and among
those the highest throughput; with many, the split is even and nodes are used that one batch would do without.

How layers are shared does not depend on the order of the nodes, nor the other way round, so for up to `EXACT_NODES`
nodes the best is found exactly: every set's shortest tour by dynamic programming (Held and Karp 1962), its best shares
by bisection over `worst`, from which the least work follows greedily. Above, a local search over sets and orders.

Invariants: every layer is on exactly one stage, stages hold 1 … `max_layers` consecutive layers; times are compared in
whole nanoseconds, so that equal plans compare equal.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from shoal.errors import CapacityError

EXACT_NODES = 8
"""More are searched, not enumerated."""

MAX_SWEEPS = 64
"""Of the local search; each improves the plan, and few are ever needed."""

NS = 1e9


@dataclass(frozen=True)
class StageNode:
    """What is known of one node."""

    name: str
    seconds_per_layer: float
    max_layers: int
    """What its memory holds."""


class Placement(NamedTuple):
    """One stage: layers `first` … `last` - 1."""

    node: str
    first: int
    last: int


@dataclass(frozen=True)
class Partition:
    """A plan; times in seconds."""

    stages: tuple[Placement, ...]
    """In the order of the layers."""
    round_s: float
    worst_s: float
    cycle_s: float


class _Cost(NamedTuple):
    """What is minimised, in nanoseconds; compared in this order."""

    cycle: int
    round: int
    worst: int


@dataclass(frozen=True)
class _Split:
    cost: _Cost
    order: tuple[int, ...]
    counts: tuple[int, ...]
    """Layers of each node of `order`."""


def partition(
    num_layers: int,
    nodes: Sequence[StageNode],
    delays_s: Sequence[Sequence[float]],
    *,
    in_flight: int = 1,
    min_stages: int = 1,
) -> Partition:
    """The best split.

    Args:
        delays_s: one-way delays; row and column 0 are the requester's, i + 1 those of `nodes[i]`.
        in_flight: batches under way together, M.
        min_stages: stages there must be at least, where there are as many nodes.

    Raises:
        CapacityError: the nodes together can't hold the layers.
    """
    assert num_layers >= 1 and in_flight >= 1
    assert len(delays_s) == len(nodes) + 1 and all(len(row) == len(delays_s) for row in delays_s)
    usable = [index for index, node in enumerate(nodes) if node.max_layers > 0]
    stops = [0, *(index + 1 for index in usable)]
    room = sum(nodes[index].max_layers for index in usable)
    if room < num_layers:
        raise CapacityError(
            f"{len(nodes)} stages hold {room} of the model's {num_layers} layers together.",
            "Add a stage, or one with more memory.",
        )
    problem = _Problem(
        num_layers,
        [max(1, round(nodes[index].seconds_per_layer * NS)) for index in usable],
        [min(num_layers, nodes[index].max_layers) for index in usable],
        [[max(0, round(delays_s[a][b] * NS)) for b in stops] for a in stops],
        in_flight,
        min(min_stages, len(usable), num_layers),
    )
    best = problem.exact() if len(usable) <= EXACT_NODES else problem.searched()
    stages, first = [], 0
    for index, count in zip(best.order, best.counts, strict=True):
        stages.append(Placement(nodes[usable[index]].name, first, first + count))
        first += count
    cost = best.cost
    return Partition(tuple(stages), cost.round / NS, cost.worst / NS, cost.cycle / NS)


def measured(
    plan: Partition, nodes: Sequence[StageNode], delays_s: Sequence[Sequence[float]], *, in_flight: int = 1
) -> Partition:
    """The same stages, with the times that they take by what is known now; arguments as for `partition`."""
    place = {node.name: index for index, node in enumerate(nodes)}
    times = [nodes[place[s.node]].seconds_per_layer * (s.last - s.first) for s in plan.stages]
    stops = [0, *(place[s.node] + 1 for s in plan.stages), 0]
    around_s = sum(times) + sum(delays_s[a][b] for a, b in pairwise(stops))
    return Partition(plan.stages, around_s, max(times), max(around_s, in_flight * max(times)))


@dataclass(frozen=True)
class _Problem:
    """The same in nanoseconds and indices; node i's delays are in row and column i + 1."""

    num_layers: int
    layer_ns: list[int]
    most: list[int]
    delays: list[list[int]]
    in_flight: int
    min_stages: int

    @property
    def num_nodes(self) -> int:
        return len(self.layer_ns)

    def exact(self) -> _Split:
        """The best over all sets of nodes."""
        best: _Split | None = None
        for length, order in self._tours():
            if len(order) < self.min_stages or not self._holds(order):
                continue
            split = self._split(length, order)
            if best is None or split.cost < best.cost:
                best = split
        assert best is not None  # all nodes together hold the layers, and are as many stages as there must be
        return best

    def _holds(self, order: Sequence[int]) -> bool:
        return len(order) <= self.num_layers <= sum(self.most[node] for node in order)

    def _tours(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The shortest tour through each set of nodes, and its length: Held and Karp's dynamic programme."""
        delays = self.delays
        paths: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {
            (1 << node, node): (delays[0][node + 1], (node,)) for node in range(self.num_nodes)
        }
        for members in range(1, 1 << self.num_nodes):
            ends = [node for node in range(self.num_nodes) if members >> node & 1]
            for end in ends:
                if members != 1 << end:
                    before = members ^ 1 << end
                    paths[members, end] = min(
                        (paths[before, last][0] + delays[last + 1][end + 1], (*paths[before, last][1], end))
                        for last in ends
                        if last != end
                    )
            yield min((paths[members, end][0] + delays[end + 1][0], paths[members, end][1]) for end in ends)

    def length(self, order: Sequence[int]) -> int:
        """Delays around the ring."""
        stops = [0, *(node + 1 for node in order), 0]
        return sum(self.delays[a][b] for a, b in pairwise(stops))

    def _split(self, length: int, order: tuple[int, ...]) -> _Split:
        """The best shares for these nodes.

        The least work within a bound on `worst` falls as the bound rises, so the best bound lies where `round` and
        M · `worst` cross.
        """
        times = {self.layer_ns[node] * n for node in order for n in range(1, self.most[node] + 1)}
        floor = max(self.layer_ns[node] for node in order)
        bounds = sorted(time for time in times if time >= floor)
        fits = bisect_left(bounds, True, key=lambda bound: self._fill(order, bound) is not None)
        bounds = bounds[fits:]

        def round_at(bound: int) -> int:
            counts = self._fill(order, bound)
            assert counts is not None
            return length + self._work(order, counts)

        crossing = bisect_left(bounds, True, key=lambda bound: self.in_flight * bound >= round_at(bound))
        near = bounds[max(0, crossing - 1) : crossing + 1]
        cycle = min(max(round_at(bound), self.in_flight * bound) for bound in near)
        allowed = bisect_right(bounds, cycle // self.in_flight)
        least = round_at(bounds[allowed - 1])
        worst = bounds[bisect_left(bounds, True, key=lambda bound: round_at(bound) <= least)]
        counts = self._fill(order, worst)
        assert counts is not None
        return _Split(_Cost(cycle, least, worst), order, counts)

    def _work(self, order: Sequence[int], counts: Sequence[int]) -> int:
        return sum(self.layer_ns[node] * count for node, count in zip(order, counts, strict=True))

    def _fill(self, order: Sequence[int], bound: int) -> tuple[int, ...] | None:
        """Shares of least work whose stages take at most `bound`: one layer each, the rest to the fastest."""
        most = [min(self.most[node], bound // self.layer_ns[node]) for node in order]
        if min(most) < 1 or sum(most) < self.num_layers:
            return None
        counts, left = [1] * len(order), self.num_layers - len(order)
        for place in sorted(range(len(order)), key=lambda place: (self.layer_ns[order[place]], place)):
            taken = min(left, most[place] - 1)
            counts[place] += taken
            left -= taken
        return tuple(counts)

    def searched(self) -> _Split:
        """A good split of many nodes: from the fastest that hold the layers, by the best single change, again."""
        order: tuple[int, ...] = ()
        for node in sorted(range(self.num_nodes), key=lambda node: (self.layer_ns[node], -self.most[node])):
            order = min((_inserted(order, node, at) for at in range(len(order) + 1)), key=self.length)
            if len(order) >= self.min_stages and sum(self.most[n] for n in order) >= self.num_layers:
                break
        if not self._holds(order):  # more nodes than layers: only the roomiest are few enough
            roomy = sorted(range(self.num_nodes), key=lambda node: -self.most[node])
            order = tuple(roomy[: max(self.min_stages, _needed([self.most[n] for n in roomy], self.num_layers))])
        best = self._split(self.length(order), order)
        for _ in range(MAX_SWEEPS):
            found = min(
                (self._split(self.length(o), o) for o in self._neighbours(best.order)),
                key=lambda split: split.cost,
                default=best,
            )
            if not found.cost < best.cost:
                break
            best = found
        return best

    def _neighbours(self, order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Orders one change away: a node more, less, another in its place, elsewhere, or a stretch turned round."""
        outside = [node for node in range(self.num_nodes) if node not in order]
        places = range(len(order))
        found = [_inserted(order, node, at) for node in outside for at in range(len(order) + 1)]
        found += [(*order[:at], node, *order[at + 1 :]) for node in outside for at in places]
        for at in places:
            rest = (*order[:at], *order[at + 1 :])
            found += [rest, *(_inserted(rest, order[at], to) for to in places if to != at)]
            found += [(*order[:at], *order[at:end][::-1], *order[end:]) for end in range(at + 3, len(order) + 1)]
        yield from (o for o in found if len(o) >= self.min_stages and self._holds(o))


def _inserted(order: tuple[int, ...], node: int, at: int) -> tuple[int, ...]:
    return (*order[:at], node, *order[at:])


def _needed(rooms: Sequence[int], layers: int) -> int:
    """How many of the first nodes hold the layers."""
    total = 0
    for number, room in enumerate(rooms, start=1):
        total += room
        if total >= layers:
            return number
    return len(rooms)
