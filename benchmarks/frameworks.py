"""Schedulers of tool calls side by side: ours, LangGraph, the OpenAI Agents SDK, a supervisor as MinionS has it.

    shoal bench frameworks --json
    shoal bench frameworks -- --only ours langgraph

Each with a scripted model in place of a real one, so that nothing but the scheduling differs, each peer in an
environment of its own. `fanout16_s`: 16 calls of 0.3 s in one turn. `branch_s`: five calls of 0.02 s that need each
other, beside one of 1 s: when the fifth has ended (a graph in LangGraph, turns in the OpenAI Agents SDK, dependencies
here; a supervisor waits for all of its workers before it sends the next). `peak_of_500`: calls of one tool that ran at
once when one turn asked for 500, as the frameworks come. `records_of_a_run`: what a run of three calls tells without
further ado: events, spans. `mcp_server_works`: whether a server named by a command line can be called.
docs/comparison-agents.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import ScriptedPolicy, View
from shoal.agents.scheduler.records import Budget, Call, Decision, RunEvent, RunRequest
from shoal.agents.scheduler.service import Runs
from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool
from shoal.agents.tools.mcp_client import McpServers
from shoal.agents.tools.mcp_json import ServerConfig, StdioServer
from shoal.agents.tools.toolbox import Callee, Toolbox
from shoal.errors import RunError

from _common import benchmark, emit, peer_env

LANGGRAPH = ("langgraph==1.2.22",)
OPENAI_AGENTS = ("openai-agents==0.24.0",)
PEER_S = 180
MANY = 500
CALCULATOR = ("-m", "shoal.cli", "tools", "serve", "calculator")
PATHS = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

Measures = dict[str, float]


class Naps:
    """A tool that waits, and counts how many of it run."""

    def __init__(self) -> None:
        self.running = self.peak = 0

    async def nap(self, seconds: float) -> str:
        """Waits."""
        self.running += 1
        self.peak = max(self.peak, self.running)
        await asyncio.sleep(seconds)
        self.running -= 1
        return "ok"


def waits(*seconds: float) -> tuple[Call, ...]:
    return tuple(Call(id="", tool="nap", arguments={"seconds": one}) for one in seconds)


async def run(path: Path, callees: Sequence[Callee], turns: Sequence[tuple[Call, ...]]) -> list[RunEvent]:
    """The events of a run that makes these turns' calls."""

    def script(view: View) -> Decision:
        done = len(view.steps)
        return Decision(calls=turns[done]) if done < len(turns) else Decision(answer="done")

    log = EventLog(path / f"{time.monotonic_ns()}.db")
    runs = Runs(log, Toolbox(callees), ScriptedPolicy(script))
    name = runs.start(RunRequest(task="bench", budget=Budget(steps=40)))
    last = await runs.ended(name)
    events = list(log.events(name))
    await runs.close()
    log.close()
    if last.kind != "final":
        raise RunError(f"the run ended with {last.data}.")
    return events


def branch_end(events: list[RunEvent], call: str) -> float:
    return next(e.time for e in events if e.kind == "result" and e.data["call"] == call) - events[0].time


async def _ours(path: Path) -> Measures:
    wide = Use(max_concurrency=64)
    naps = Naps()
    fan = await run(path, [FunctionTool(naps.nap, wide)], [waits(*[0.3] * 16)])
    chain = [Call(id="t0", tool="nap", arguments={"seconds": 1.0})]
    for n in range(1, 6):
        after = (f"t{n - 1}",) if n > 1 else ()
        chain.append(Call(id=f"t{n}", tool="nap", arguments={"seconds": 0.02}, after=after))
    branch = await run(path, [FunctionTool(naps.nap, wide)], [tuple(chain)])
    as_it_comes = Naps()
    await run(path, [FunctionTool(as_it_comes.nap)], [waits(*[0.02] * MANY)])
    told = await run(path, [FunctionTool(naps.nap, wide)], [waits(0.0, 0.0, 0.0)])
    where = StdioServer(command=sys.executable, args=CALCULATOR, env=PATHS)
    call = Call(id="m", tool="c.calculate", arguments={"expression": "6 * 7"})
    async with McpServers([ServerConfig(name="c", where=where)]) as servers:
        over_mcp = await run(path, servers.tools, [(call,)])
    return {
        "fanout16_s": fan[-1].time - fan[0].time,
        "branch_s": branch_end(branch, "t5"),
        "peak_of_500": as_it_comes.peak,
        "records_of_a_run": len(told),
        "mcp_server_works": float(any(e.kind == "result" and e.data.get("value") == "42" for e in over_mcp)),
    }


async def _minions(path: Path) -> Measures:
    """A fixed supervisor: it sends a round of jobs to one kind of worker, and waits for all of them."""
    naps = Naps()
    tools = [FunctionTool(naps.nap, Use(max_concurrency=4096))]
    fan = await run(path, tools, [waits(*[0.3] * 16)])
    rounds = [waits(1.0, 0.02), *(waits(0.02) for _ in range(4))]
    branch = await run(path, tools, rounds)
    return {"fanout16_s": fan[-1].time - fan[0].time, "branch_s": branch[-1].time - branch[0].time}


def ours(path: Path) -> Measures:
    return asyncio.run(_ours(path))


def minions(path: Path) -> Measures:
    return asyncio.run(_minions(path))


def langgraph(_: Path) -> Measures:
    return _peer(peer_env("langgraph", LANGGRAPH), "_peer_langgraph.py")


def openai_agents(path: Path) -> Measures:
    # The server needs our packages and the peer's client must not see them.
    start = path / "calculator.sh"
    start.write_text(f'#!/bin/sh\nPYTHONPATH="{PATHS["PYTHONPATH"]}" exec "{sys.executable}" {" ".join(CALCULATOR)}\n')
    start.chmod(0o700)
    return _peer(peer_env("openai-agents", OPENAI_AGENTS), "_peer_openai_agents.py", str(start))


def _peer(python: Path, script: str, *arguments: str) -> Measures:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OPENAI_API_KEY": "none", "OPENAI_AGENTS_DISABLE_TRACING": "0"}
    command = [str(python), str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_S, env=environment)
    if done.returncode != 0:
        raise RunError(f"{script} failed: {done.stderr[-500:]}")
    found: Measures = json.loads(done.stdout)
    return found


SYSTEMS: dict[str, Callable[[Path], Measures]] = {
    "ours": ours,
    "langgraph": langgraph,
    "openai_agents": openai_agents,
    "minions": minions,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for name in parser.parse_args().only:
        with tempfile.TemporaryDirectory(prefix="shoal-frameworks-") as folder:
            found = SYSTEMS[name](Path(folder))
        print(name, found, file=sys.stderr)
        rows.append({"system": name, **found})
        headline |= {f"{name}_{key}": value for key, value in found.items()}
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
