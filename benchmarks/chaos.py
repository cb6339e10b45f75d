"""Is anything lost, does anything hang, when machines, disks, clocks and networks fail while Shoal trains and serves?

Seeded, replayable runs of real processes that train (arithmetic, a tiny model), broadcast and serve at once, in a
packet lab with a disk for each node (`_chaos_swarm`). For 20 s faults fall as a script says that is drawn from the seed
(`_chaos_script`); then all are undone, the run must go on, and all of it is judged from what was written down
(`_chaos_checks`). Seeds follow each other from `--seed`.

    shoal bench chaos --json -- --runs 60
    shoal bench chaos -- --seed 17 --runs 1 --keep          one seed again, its logs kept
    shoal bench chaos -- --replay script.json               a script as it was printed, or written by hand
    shoal bench chaos -- --only kill_worker pause           these kinds of fault alone
    shoal bench chaos -- --folder results                   goes on where it was interrupted

    violations          what did not hold, in all runs; the rows name seed and sentence
    ..._resume_s        from the new start of a killed coordinator to the first group that it hands out
    ..._recovery_s      from a part's new start to its first work: a group accepted, a step, an answer; a router: to a
                        connection with every node. Those count during which nothing else was wrong

Needs root, /dev/net/tun and loop devices; a C compiler for jumping clocks. Some 45 s a run on two quiet cores; two runs
at once (`--parallel 2`) share nothing but processor time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

import _chaos_checks as checks
import _chaos_script as scripts
from _chaos_disk import own_mounts
from _chaos_faults import Chaos, clocks, excused, missing, recoveries, say, stopped
from _chaos_keeper import END_S
from _chaos_script import KINDS, Script
from _chaos_swarm import DEADLINE_S, STALENESS, START_S, Swarm
from _nat import tiny_model
from join import until_told
from shoal.broadcast.store import Store
from shoal.coordinator.audit import audit
from shoal.errors import RunError, ShoalError
from shoal.fabric.identity import Identity
from shoal.lab import namespaces, tun
from shoal.protocol.codec import read_jsonl
from shoal.protocol.event import Event

from _common import benchmark, emit

HEAL_S = 180.0
"""After the last fault the run has got on by then, which takes seconds on a quiet machine: on one with a load of 25 a
learner that is started again needs 90 s to import torch."""

NEEDED = {"step": 2, "worker-0": 1, "worker-1": 1, "answer": 2}
"""What must happen again after the last fault is undone."""

RUN_S = START_S + scripts.SECONDS + HEAL_S + 4 * END_S + 60.0
"""No run takes longer; one that does is cut off, which is a violation."""


async def torment(folder: Path, model: Path, script: Script) -> dict[str, Any]:
    """One run: start, strike, heal, end, judge."""
    begun_s = time.monotonic()
    await asyncio.to_thread(folder.mkdir)
    async with Swarm(folder, model, script.seed, await clocks(script, folder)) as swarm:
        await swarm.start()
        ready_s = time.monotonic()
        chaos = Chaos(swarm, script)
        await chaos.run()
        healed_s = time.monotonic()
        with suppress(RunError):  # `stalled` says what is missing
            await swarm.until(lambda: not checks.stalled(marks_of(swarm), healed_s, NEEDED), HEAL_S, "progress")
        goes_on_s = time.monotonic() - healed_s
        await chaos.returned()
        ends = await swarm.end()
        left = {pid: command_of(pid) for pid in namespaces.processes_in(map(swarm.lab.namespace, scripts.NODES))}
        marks = marks_of(swarm)
        problems = {
            "promise": promises(swarm),
            "chain": chain(swarm),
            "requests": checks.bad_requests(
                swarm.requests(),
                deadline_s=DEADLINE_S,
                stopped=stopped(chaos.injected),
                excused=excused(
                    chaos.injected,
                    swarm.keepers["server"].starts_s,
                    [mark.at_s for mark in marks if mark.what == "answer"],
                ),
            ),
            "progress": checks.stalled(marks, healed_s, NEEDED),
            "end": checks.endless(ends, left | swarm.orphans, END_S),
            "crash": checks.crashes(swarm.logs()),
            "left": checks.leftovers(swarm.scratch(working(swarm, marks))),
        }
        return {
            "seed": script.seed,
            "faults": [msgspec.to_builtins(fault) for fault in script.faults],
            "struck": sorted({one.fault.kind for one in chaos.injected if one.struck}),
            "violations": [f"{check}: {problem}" for check, found in problems.items() for problem in found],
            "recoveries": recoveries(chaos.injected, marks),
            "start_s": round(ready_s - begun_s, 1),
            "goes_on_s": round(goes_on_s, 1),
            "seconds": round(time.monotonic() - begun_s, 1),
            "steps": swarm.count("step"),
            "acknowledged": len(swarm.acknowledged()),
            "requests": dict(Counter(request.outcome for request in swarm.requests())),
            "restarts": {name: len(k.starts_s) - 1 for name, k in swarm.keepers.items() if len(k.starts_s) > 1},
        }


def marks_of(swarm: Swarm) -> list[checks.Mark]:
    """What was seen to get on, answers among it."""
    answers = [checks.Mark(one.ended_s, "answer") for one in swarm.requests() if one.outcome == "answered"]
    return swarm.marks + answers


def working(swarm: Swarm, marks: list[checks.Mark]) -> list[str]:
    """Nodes whose newest process had come to its work, and so removes what it leaves when it is told to end."""
    shows = {"server": "answer", "worker-0": "worker-0", "worker-1": "worker-1"}
    return [
        name
        for name, what in shows.items()
        if any(mark.what == what and mark.at_s > swarm.keepers[name].starts_s[-1] for mark in marks)
    ]


def promises(swarm: Swarm) -> list[str]:
    """The audit of the run's folder, with what workers were told."""
    found = audit(swarm.run, max_staleness=STALENESS, acknowledged=swarm.acknowledged())
    return checks.broken_promises(found)


def chain(swarm: Swarm) -> list[str]:
    """The published snapshots, and what the server said it answered with."""
    learner = Identity.load_or_create(swarm.run / "identity" / "learner").public_key
    store = Store(swarm.run / "snapshots", run=swarm.run.name, trusted_key=learner, read_only=True)
    found = [one for version in store.versions("policy") if (one := store.manifest("policy", version)) is not None]
    lacks = {
        one.manifest.version: min(
            sum(store.get_chunk(digest) is None for digest in body.chunks) for body in one.manifest.bodies
        )
        for one in found
    }
    events = read_jsonl(swarm.run / "events.jsonl", Event)
    told = {int(event.data["version"]) for event in events if event.kind == "snapshot.published"}
    newest = max((one.manifest.version for one in found), default=-1)
    starts_s = swarm.keepers["server"].starts_s
    return [
        *checks.broken_chain(found, lacks, told),
        *(["the snapshots' store has damaged files"] if store.num_damaged else []),
        *checks.wrong_versions(swarm.requests(), starts_s, newest),
    ]


def command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200]
    return "gone"


async def one_run(results: Path, scratch: Path, model: Path, script: Script, keep: bool) -> dict[str, Any]:
    """A run's row, from an earlier call or by doing it; kept in the results' folder."""
    file = results / f"seed-{script.seed}.json"
    if file.exists():
        return dict(msgspec.json.decode(file.read_bytes()))
    folder = scratch / f"run-{script.seed}"
    say(f"seed {script.seed}: {msgspec.json.encode(script.faults).decode()}")
    try:
        async with asyncio.timeout(RUN_S):
            row = await torment(folder, model, script)
    except (ShoalError, TimeoutError) as error:
        row = {"seed": script.seed, "violations": [f"run: {type(error).__name__} {error}"], "struck": []}
        row |= {"faults": [msgspec.to_builtins(fault) for fault in script.faults], "recoveries": []}
    for violation in row["violations"]:
        say(f"seed {script.seed}: VIOLATION {violation}")
    say(f"seed {script.seed}: {len(row['violations'])} violations in {row.get('seconds', 0)} s, {row.get('restarts')}")
    if keep or row["violations"]:
        kept = results / f"seed-{script.seed}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.move(folder, kept)
        say(f"logs are in {kept}")
    else:
        shutil.rmtree(folder)
    file.write_bytes(msgspec.json.encode(row))
    return row


def headline_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers that matter."""
    times: dict[str, list[float]] = {}
    lost = 0
    for row in rows:
        for one in row["recoveries"]:
            if one["took_s"] is None:
                lost += 1
            elif one["alone"]:
                times.setdefault(one["part"], []).append(one["took_s"])
    headline: dict[str, float] = {
        "runs": len(rows),
        "fault_kinds": len({kind for row in rows for kind in row["struck"]}),
        "faults": sum(len(row["faults"]) for row in rows),
        "violations": sum(len(row["violations"]) for row in rows),
        "runs_with_violations": sum(bool(row["violations"]) for row in rows),
        "unrecovered": lost,
        "goes_on_max_s": max((row.get("goes_on_s", 0.0) for row in rows), default=0.0),
    }
    for part, found in sorted(times.items()):
        name = "coordinator_resume" if part == "coordinator" else f"{part}_recovery"
        headline[f"{name}_p50_s"] = round(statistics.median(found), 2)
        headline[f"{name}_max_s"] = round(max(found), 2)
        headline[f"{name}_count"] = len(found)
    return headline


def scripts_of(options: argparse.Namespace) -> list[Script]:
    """What is to be run.

    Raises:
        RunError: a script that is none, or kinds that this machine cannot have.
    """
    lacking = missing()
    if options.replay:
        try:
            script = msgspec.json.decode(options.replay.read_bytes(), type=Script)
        except (OSError, msgspec.DecodeError) as error:
            raise RunError(f"{options.replay} is no script: {error}.", "Give one as it was printed.") from None
        if problem := scripts.check(script):
            raise RunError(f"{options.replay}: {problem}.", "Mend it.")
        if lacks := {fault.kind for fault in script.faults} & lacking.keys():
            raise RunError(f"{min(lacks)} cannot be had here: {lacking[min(lacks)]}.")
        return [script]
    for kind, why in lacking.items():
        say(f"without {kind}: {why}")
    kinds = [kind for kind in options.only if kind not in lacking]
    if not kinds:
        raise RunError("none of these faults can be had here.", "Leave out --only.")
    return [scripts.draw(seed, kinds) for seed in range(options.seed, options.seed + options.runs)]


async def run_all(options: argparse.Namespace) -> None:
    """All runs, so many at once, and the result."""
    wanted = scripts_of(options)
    with tempfile.TemporaryDirectory(prefix="shoal-chaos-") as scratch:
        results = options.folder or Path(tempfile.mkdtemp(prefix="shoal-chaos-results-"))
        results.mkdir(parents=True, exist_ok=True)
        model = tiny_model(Path(scratch) / "model")
        slots = asyncio.Semaphore(options.parallel)

        async def one(script: Script) -> dict[str, Any]:
            async with slots:
                return await one_run(results, Path(scratch), model, script, options.keep)

        rows = await asyncio.gather(*(one(script) for script in wanted))
        if not options.folder and not any(row["violations"] for row in rows) and not options.keep:
            shutil.rmtree(results)
    emit(rows, headline_of(rows) | {"load_after": os.getloadavg()[0]})


def main() -> None:
    parser = argparse.ArgumentParser(prog="chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=60, help="seeded runs, one seed after the other")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of fault; all by default")
    parser.add_argument("--replay", type=Path, help="a file with one script, in place of seeds")
    parser.add_argument("--parallel", type=int, default=1, help="runs at once")
    parser.add_argument("--folder", type=Path, help="keep a row for each seed here, and skip those that are there")
    parser.add_argument("--keep", action="store_true", help="keep the logs of runs without violations too")
    parser.add_argument("--show", action="store_true", help="print the scripts, and run nothing")
    options = parser.parse_args()
    if options.show:
        for script in scripts_of(options):
            print(msgspec.json.encode(script).decode())
        emit([], {"scripts": options.runs})
        return
    if problem := tun.missing():
        raise RunError(problem, "Run it there, as root.")
    own_mounts()
    asyncio.run(until_told(run_all(options)))


if __name__ == "__main__":
    benchmark(main)
