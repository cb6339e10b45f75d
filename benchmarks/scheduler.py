"""The scheduler of tool calls: limits, overhead, parallelism beside LangGraph and one call at a time, faults, resuming.

    shoal bench scheduler --json
    shoal bench scheduler -- --only graphs faults
    shoal bench scheduler -- --model embedded --model-seconds 300

`flood`: 1,000 calls in one turn, turn after turn: limits, overhead, and whether memory grows (`_flood`). `graphs`:
tools that wait; `fanout16_s` for 16 tools of 0.3 s, `independent_branch_s` for five of 0.02 s in a row beside one of
1 s, and graphs of 24 tools drawn by seeds 0 to 4: six chains of four, each with one slow tool (0.7 to 1 s) and three
quick ones (0.1 to 0.3 s). `sequential` makes one call a decision, as ReAct does. Ratios are the worst of the five.
`faults`: 200 tasks at an MCP server of which 30 % of the first calls fail (errors, hangs, garbage, crashes,
disconnects). `cuts`: followers over HTTP cut off at every event (`_following`). `kills`: a scheduler killed with -9
five times in one run. `hostile`: tools whose words are orders (`_hostile`). `transports`, `servers`: milliseconds a
call in memory, over stdio and over HTTP; servers of others, and all of ours with the official client (`_servers`).
`questions`, `gaia`, `model`: sixty questions over files (`_asking`), worked on by us, one call at a time, and by a
supervisor with one kind of worker; in GAIA's layout; by a real model. What must hold is printed at the end (`BARS`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _asking import by_a_model, questions, seconds_between, through_gaia
from _flood import flood
from _following import cuts
from _hostile import hostile
from _kills import kills
from _servers import servers, transports
from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import ScriptedPolicy, View
from shoal.agents.scheduler.records import Budget, Call, Decision, RunEvent, RunRequest
from shoal.agents.scheduler.service import Runs
from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool
from shoal.agents.tools.mcp_client import McpServers
from shoal.agents.tools.mcp_json import ServerConfig, StdioServer
from shoal.agents.tools.toolbox import Callee, Toolbox
from shoal.errors import RunError, ShoalError

from _common import benchmark, emit, peer_env

Rows = list[dict[str, Any]]
Headline = dict[str, float]
Graph = tuple[list[float], list[list[int]]]

LANGGRAPH = ("langgraph==1.2.22",)
SEEDS = range(5)
FAULTS = ("error", "hang", "garbage", "crash", "disconnect")
FAULT_SHARE = 0.3
NUM_TASKS = 200
WIDE = Use(max_concurrency=4096, timeout_s=60, idempotent=True)


async def nap(seconds: float) -> float:
    """Waits."""
    await asyncio.sleep(seconds)
    return seconds


async def echo(n: int) -> int:
    """Gives back what it was given."""
    await asyncio.sleep(0)
    return n


def plan(graph: Graph) -> Decision:
    """All tools of a graph as one decision."""
    durations, needs = graph
    calls = (
        Call(id=f"t{n}", tool="nap", arguments={"seconds": seconds}, after=tuple(f"t{one}" for one in needs[n]))
        for n, seconds in enumerate(durations)
    )
    return Decision(calls=tuple(calls))


async def one_run(path: Path, callees: Sequence[Callee], policy: ScriptedPolicy, **request: Any) -> list[RunEvent]:
    """A run's events, in a log of its own."""
    log = EventLog(path / f"{time.monotonic_ns()}.db")
    box = Toolbox(callees, total=4096)
    runs = Runs(log, box, policy)
    try:
        name = runs.start(RunRequest(task="bench", max_concurrency=4096, **request))
        await runs.ended(name)
        events = list(log.events(name))
    finally:
        await runs.close()
        log.close()
    if events[-1].kind != "final":
        raise RunError(f"the run ended with {events[-1].data}.")
    return events


async def seconds_of(path: Path, graph: Graph) -> tuple[float, dict[str, float]]:
    """How long a graph takes us, and when each call had ended."""
    policy = ScriptedPolicy(lambda view: Decision(answer="done") if view.steps else plan(graph))
    events = await one_run(path, [FunctionTool(nap, WIDE)], policy)
    return seconds_between(events), {e.data["call"]: e.time - events[0].time for e in events if e.kind == "result"}


async def sequential_seconds(path: Path, graph: Graph) -> float:
    """One call a decision, in the order in which they were drawn."""
    durations = graph[0]

    def script(view: View) -> Decision:
        done = len(view.calls)
        if done == len(durations):
            return Decision(answer="done")
        return Decision(calls=(Call(id=f"t{done}", tool="nap", arguments={"seconds": durations[done]}),))

    events = await one_run(path, [FunctionTool(nap, WIDE)], ScriptedPolicy(script), budget=Budget(steps=100))
    return seconds_between(events)


def draw(seed: int, chains: int = 6, length: int = 4) -> Graph:
    """Chains of quick tools with one slow one each, at a place drawn."""
    draws = random.Random(seed)
    durations: list[float] = []
    needs: list[list[int]] = []
    for _ in range(chains):
        slow = draws.randrange(length)
        for place in range(length):
            durations.append(round(draws.uniform(0.7, 1.0) if place == slow else draws.uniform(0.1, 0.3), 3))
            needs.append([len(durations) - 2] if place else [])
    return durations, needs


def longest_path(graph: Graph) -> float:
    durations, needs = graph
    ends: list[float] = []
    for seconds, needed in zip(durations, needs, strict=True):
        ends.append(seconds + max((ends[one] for one in needed), default=0.0))
    return max(ends)


def langgraph(python: Path, graph: Graph) -> dict[str, Any]:
    script = Path(__file__).with_name("_langgraph.py")
    given = json.dumps({"durations": graph[0], "needs": graph[1]})
    done = subprocess.run([str(python), str(script)], input=given, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RunError(f"LangGraph failed: {done.stderr[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def graphs(path: Path) -> tuple[Rows, Headline]:
    python = peer_env("langgraph", LANGGRAPH)
    fan: Graph = ([0.3] * 16, [[] for _ in range(16)])
    branch: Graph = ([1.0] + [0.02] * 5, [[], [], [1], [2], [3], [4]])
    fan_s, _ = asyncio.run(seconds_of(path, fan))
    _, ended = asyncio.run(seconds_of(path, branch))
    theirs = langgraph(python, branch)["ended_s"][5]
    rows: Rows = [
        {"graph": "16 of 0.3 s", "ours_s": fan_s, "langgraph_s": langgraph(python, fan)["seconds"], "longest_s": 0.3},
        {"graph": "branch of 5 beside 1 s", "ours_s": ended["t5"], "langgraph_s": theirs, "longest_s": 0.1},
    ]
    worst: dict[str, list[float]] = {"sequential": [], "langgraph": [], "longest": []}
    for seed in SEEDS:
        graph = draw(seed)
        longest = longest_path(graph)
        ours, _ = asyncio.run(seconds_of(path, graph))
        one_by_one = asyncio.run(sequential_seconds(path, graph))
        other = langgraph(python, graph)["seconds"]
        rows.append(
            {
                "graph": f"24 tools, seed {seed}",
                "ours_s": ours,
                "langgraph_s": other,
                "sequential_s": one_by_one,
                "longest_s": longest,
            }
        )
        worst["sequential"].append(one_by_one / ours)
        worst["langgraph"].append(other / ours)
        worst["longest"].append(ours / longest)
    return rows, {
        "fanout16_s": fan_s,
        "independent_branch_s": ended["t5"],
        "langgraph_branch_s": theirs,
        "sequential_over_ours": min(worst["sequential"]),
        "langgraph_over_ours": min(worst["langgraph"]),
        "ours_over_longest_path": max(worst["longest"]),
    }


def faults(path: Path) -> tuple[Rows, Headline]:
    """Tasks one at a time take too long; eight at once share one server, so a crash hits the others' calls too."""
    draws = random.Random(0)
    chosen = [draws.choice(FAULTS) if draws.random() < FAULT_SHARE else "" for _ in range(NUM_TASKS)]
    use = Use(timeout_s=1.0, max_retries=1, idempotent=True, max_concurrency=8)
    where = StdioServer(
        command=sys.executable,
        args=(str(Path(__file__).with_name("_faulty_server.py")),),
        env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )

    def script(view: View) -> Decision:
        number = int(view.task.split()[1])
        good = [name for name in view.calls if view.value(name) is not None]
        if len(good) >= 2:
            return Decision(answer=str(sum(view.value(name)["n"] for name in good[:2])))  # type: ignore[index]
        if view.must_answer:
            return Decision(answer="unknown")
        fault = chosen[number] if not view.steps else ""
        wanted = 2 - len(good)
        faulty = ["" if n else fault for n in range(wanted)]
        calls = (Call(id="", tool="faulty.work", arguments={"n": number, "fault": one}) for one in faulty)
        return Decision(calls=tuple(calls))

    async def work() -> tuple[Counter[str], int, int, float]:
        ended: Counter[str] = Counter()
        hung = 0
        async with McpServers([ServerConfig(name="faulty", where=where, use=use)]) as servers:
            log = EventLog(path / "faults.db")
            box = Toolbox(servers.tools)
            runs = Runs(log, box, ScriptedPolicy(script), max_runs=16)
            places = asyncio.Semaphore(8)
            clock = time.perf_counter()

            async def task(number: int) -> None:
                nonlocal hung
                async with places:
                    request = RunRequest(task=f"task {number}", budget=Budget(steps=12, seconds=60))
                    name = runs.start(request)
                    try:
                        async with asyncio.timeout(120):
                            last = await runs.ended(name)
                    except TimeoutError:
                        hung += 1
                        return
                    right = last.data.get("answer") == str(4 * number)
                    ended["right" if right else f"{last.kind}: {last.data.get('reason', 'wrong answer')}"] += 1

            await asyncio.gather(*(task(number) for number in range(NUM_TASKS)))
            seconds = time.perf_counter() - clock
            await runs.close()
            orphans = box.capacity.taken()
            log.close()
        await asyncio.sleep(0.2)
        orphans += len(children()) + len(asyncio.all_tasks()) - 1
        return ended, hung, orphans, seconds

    ended, hung, orphans, seconds = asyncio.run(work())
    rows: Rows = [{"outcome": name, "tasks": count} for name, count in ended.items()]
    rows.append({"outcome": "injected", "tasks": sum(map(bool, chosen)), "seconds": seconds})
    named = sum(ended.values())  # Right, or ended with its reason.
    return rows, {
        "fault_tasks_right": ended["right"],
        "fault_tasks_named": named - ended["final: wrong answer"],
        "hung": hung,
        "orphans": orphans,
    }


def children() -> list[int]:
    """Processes that this one has started and that still run."""
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(one) for one in found]


PARTS: dict[str, Callable[[Path], tuple[Rows, Headline]]] = {
    "flood": flood,
    "graphs": graphs,
    "faults": faults,
    "cuts": cuts,
    "kills": kills,
    "hostile": hostile,
    "transports": transports,
    "servers": servers,
    "questions": questions,
    "gaia": through_gaia,
}

BARS: dict[str, Callable[[Headline], bool]] = {
    "capacity_exceeded = 0": lambda h: h["capacity_exceeded"] == 0,
    "overhead_ms_per_call <= 2": lambda h: h["overhead_ms_per_call"] <= 2,
    "memory flat: memory_growth_mib_per_1000 <= 0.25": lambda h: h["memory_growth_mib_per_1000"] <= 0.25,
    "memory flat: traced_growth_kib_per_1000 <= 256": lambda h: h["traced_growth_kib_per_1000"] <= 256,
    "fanout16_s <= 0.45": lambda h: h["fanout16_s"] <= 0.45,
    "sequential_over_ours >= 4": lambda h: h["sequential_over_ours"] >= 4,
    "langgraph_over_ours >= 1.5": lambda h: h["langgraph_over_ours"] >= 1.5,
    "ours_over_longest_path <= 1.10": lambda h: h["ours_over_longest_path"] <= 1.10,
    "independent_branch_s <= 0.15": lambda h: h["independent_branch_s"] <= 0.15,
    "success: ours >= sequential, minions": lambda h: (
        h["ours_success"] >= max(h["sequential_success"], h["minions_success"])
    ),
    "latency: ours < sequential, minions": lambda h: (
        h["ours_latency_s"] < min(h["sequential_latency_s"], h["minions_latency_s"])
    ),
    "tokens: ours <= sequential, minions": lambda h: (
        h["ours_tokens"] <= min(h["sequential_tokens"], h["minions_tokens"])
    ),
    "gaia_right = 60": lambda h: h["gaia_right"] == 60,
    "faults: fault_tasks_named = 200, hung = 0, orphans = 0": lambda h: (
        h["fault_tasks_named"] == NUM_TASKS and h["hung"] == 0 and h["orphans"] == 0
    ),
    "sse_different = 0": lambda h: h["sse_different"] == 0,
    "repeated_completed = 0": lambda h: h["repeated_completed"] == 0,
    "widened = 0": lambda h: h["widened"] == 0,
    "third_party_wrong = 0": lambda h: h["third_party_wrong"] == 0,
    "ours_with_official_client_wrong = 0": lambda h: h["ours_with_official_client_wrong"] == 0,
}
"""What must hold; a bar whose part was not run is left out."""


def judged(headline: Headline) -> Rows:
    """Each bar, and whether it holds."""
    rows: Rows = []
    for bar, holds in BARS.items():
        try:
            rows.append({"part": "bars", "bar": bar, "holds": holds(headline)})
        except KeyError:
            continue
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "model"], default=[*PARTS, "model"])
    parser.add_argument("--model", default="embedded", help="answers the sixty as well, in all three ways; '' for none")
    parser.add_argument("--model-seconds", type=float, default=900.0, help="for each way")
    given = parser.parse_args()
    parts = dict(PARTS)
    if given.model:
        parts["model"] = lambda path: by_a_model(path, given.model, given.model_seconds)
    rows: Rows = []
    headline: Headline = {}
    failed: list[str] = []
    for part in given.only:
        if part not in parts:
            continue
        clock = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="shoal-scheduler-") as folder:
                found, numbers = parts[part](Path(folder))
        except ShoalError as error:  # What the other parts found stays.
            failed.append(part)
            rows.append({"part": part, "error": str(error)})
            print(f"{part} failed: {error}", file=sys.stderr)
            continue
        rows += [{"part": part, **row} for row in found]
        headline |= numbers
        print(f"{part} ({time.monotonic() - clock:.0f} s)", numbers, file=sys.stderr)
    bars = judged(headline)
    for bar in bars:
        print(f"{'holds' if bar['holds'] else 'FAILS'}: {bar['bar']}", file=sys.stderr)
    counts = {"bars": len(bars), "bars_failed": sum(not bar["holds"] for bar in bars), "parts_failed": len(failed)}
    emit([*rows, *bars], {**headline, **counts})


if __name__ == "__main__":
    benchmark(main)
