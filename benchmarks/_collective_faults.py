"""A collective whose parts die or lose each other: nodes, the ticket's issuer, a router, half of the network.

Experts are scripted: right in a fixed share of steps, the same ones in every row, so that rows differ by what died and
not by luck alone. Problems come one after the other, a few at a time, while things happen at random moments.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

from msgspec.structs import replace

from _collective_node import answer_of
from _collective_swarm import ANSWER_S, NODES, NodeProcess, Swarm, elsewhere, kill, start_router, swarm
from shoal.coordinator.reporting.paired import paired_interval
from shoal.errors import TaskError
from shoal.fabric.ticket import RouterAddress, Ticket
from shoal.lab.network import Network, Node
from shoal.lab.proxy import ProxyLab

STEPS = 4
PLANNERS = 3
STEP_S = 1.0
ACCURACY = 0.95

TIMEOUT_S, MOST_S = 90.0, 600.0
TIMES_SLOWEST = 8.0
"""A problem may take so many times what the slowest took before anything happened, but no less than the one and no more
than the other."""

UNHARMED_S = 400.0
"""One of those may take so long, on a machine that has other work."""

KILLS_WITHIN = 0.5
"""Nodes die while this part of the row's problems is being solved."""

CUT_S = 12.0
"""Longer than the leases of connections (2 s) and of steps (6 s)."""

MEND_S = 90.0
"""Ledgers are equal again within this, or are not."""

SAID_EVERY = 20

Rows = list[dict[str, Any]]
Solve = Callable[[str], Awaitable[str | None]]


def say(text: str) -> None:
    print(f"collective: {text}", file=sys.stderr, flush=True)


def problem(draw: Random) -> str:
    """One of `STEPS` steps."""
    return str(draw.randint(2, 9)) + "".join(f" {draw.choice('+*')} {draw.randint(2, 9)}" for _ in range(STEPS))


def problems(count: int, seed: int) -> list[str]:
    """Those that every row solves."""
    draw = Random(f"{seed} problems")
    return [problem(draw) for _ in range(count)]


async def solve_all(
    solve: Solve, texts: Sequence[str], at_once: int, done: Callable[[int], None] = lambda _: None
) -> list[str | None]:
    """Answers in order; `done` is told how many there are."""
    slots = asyncio.Semaphore(at_once)
    count = 0

    async def one(text: str) -> str | None:
        nonlocal count
        async with slots:
            found = await solve(text)
        count += 1
        if count % SAID_EVERY == 0:
            say(f"{count} of {len(texts)} problems")
        done(count)
        return found

    return list(await asyncio.gather(*(one(text) for text in texts)))


def here(nodes: Swarm, timeout_s: float) -> Solve:
    """How the node in this process solves a problem."""

    async def solve(text: str) -> str | None:
        return (await nodes.poser.solve(text, planners=PLANNERS, timeout_s=timeout_s)).answer

    return solve


def there(node: NodeProcess, timeout_s: float) -> Solve:
    """How another node does."""

    async def solve(text: str) -> str | None:
        answer = (await node.ask(timeout_s + ANSWER_S, problem=text, planners=PLANNERS, timeout_s=timeout_s))["answer"]
        return None if answer is None else str(answer)

    return solve


async def slowest(solves: Sequence[Solve], at_once: int, seed: int) -> float:
    """How long a problem may take, from the slowest of as many at once as will come, before anything happens."""
    draw = Random(f"{seed} unharmed")
    took: list[float] = []

    async def one(solve: Solve) -> None:
        began = time.monotonic()
        if await solve(problem(draw)) is None:
            raise TaskError(f"a problem is not solved within {UNHARMED_S:.0f} s although nobody died.")
        took.append(time.monotonic() - began)

    await asyncio.gather(*(one(solves[number % len(solves)]) for number in range(at_once)))
    may_s = min(max(TIMEOUT_S, TIMES_SLOWEST * max(took)), MOST_S)
    say(f"unharmed, problems of {STEPS * STEP_S:.0f} s take up to {max(took):.1f} s; {may_s:.0f} s are given")
    return may_s


async def deaths(most: int, count: int, at_once: int, seed: int) -> tuple[Rows, dict[str, float]]:
    """Nodes killed at random moments: one row for each number of them."""
    rows: Rows = []
    right: list[list[bool]] = []
    texts = problems(count, seed)
    for killed in range(most + 1):
        answers = await _killing(killed, texts, at_once, seed)
        right.append([answer == answer_of(text) for answer, text in zip(answers, texts, strict=True)])
        low, high = paired_interval(right[0], right[-1])
        share = killed / NODES
        fall = statistics.mean(right[0]) - statistics.mean(right[-1])
        row: dict[str, Any] = {
            "part": "deaths",
            "killed": killed,
            "problems": count,
            "unfinished": sum(answer is None for answer in answers),
            "right": statistics.mean(right[-1]),
            "dead_share": share,
            "fall_minus_dead_share": fall - share,
            "fall_minus_dead_share_interval": [-high - share, -low - share],
        }
        rows.append(row)
        say(f"{killed} of {NODES} killed: {row['right']:.3f} right of {count}, {row['unfinished']} unfinished")
    headline = {
        "unfinished": float(sum(row["unfinished"] for row in rows)),
        "right_without_deaths": rows[0]["right"],
        "right_with_most_deaths": rows[-1]["right"],
    }
    if most:
        headline["accuracy_fall_minus_dead_share"] = max(row["fall_minus_dead_share"] for row in rows[1:])
        mean, half = _pooled(right)
        headline |= {"accuracy_fall_minus_dead_share_mean": mean, "accuracy_fall_minus_dead_share_high": mean + half}
    return rows, headline


def _pooled(right: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Over all rows with deaths: mean fall less the dead share, and half the width of its interval by problems."""
    share = statistics.mean(killed / NODES for killed in range(1, len(right)))
    each = [float(row[0]) - statistics.mean(map(float, row[1:])) - share for row in zip(*right, strict=True)]
    spread = statistics.stdev(each) if len(each) > 1 else math.inf
    return statistics.mean(each), 1.96 * spread / math.sqrt(len(each))


async def _killing(killed: int, texts: Sequence[str], at_once: int, seed: int) -> list[str | None]:
    draw = Random(f"{seed} {killed}")
    at = sorted(draw.uniform(0.0, KILLS_WITHIN) * len(texts) for _ in range(killed))
    victims = draw.sample(range(NODES), killed)
    async with swarm(step_s=STEP_S, accuracy=ACCURACY, seed=seed) as nodes:

        def done(count: int) -> None:
            while at and at[0] <= count:
                at.pop(0)
                nodes.nodes[victims.pop()].kill()

        may_s = await slowest([here(nodes, UNHARMED_S)], at_once, seed)
        found = await solve_all(here(nodes, may_s), texts, at_once, done)
    if at:
        raise TaskError("not every node was killed: there were too few problems.")
    return found


async def issuer(count: int, at_once: int, seed: int) -> tuple[Rows, dict[str, float]]:
    """One of two routers, and whoever issued the tickets, killed while problems are in flight."""
    texts = problems(count, seed)
    draw = Random(f"{seed} issuer")
    at = sorted(draw.uniform(0.1, KILLS_WITHIN) * count for _ in range(2))
    async with swarm(step_s=STEP_S, accuracy=ACCURACY, seed=seed, num_routers=2) as nodes:
        victims = [("router", nodes.routers[0]), ("issuer", nodes.issuer)]
        died: list[str] = []
        after = 0

        def done(number: int) -> None:
            nonlocal after
            after += not victims
            while at and at[0] <= number:
                at.pop(0)
                name, process = victims.pop()
                kill(process)
                died.append(name)
                say(f"{name} killed after {number} of {count} problems")

        may_s = await slowest([here(nodes, UNHARMED_S)], at_once, seed)
        answers = await solve_all(here(nodes, may_s), texts, at_once, done)
    row: dict[str, Any] = {
        "part": "issuer",
        "killed": died,
        "problems": count,
        "solved_afterwards": after,
        "unfinished": sum(answer is None for answer in answers),
        "right": statistics.mean(a == answer_of(t) for a, t in zip(answers, texts, strict=True)),
    }
    say(f"issuer and a router killed: {row['right']:.3f} right of {count}, {row['unfinished']} unfinished")
    return [row], {"issuer_unfinished": float(row["unfinished"]), "issuer_right": row["right"]}


async def partition(count: int, at_once: int, seed: int) -> tuple[Rows, dict[str, float]]:
    """Two halves, each with a router of its own, cut from each other and mended while both pose problems."""
    network = Network(nodes=tuple(Node(name=name) for name in ("left", "right", "router-0", "router-1")))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-partition-")))
        lab = await stack.enter_async_context(ProxyLab(network))
        routers = [await start_router(stack, folder / f"router-{n}") for n in range(2)]
        views: dict[str, tuple[RouterAddress, ...]] = {}
        for side in ("left", "right"):
            there = [await lab.relay(side, f"router-{n}", port) for n, (_, _, port) in enumerate(routers)]
            views[side] = tuple(elsewhere(line, *at) for (_, line, _), at in zip(routers, there, strict=True))

        def seen_from(ticket: Ticket, number: int) -> Ticket:
            return replace(ticket, routers=views["left" if number < NODES // 2 else "right"])

        nodes = await stack.enter_async_context(
            swarm(
                step_s=STEP_S,
                accuracy=1.0,
                seed=seed,
                seen_from=seen_from,
                router_lines=[router.encode() for router in views["left"]],
            )
        )
        return await _cut_and_mend(lab, nodes, count, at_once, seed)


async def _cut_and_mend(
    lab: ProxyLab, nodes: Swarm, count: int, at_once: int, seed: int
) -> tuple[Rows, dict[str, float]]:
    """Both sides pose problems before, during and after the cut; then everybody's ledger is compared."""
    texts = problems(count, seed)
    far = nodes.nodes[-1]
    may_s = await slowest([here(nodes, UNHARMED_S), there(far, UNHARMED_S)], at_once, seed)
    cut = asyncio.create_task(_cutting(lab, nodes, Random(f"{seed} cut").uniform(1.0, 3.0)))
    half = count // 2
    left, right = await asyncio.gather(
        solve_all(here(nodes, may_s), texts[:half], max(1, at_once // 2)),
        solve_all(there(far, may_s), texts[half:], max(1, at_once // 2)),
    )
    seen, seen_there = await cut
    answers = [*left, *right]
    said, mended_s = await _equal(nodes)
    executed = sum(one["executed"] for one in said)
    row: dict[str, Any] = {
        "part": "partition",
        "problems": count,
        "cut_s": CUT_S,
        "agents_seen_while_cut": seen,
        "agents_seen_on_the_other_side": seen_there,
        "may_take_s": may_s,
        "unfinished": sum(answer is None for answer in answers),
        "right": statistics.mean(a == answer_of(t) for a, t in zip(answers, texts, strict=True)),
        "executed": executed,
        "delivered_to_others": said[0]["delivered"],
        "late": said[0]["late"],
        "double_counted": max(one["doubled"] for one in said),
        "convicted": max(one["convicted"] for one in said),
        "ledgers": len({one["root"] for one in said}),
        "equal_after_s": mended_s,
    }
    say(
        f"partition: {row['unfinished']} unfinished, {executed} steps executed, {row['late']} late, "
        f"{row['double_counted']} counted twice, {row['ledgers']} different ledgers"
    )
    return [row], {
        "partition_unfinished": float(row["unfinished"]),
        "agents_seen_while_cut": float(seen),
        "agents_seen_on_the_other_side": float(seen_there),
        "double_counted": float(row["double_counted"]),
        "ledgers_equal": float(row["ledgers"] == 1),
        "ledgers_equal_after_s": mended_s,
    }


async def _cutting(lab: ProxyLab, nodes: Swarm, after_s: float) -> tuple[int, int]:
    """Cut once problems are in flight, mend later: each side keeps its router.

    Gives how many agents each side saw shortly before: the poser others, the last node itself and others.
    """
    await asyncio.sleep(after_s)
    await lab.partition(("left", "router-0"), ("right", "router-1"))
    say("the two halves are cut from each other")
    await asyncio.sleep(CUT_S)
    seen = nodes.poser.num_peers, 1 + (await nodes.nodes[-1].ask(ANSWER_S))["peers"]
    await lab.heal()
    say(f"mended; of {NODES} agents one side saw {seen[0]}, the other {seen[1]}")
    return seen


async def _equal(nodes: Swarm) -> tuple[list[dict[str, Any]], float]:
    """Everybody's accounts once all ledgers are the same, or when the time is up; and how long that took."""
    began = time.monotonic()
    while True:
        said = [nodes.poser_accounts(), *await asyncio.gather(*(node.ask(ANSWER_S) for node in nodes.nodes))]
        passed_s = time.monotonic() - began
        if len({one["root"] for one in said}) == 1 or passed_s > MEND_S:
            return said, passed_s
        await asyncio.sleep(0.5)
