"""Everybody behind NAT, one public router: does a run finish, what can the router read, how soon is a loss noticed?

Real commands in a packet lab of network namespaces (docs/lab.md), a tiny model, sums to learn. Parts (`--only`):

    nat         coordinator and learner, and five workers, each behind a NAT; a tap before the router decrypts all
                that it relays and is searched for planted plaintexts; then the same tap hears a control
    restart     the same run with the router killed (-9) and started again on the way
    failover    the same run with two routers, the busier of which is killed for good
    detect      a worker killed (-9), and a worker cut off silently: until the coordinator and another node know
    converge    64 light nodes after a partition: until all agree

Needs root and /dev/net/tun. Some five minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from _inbound import inbound_connections
from _nat import NatRun, Pulse, tiny_model
from _plaintext import Findings, Plant, search
from shoal.errors import RunError, ShoalError
from shoal.fabric.ticket import Ticket
from shoal.lab import tun
from shoal.protocol.codec import read_jsonl
from shoal.protocol.episode import Episode

from _common import benchmark, emit

RUN_S = 420.0
"""A run that takes longer has failed: on a quiet machine it takes half a minute."""

JOIN_S = 240.0
"""All workers have imported torch and joined by then."""

BEFORE_STEPS = 5
"""Steps that are done before a router is killed."""

DOWN_S = 4.0
"""The killed router is away for so long."""

ENDLESS_STEPS = 1_000_000

NOTICE_S = 20.0
"""A loss that is noticed later counts as not noticed."""

SETTLE_S = 1.0
"""Between trials."""

CONTROL_PATTERNS = 50
"""Of each kind, said aloud for the tap to find."""

WEIGHTS_EVERY_S = 0.2

LIGHT_NODES = 64


class Part(NamedTuple):
    """What one part gives."""

    rows: list[dict[str, Any]]
    headline: dict[str, float]


def say(text: str) -> None:
    print(f"join: {text}", file=sys.stderr, flush=True)


async def nat(folder: Path, model: Path, options: argparse.Namespace) -> Part:
    """The run behind NATs, with a tap, and what the tap shows."""
    async with NatRun(folder, model, steps=options.steps, num_workers=options.workers) as run:
        num_let_in = await inbound_connections(run.lab)
        tapped, control = folder / "tapped", folder / "control"
        await run.start_router(0, tap=tapped)
        plant = Plant()
        async with collecting_weights(run, plant):
            row = await whole_run(run)
        plant_run(run, plant)
        await run.stop_tap(0)
        seen = await asyncio.to_thread(search, sorted(tapped.iterdir()), plant)
        say(f"the tap decrypted {seen.bytes_searched} bytes; {seen.total_bytes} of them are planted plaintext")
        said = sample(plant)
        await run.start_tap(0, control)
        await run.say_aloud(said)
        await run.stop_tap(0)
        heard = await asyncio.to_thread(search, sorted(control.iterdir()), said)
        share = found_share(heard, said)
        say(f"of what was said aloud it found {share:.0%}")
    rows = [
        {"part": "nat", "inbound_connections": num_let_in, **row},
        *(
            {
                "part": "plaintext",
                "kind": kind,
                "planted": len(patterns),
                "bytes_found": seen.bytes_found[kind],
                "control_said": len(said.patterns[kind]),
                "control_found": len(heard.patterns_found[kind]),
            }
            for kind, patterns in plant.patterns.items()
        ),
    ]
    return Part(
        rows,
        {
            "inbound_connections": num_let_in,
            "router_bytes": seen.bytes_searched,
            "router_plaintext_bytes": seen.total_bytes,
            "planted_patterns": sum(map(len, plant.patterns.values())),
            "control_found_share": share,
        },
    )


async def restart(folder: Path, model: Path, options: argparse.Namespace) -> Part:
    """The only router is killed and comes back."""
    away: dict[str, float] = {}

    async def disturb(run: NatRun) -> None:
        away["from"] = await run.kill("router-0")
        say("router killed")
        await asyncio.sleep(DOWN_S)
        away["to"] = time.time()
        await run.start_router(0)
        say("router started again")

    async with NatRun(folder, model, steps=options.steps, num_workers=options.workers) as run:
        await run.start_router(0)
        with Pulse(run.path / "journal.jsonl") as pulse:
            row = await whole_run(run, disturb)
    row |= pauses(run, pulse, away["from"])
    row |= {
        "away_s": away["to"] - away["from"],
        "back_after_s": min(at for at in pulse.grown_at if at > away["to"]) - away["to"],
    }
    headline = {"restart_pause_s": longest_pause(row), "restart_back_s": row["back_after_s"]}
    return Part([{"part": "restart", **row}], headline)


async def failover(folder: Path, model: Path, options: argparse.Namespace) -> Part:
    """One of two routers is killed for good."""
    killed: dict[str, Any] = {}

    async def disturb(run: NatRun) -> None:
        carried = await run.router_bytes()
        killed["router"] = max(carried, key=lambda name: carried[name])
        killed["share"] = carried[killed["router"]] / sum(carried.values())
        killed["at"] = await run.kill(killed["router"])
        say(f"{killed['router']} killed, which had carried {killed['share']:.0%}")

    async with NatRun(folder, model, steps=options.steps, num_workers=options.workers, num_routers=2) as run:
        for number in range(2):
            await run.start_router(number)
        with Pulse(run.path / "journal.jsonl") as pulse:
            row = await whole_run(run, disturb)
    row |= pauses(run, pulse, killed["at"]) | {"killed_share": killed["share"]}
    return Part([{"part": "failover", **row}], {"failover_pause_s": longest_pause(row)})


async def detect(folder: Path, model: Path, options: argparse.Namespace) -> Part:
    """Workers killed, and cut off, one after the other, in a run that goes on."""
    rows: list[dict[str, Any]] = []
    async with NatRun(folder, model, steps=ENDLESS_STEPS, num_workers=options.workers) as run:
        await run.start_router(0)
        await run.start_training()
        await run.start_watcher()
        for how in ("kill", "partition"):
            since = time.time()
            for number in range(options.workers):
                await run.start_worker(number)
            ids = await run.joined(JOIN_S, since)
            await run.until(lambda: run.steps, RUN_S, "first step")
            for name, node_id in sorted(ids.items()):
                await run.until(partial(run.is_here, node_id), JOIN_S, f"{name} in the roster")
                await asyncio.sleep(SETTLE_S)
                row = {"part": "detect", "how": how, "worker": name, **await loss(run, how, name, node_id)}
                rows.append(row)
                say(f"{how} of {name}: coordinator {row['coordinator_s']:.2f} s, roster {row['roster_s']:.2f} s")
    headline = {}
    for how in ("kill", "partition"):
        for who, suffix in (("coordinator", ""), ("roster", "_roster")):
            times = [row[f"{who}_s"] for row in rows if row["how"] == how]
            headline[f"detect_{how}{suffix}_s"] = statistics.median(times)
            headline[f"detect_{how}{suffix}_max_s"] = max(times)
    return Part(rows, headline)


async def loss(run: NatRun, how: str, name: str, node_id: str) -> dict[str, float]:
    """Lose a worker, and see when the coordinator and the watcher's roster notice."""
    since = time.time()
    row = {}
    if how == "kill":
        since = await run.kill(name)
        row["process_gone_s"] = time.time() - since  # a starved process takes its time even to die
    else:
        await run.lab.cut(name, "router-0")
    for who, noticed in (("coordinator", run.left_at), ("roster", run.vanished_at)):
        found = partial(noticed, node_id, since)
        row[f"{who}_s"] = await run.until(found, NOTICE_S, f"{who}'s notice of the {how} of {name}") - since
    await run.lab.heal()
    return row


async def converge(folder: Path, model: Path, options: argparse.Namespace) -> Part:
    """How soon many light nodes agree after a partition."""
    from converge import measure

    measured = await measure(LIGHT_NODES)
    return Part([{"part": "converge", **measured}], {"converge_s": measured["converge_s"]})


PARTS: dict[str, Callable[[Path, Path, argparse.Namespace], Awaitable[Part]]] = {
    "nat": nat,
    "restart": restart,
    "failover": failover,
    "detect": detect,
    "converge": converge,
}


async def whole_run(run: NatRun, disturb: Callable[[NatRun], Awaitable[None]] | None = None) -> dict[str, Any]:
    """Start everybody, let it be disturbed on the way, and see it finish."""
    begun_s = time.monotonic()
    await run.start_training()
    for number in range(run.num_workers):
        await run.start_worker(number)
    await run.joined(JOIN_S)
    say(f"{run.num_workers} workers joined after {time.monotonic() - begun_s:.0f} s")
    if disturb is not None:
        await run.until(lambda: len(run.steps) >= BEFORE_STEPS, RUN_S, f"{BEFORE_STEPS} steps")
        await disturb(run)
    summary = await run.until(run.summary, RUN_S, "end of the run")
    await run.until(lambda: run.processes["train"].returncode is not None, RUN_S, "end of the run's process")
    rollouts = {name: count for name, count in summary["worker_rollouts"].items() if count}
    say(f"finished: {summary['steps']} steps in {summary['seconds']:.0f} s with rollouts of {len(rollouts)} workers")
    return {
        "finished": summary["steps"] == len(run.steps) and len(rollouts) == run.num_workers,
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "contributing_workers": len(rollouts),
        "min_worker_rollouts": min(rollouts.values()),
    }


def pauses(run: NatRun, pulse: Pulse, moment: float) -> dict[str, float]:
    """How long no lease was opened or closed, and no step was done: around a moment, and at the longest."""
    row = {}
    stepped_at = [line["time"] for line in run.steps]
    for what, times in (("lease", [at for at in pulse.grown_at if at >= stepped_at[0]]), ("step", stepped_at)):
        before, after = [at for at in times if at <= moment], [at for at in times if at > moment]
        row[f"{what}_pause_s"] = after[0] - before[-1]
        row[f"longest_{what}_pause_before_s"] = longest_gap(before)
        row[f"longest_{what}_pause_after_s"] = longest_gap([before[-1], *after])
    return row


def longest_pause(row: dict[str, Any]) -> float:
    """The longest that leases or steps stood still from the moment on."""
    return max(float(row[f"longest_{what}_pause_after_s"]) for what in ("lease", "step"))


def longest_gap(times: list[float]) -> float:
    return max((later - earlier for earlier, later in pairwise(times)), default=0.0)


@asynccontextmanager
async def collecting_weights(run: NatRun, plant: Plant) -> AsyncIterator[None]:
    """Plant what is published while inside; the store keeps only the newest versions."""
    seen: set[Path] = set()

    def collect() -> None:
        new = [path for path in run.path.glob("snapshots/chunks/*/*") if path not in seen]
        seen.update(new)
        plant.add_weights(new, random.Random(len(seen)))

    async def regularly() -> None:
        while True:
            await asyncio.to_thread(collect)
            await asyncio.sleep(WEIGHTS_EVERY_S)

    task = asyncio.create_task(regularly())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def plant_run(run: NatRun, plant: Plant) -> None:
    """Add what was planted on purpose, and what was sampled."""
    for kind, marks in run.marks.items():
        for mark in marks:
            plant.add(kind, mark.encode())
    plant.add("ticket_secret", Ticket.decode((run.path / "ticket.txt").read_text()).secret)
    for file in sorted((run.path / "episodes").glob("*.jsonl")):
        plant.add_episodes(read_jsonl(file, Episode))
    plant.add_weights((run.path / "model").glob("*.safetensors"), random.Random(0))


def sample(plant: Plant) -> Plant:
    """Some patterns of each kind."""
    chance = random.Random(0)
    return Plant(
        {kind: set(chance.sample(sorted(p), min(len(p), CONTROL_PATTERNS))) for kind, p in plant.patterns.items()}
    )


def found_share(found: Findings, plant: Plant) -> float:
    """Share of a plant's patterns that were found, of the kind of which the fewest were."""
    return min(len(found.patterns_found[kind]) / max(1, len(p)) for kind, p in plant.patterns.items())


async def measure_all(options: argparse.Namespace) -> None:
    """Run the parts and emit what they give; one that fails is a row, and leaves its numbers out."""
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {"finished": True, "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="shoal-join-") as scratch:
        model = tiny_model(Path(scratch) / "model")
        for name in options.only:
            say(f"part {name}")
            begun_s = time.monotonic()
            try:
                part = await PARTS[name](Path(scratch) / name, model, options)
            except (ShoalError, TimeoutError) as error:
                say(f"part {name} failed: {error}")
                part = Part([{"part": name, "finished": False, "error": str(error)[:4000]}], {})
            rows += part.rows
            headline |= part.headline
            headline[f"{name}_took_s"] = time.monotonic() - begun_s
    headline["finished"] = all(row.get("finished", True) for row in rows)
    headline["load_after"] = os.getloadavg()[0]
    emit(rows, headline)


async def until_told(work: Awaitable[None]) -> None:
    """Do the work; Ctrl-C or SIGTERM cancels it, once, so that what it set up is taken down in order."""
    task = asyncio.ensure_future(work)
    told = False

    def stop() -> None:
        nonlocal told
        if not told:
            told = True
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def main() -> None:
    parser = argparse.ArgumentParser(prog="join", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; all by default")
    parser.add_argument("--workers", type=int, default=5, help="workers, each behind a NAT of its own")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run")
    options = parser.parse_args()
    if (problem := tun.missing()) and set(options.only) != {"converge"}:
        raise RunError(problem, "Run it there as root; `--only converge` needs neither.")
    asyncio.run(until_told(measure_all(options)))


if __name__ == "__main__":
    benchmark(main)
