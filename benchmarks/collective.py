"""A collective without an orchestrator: what it costs, what deaths and cuts do to it, liars, and models that learnt.

    shoal bench collective --json
    shoal bench collective --json -- --only liars --problems 2000
    shoal bench collective --json --timeout-s 40000 -- --only experts --folder runs/collective

`steps`      sixteen node processes and a poser; scripted steps of a fixed time, so that what is longer is overhead
`deaths`     nodes killed (SIGKILL) at random moments while problems are in flight
`issuer`     the ticket's issuer and one of two routers killed likewise
`partition`  two halves cut from each other and mended, problems on both sides
`liars`      see `_collective_liars`
`experts`    LoRA experts trained here, on problems of which half need two skills: see `_collective_experts`; hours,
             resumable by --folder, and therefore not part of a run without --only
`table`      GSM8K and BIG-Bench Hard from SHOAL_DATA: see `_collective_table`; resumable, only by --only, too

In the first five the experts are scripted; processes, sockets, beacons, leases, ledger and votes are those that models
use.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path
from random import Random
from typing import Any

from _collective_faults import PLANNERS, STEPS, deaths, issuer, partition, problem, say
from _collective_liars import NODES, play
from _collective_node import SKILLS, answer_of
from _collective_swarm import LEASE_S, swarm
from shoal.errors import ConfigError, TaskError

from _common import benchmark, emit

STEP_S = 2.0

QUICK = ("steps", "deaths", "issuer", "partition", "liars")
PARTS = (*QUICK, "experts", "table")

Result = tuple[list[dict[str, Any]], dict[str, float]]


async def steps(rounds: int, seed: int) -> Result:
    """How much longer a chain takes than its steps, and how long a beacon takes."""
    draw = Random(seed)
    beacons: list[float] = []
    rows: list[dict[str, Any]] = []
    async with swarm(step_s=STEP_S, accuracy=1.0, seed=seed) as nodes:
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


def run_part(part: str, given: argparse.Namespace) -> Result:
    """One part's rows and headline."""
    if part == "steps":
        return asyncio.run(steps(given.rounds, given.seed))
    if part == "deaths":
        return asyncio.run(deaths(given.killed, given.row_problems, given.at_once, given.seed))
    if part == "issuer":
        return asyncio.run(issuer(given.row_problems, given.at_once, given.seed))
    if part == "partition":
        return asyncio.run(partition(given.row_problems, given.at_once, given.seed))
    if part == "liars":
        return liars(given.problems, given.shares, given.seed)
    if given.folder is None:
        raise ConfigError(f"the part {part} keeps what it trains and solves.", "Give --folder.")
    if part == "experts":
        from _collective_experts import experts

        return experts(given.folder, given)
    from _collective_table import scores

    return scores(given.folder, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=QUICK)
    parser.add_argument("--rounds", type=int, default=10, help="Problems of the part `steps`.")
    parser.add_argument("--killed", type=int, default=5, help="Most nodes that are killed in a row.")
    parser.add_argument("--row-problems", type=int, default=80, help="Of each row with deaths or cuts.")
    parser.add_argument("--at-once", type=int, default=6, help="Problems in flight in such a row.")
    parser.add_argument("--problems", type=int, default=10_000, help="With 30 %% of liars; other rows have a fifth.")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3, 0.4], help="Of liars.")
    parser.add_argument("--folder", type=Path, help="Of `experts` and `table`: what is there is not made again.")
    parser.add_argument("--train-examples", type=int, default=2000, help="Of each skill, of `experts`.")
    parser.add_argument("--test-problems", type=int, default=300, help="Of `experts`, and of each task of `table`.")
    parser.add_argument("--model", default="embedded", help="Of `experts` and `table`.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of `experts` and `table`.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for part in given.only:
        found, numbers = run_part(part, given)
        rows += found
        headline |= numbers
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
