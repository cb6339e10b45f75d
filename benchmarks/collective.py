"""A collective without an orchestrator: what it costs, what deaths do to it, and whether liars are found.

    shoal bench collective --json
    shoal bench collective --json -- --only liars --problems 2000

`steps`: sixteen node processes and a poser; scripted steps of a fixed time, so that what is longer than the steps is
overhead. `deaths`: nodes are killed (SIGKILL) at random moments while problems are in flight. `liars`: see
`_collective_liars`. The experts are scripted; processes, sockets, beacons, leases, ledger and votes are those that
models use.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from _collective_liars import play
from _collective_node import RUN, SKILLS, Setup, answer_of, enter, everybody
from shoal.agents.collective.node import CollectiveNode
from shoal.errors import TaskError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.swarm.grants import issue

from _common import benchmark, emit

NODES = 16
STEP_S = 2.0
STEPS = 4
PLANNERS = 3
LISTENS_S = 0.1
LEASE_S = 6.0
READY_S = 180.0

Result = tuple[list[dict[str, Any]], dict[str, float]]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Swarm:
    """Node processes, and one node in this process that poses problems."""

    def __init__(self, poser: CollectiveNode, processes: list[asyncio.subprocess.Process]) -> None:
        self.poser = poser
        self.processes = processes

    def kill(self, number: int) -> None:
        """End one node as a power cut would."""
        os.kill(self.processes[number].pid, signal.SIGKILL)


@asynccontextmanager
async def swarm(accuracy: float, seed: int) -> AsyncIterator[Swarm]:
    """`NODES` processes that all see each other."""
    root = Identity(Random(seed).randbytes(32))
    async with AsyncExitStack() as stack:
        fabric = await stack.enter_async_context(await Fabric.listen(root))
        ticket = fabric.ticket(RUN, secrets.token_bytes(16))
        now = time.time()

        def setup(identity_seed: bytes) -> Setup:
            key = Identity(identity_seed).public_key
            return Setup(
                seed=identity_seed.hex(),
                ticket=ticket.encode(),
                root=root.public_key,
                grant=issue(root, RUN, key, ("agent",), now, 3600.0),
                step_s=STEP_S,
                accuracy=accuracy,
                others=NODES,
                listens_s=LISTENS_S,
                lease_s=LEASE_S,
            )

        processes = []
        for number in range(NODES):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                "import _collective_node; _collective_node.main()",
                cwd=Path(__file__).parent,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            stack.push_async_callback(_end, process)
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(setup(Random(f"{seed} {number}").randbytes(32))) + b"\n")
            processes.append(process)
        own = secrets.token_bytes(32)
        asking = await stack.enter_async_context(await Fabric.connect(Identity(own), ticket))
        poser = await enter(stack, setup(own), asking, asks_only=True)
        await everybody(poser, NODES)
        try:
            async with asyncio.timeout(READY_S):
                for process in processes:
                    assert process.stdout is not None
                    if await process.stdout.readline() != b"ready\n":
                        raise TaskError("a node of the collective ended at its start.")
        except TimeoutError:
            raise TaskError(f"the nodes did not find each other within {READY_S:.0f} s.") from None
        yield Swarm(poser, processes)


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(10.0):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def problem(draw: Random) -> str:
    """One of `STEPS` steps."""
    return str(draw.randint(2, 9)) + "".join(f" {draw.choice('+*')} {draw.randint(2, 9)}" for _ in range(STEPS))


async def steps(rounds: int, seed: int) -> Result:
    """How much longer a chain takes than its steps, and how long a beacon takes."""
    draw = Random(seed)
    beacons, rows = [], []
    async with swarm(1.0, seed) as nodes:
        for _ in range(20):
            began = time.perf_counter()
            found = await nodes.poser.choose(SKILLS[0], LEASE_S)
            beacons.append(time.perf_counter() - began)
            if not found:
                raise TaskError("nobody answered a beacon.")
        for number in range(rounds):
            text = problem(draw)
            solved = await nodes.poser.solve(text, planners=PLANNERS, timeout_s=60.0)
            over = (solved.seconds - STEPS * STEP_S) / solved.seconds
            right = solved.answer == answer_of(text)
            rows.append({"part": "steps", "seconds": solved.seconds, "overhead": over, "right": right})
            say(f"steps {number + 1}/{rounds}: {solved.seconds:.2f} s for {STEPS * STEP_S:.0f} s of steps")
    return rows, {
        "overhead_fraction": statistics.median(row["overhead"] for row in rows),
        "overhead_fraction_max": max(row["overhead"] for row in rows),
        "beacon_ms": 1e3 * statistics.median(beacons),
        "beacon_max_ms": 1e3 * max(beacons),
        "steps_wrong": float(sum(not row["right"] for row in rows)),
    }


async def deaths(most: int, at_once: int, seed: int) -> Result:
    """Problems in flight while nodes are killed, and problems posed afterwards."""
    rows = []
    for count in range(most + 1):
        row = await _deaths(count, at_once, seed)
        rows.append(row)
        say(f"{count} of {NODES} killed: {row['right']:.2f} right, {row['unfinished']} unfinished")
    return rows, {
        "unfinished": float(sum(row["unfinished"] for row in rows)),
        "right_without_deaths": rows[0]["right"],
        "right_with_most_deaths": rows[-1]["right"],
    }


async def _deaths(count: int, at_once: int, seed: int) -> dict[str, Any]:
    draw = Random(f"{seed} {count}")
    async with swarm(0.9, seed) as nodes:

        async def solve(text: str) -> tuple[str, str | None]:
            found = await nodes.poser.solve(text, planners=PLANNERS, timeout_s=90.0)
            return text, found.answer

        flying = [asyncio.create_task(solve(problem(draw))) for _ in range(at_once)]
        for number in draw.sample(range(NODES), count):
            await asyncio.sleep(draw.uniform(0.0, 2.0))
            nodes.kill(number)
        during = await asyncio.gather(*flying)
        after = await asyncio.gather(*(solve(problem(draw)) for _ in range(at_once)))
    every = [*during, *after]
    return {
        "part": "deaths",
        "killed": count,
        "problems": len(every),
        "unfinished": sum(answer is None for _, answer in every),
        "right": sum(answer == answer_of(text) for text, answer in every) / len(every),
    }


def liars(problems: int, shares: list[float], seed: int) -> Result:
    """The weighted vote against the majority, with liars among the nodes."""
    rows = []
    for share in shares:
        for colluding in (False, True) if share else (False,):
            row = play(share, colluding, problems if share == 0.3 else max(problems // 5, 1), seed)
            say(
                f"{row['liars']} {row['kind']} liars of {NODES}: weighted {row['weighted']:.3f}, majority "
                f"{row['majority']:.3f}, by claims {row['by_claims']:.3f}"
            )
            rows.append({"part": "liars", **row})
    at_30 = [row for row in rows if row["share"] == 0.3]
    if not at_30:
        return rows, {}
    return rows, {
        "weighted_minus_majority_at_30pct": min(row["weighted_minus_majority"] for row in at_30),
        "weighted_minus_majority_low": min(row["interval"][0] for row in at_30),
        "liars_mass_last_over_first": max(row["liars_mass_last"] / row["liars_mass_first"] for row in at_30),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["steps", "deaths", "liars"], default=["steps", "deaths", "liars"])
    parser.add_argument("--rounds", type=int, default=10, help="Problems of the part `steps`.")
    parser.add_argument("--killed", type=int, default=5, help="Most nodes that are killed at once.")
    parser.add_argument("--at-once", type=int, default=4, help="Problems in flight while nodes are killed.")
    parser.add_argument("--problems", type=int, default=10_000, help="With 30 %% of liars; other rows have a fifth.")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3, 0.4], help="Of liars.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for part in arguments.only:
        if part == "steps":
            found, numbers = asyncio.run(steps(arguments.rounds, arguments.seed))
        elif part == "deaths":
            found, numbers = asyncio.run(deaths(arguments.killed, arguments.at_once, arguments.seed))
        else:
            found, numbers = liars(arguments.problems, arguments.shares, arguments.seed)
        rows += found
        headline |= numbers
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
