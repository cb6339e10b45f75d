"""The partition: exact against brute force, and always a partition."""

from __future__ import annotations

from itertools import pairwise, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import CapacityError
from shoal.planning.partition import EXACT_NODES, Partition, StageNode, measured, partition

NS = 1e-9


def cost(layers_ns: list[int], counts: list[int], delays: list[list[int]], order: list[int], flights: int) -> tuple:
    stops = [0, *(node + 1 for node in order), 0]
    times = [layers_ns[node] * count for node, count in zip(order, counts, strict=True)]
    around = sum(times) + sum(delays[a][b] for a, b in pairwise(stops))
    return max(around, flights * max(times)), around, max(times)


def brute(layers: int, ns: list[int], most: list[int], delays: list[list[int]], flights: int, least: int) -> tuple:
    """The least cost over all orders of all sets and all shares."""
    best = None
    for size in range(least, len(ns) + 1):
        for order in permutations(range(len(ns)), size):
            for counts in product(*(range(1, most[node] + 1) for node in order)):
                if sum(counts) == layers:
                    found = cost(ns, list(counts), delays, list(order), flights)
                    best = found if best is None else min(best, found)
    assert best is not None
    return best


def plan_cost(plan: Partition) -> tuple[int, int, int]:
    return tuple(round(value / NS) for value in (plan.cycle_s, plan.round_s, plan.worst_s))


@st.composite
def problems(draw: st.DrawFn, max_nodes: int = 4, max_layers: int = 7) -> tuple:
    count = draw(st.integers(1, max_nodes))
    ns = draw(st.lists(st.integers(1, 60), min_size=count, max_size=count))
    most = draw(st.lists(st.integers(1, max_layers), min_size=count, max_size=count))
    layers = draw(st.integers(1, min(max_layers, sum(most))))
    delays = [[draw(st.integers(0, 100)) if a != b else 0 for b in range(count + 1)] for a in range(count + 1)]
    flights = draw(st.integers(1, 4))
    least = draw(st.integers(1, min(count, layers)))
    return layers, ns, most, delays, flights, least


def told(ns: list[int], most: list[int], delays: list[list[int]]) -> tuple[list[StageNode], list[list[float]]]:
    return [StageNode(str(n), ns[n] * NS, most[n]) for n in range(len(ns))], [[d * NS for d in row] for row in delays]


def solve(layers: int, ns: list[int], most: list[int], delays: list[list[int]], flights: int, least: int) -> Partition:
    nodes, seconds = told(ns, most, delays)
    return partition(layers, nodes, seconds, in_flight=flights, min_stages=least)


def check(plan: Partition, layers: int, ns: list[int], most: list[int], delays: list[list[int]], flights: int) -> None:
    """It is a partition, and costs what it says."""
    assert [s.first for s in plan.stages] == [0, *(s.last for s in plan.stages[:-1])]
    assert plan.stages[-1].last == layers
    order = [int(s.node) for s in plan.stages]
    counts = [s.last - s.first for s in plan.stages]
    assert len(set(order)) == len(order)
    assert all(1 <= count <= most[node] for node, count in zip(order, counts, strict=True))
    assert plan_cost(plan) == cost(ns, counts, delays, order, flights)


@given(problems())
@settings(max_examples=150)
def test_few_nodes_get_the_best_there_is(problem: tuple) -> None:
    layers, ns, most, delays, flights, _ = problem
    plan = solve(*problem)
    check(plan, layers, ns, most, delays, flights)
    assert plan_cost(plan) == brute(*problem)
    nodes, seconds = told(ns, most, delays)
    assert plan_cost(measured(plan, nodes, seconds, in_flight=flights)) == plan_cost(plan)


@given(problems(max_nodes=4, max_layers=30))
@settings(max_examples=60)
def test_many_nodes_get_a_partition_too(problem: tuple) -> None:
    """More nodes than are enumerated: copies of a few, which are no better than one of each where one is enough."""
    layers, ns, most, delays, flights, _ = problem
    copies = EXACT_NODES // len(ns) + 1
    many = range(len(ns) * copies)
    stretched = [
        [delays[0 if a < 0 else a % len(ns) + 1][0 if b < 0 else b % len(ns) + 1] for b in (-1, *many)]
        for a in (-1, *many)
    ]
    plan = solve(layers, ns * copies, most * copies, stretched, flights, 1)
    check(plan, layers, ns * copies, most * copies, stretched, flights)
    fastest = min(range(len(ns)), key=lambda node: ns[node])
    if most[fastest] >= layers and flights == 1 and not any(map(any, delays)):
        assert plan_cost(plan) == brute(layers, ns, most, delays, 1, 1)


def test_one_batch_takes_the_fastest_node_and_many_share_out_the_layers() -> None:
    nodes = [StageNode("a", 0.001, 30), StageNode("b", 0.001, 30), StageNode("c", 0.001, 30)]
    near = [[0.0] * 4 for _ in range(4)]
    far = [[0.0 if a == b else 0.030 for b in range(4)] for a in range(4)]
    assert len(partition(30, nodes, far).stages) == 1
    assert [s.last - s.first for s in partition(30, nodes, near, in_flight=3).stages] == [10, 10, 10]
    assert [s.last - s.first for s in partition(30, nodes, far, min_stages=3).stages] == [10, 10, 10]


def test_a_distant_node_is_used_only_where_memory_asks_for_it() -> None:
    delays = [[0.0, 0.001, 0.5], [0.001, 0.0, 0.5], [0.5, 0.5, 0.0]]
    roomy = [StageNode("near", 0.002, 30), StageNode("far", 0.0001, 30)]
    assert [s.node for s in partition(30, roomy, delays).stages] == ["near"]
    small = [StageNode("near", 0.002, 20), StageNode("far", 0.0001, 30)]
    assert {s.node for s in partition(30, small, delays).stages} != {"near"}


def test_too_little_memory_is_said() -> None:
    with pytest.raises(CapacityError, match="2 stages hold 9 of the model's 10 layers"):
        solve(10, [1, 1], [4, 5], [[0] * 3] * 3, 1, 1)
    with pytest.raises(CapacityError, match="0 stages"):
        partition(10, [], [[0.0]])
