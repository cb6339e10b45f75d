"""A thousand calls in one turn, turn after turn in one run: limits, overhead a call, and what memory does.

Memory is measured after `WARM_TURNS`, when the run holds as many finished calls as it ever will: `memory_growth` is the
resident set's slope from there to the end (least squares), `traced_growth` that of Python's own allocations in a run
of its own, because tracing costs time. What must remain of a call is its id, so that none is given again.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import ScriptedPolicy, View
from shoal.agents.scheduler.records import Budget, Call, Decision, RunRequest
from shoal.agents.scheduler.service import Runs
from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool
from shoal.agents.tools.toolbox import Toolbox
from shoal.errors import RunError

CALLS = 1000
TURNS = 16
WARM_TURNS = 5
TRACED_TURNS = 10
AT_ONCE = 16


async def echo(n: int) -> int:
    """Gives back what it was given."""
    await asyncio.sleep(0)
    return n


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def traced_mib() -> float:
    gc.collect()
    return tracemalloc.get_traced_memory()[0] / 2**20


def slope(values: list[float]) -> float:
    """Of a straight line through the values, a step."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    above = sum((n - middle) * (value - mean) for n, value in enumerate(values))
    return above / sum((n - middle) ** 2 for n in range(len(values)))


async def _turns(path: Path, turns: int, size: Callable[[], float]) -> tuple[list[float], float, int]:
    """Memory before each turn, seconds in all, and how often a limit was exceeded."""
    sizes: list[float] = []

    def script(view: View) -> Decision:
        sizes.append(size())
        if len(view.steps) == turns:
            return Decision(answer="done")
        return Decision(calls=tuple(Call(id="", tool="echo", arguments={"n": n}) for n in range(CALLS)))

    log = EventLog(path)
    box = Toolbox([FunctionTool(echo, Use(max_concurrency=AT_ONCE))], total=64)
    runs = Runs(log, box, ScriptedPolicy(script))
    highest = 0
    clock = time.perf_counter()
    name = runs.start(RunRequest(task="bench", budget=Budget(steps=turns + 2, calls=turns * CALLS)))
    ending = asyncio.ensure_future(runs.ended(name))
    while not ending.done():
        highest = max(highest, box.capacity.taken("echo"))
        await asyncio.sleep(0.001)
    seconds = time.perf_counter() - clock
    found = sum(event.kind == "result" for event in log.events(name))
    await runs.close()
    log.close()
    if found != turns * CALLS:
        raise RunError(f"{found} of {turns * CALLS} calls have a result.")
    return sizes, seconds, box.capacity.exceeded + max(0, highest - AT_ONCE)


def flood(path: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Both runs."""
    sizes, seconds, exceeded = asyncio.run(_turns(path / "flood.db", TURNS, resident_mib))
    tracemalloc.start()
    traced, _, exceeded_too = asyncio.run(_turns(path / "traced.db", TRACED_TURNS, traced_mib))
    tracemalloc.stop()
    rows = [{"turn": n, "resident_mib": size} for n, size in enumerate(sizes, start=1)]
    rows += [{"turn": n, "traced_mib": size} for n, size in enumerate(traced, start=1)]
    return rows, {
        "capacity_exceeded": exceeded + exceeded_too,
        "overhead_ms_per_call": 1000 * seconds / (TURNS * CALLS),
        "memory_growth_mib_per_1000": slope(sizes[WARM_TURNS:]),
        "traced_growth_kib_per_1000": 1024 * slope(traced[WARM_TURNS:]),
    }
