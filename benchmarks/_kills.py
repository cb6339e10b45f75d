"""A scheduler killed with -9 in the middle of a run and resumed, several times over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shoal.agents.scheduler.log import EventLog
from shoal.errors import RunError

CHILD = """
import asyncio, sys
from pathlib import Path
from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import ScriptedPolicy
from shoal.agents.scheduler.records import Call, Decision, RunRequest
from shoal.agents.scheduler.service import Runs
from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool
from shoal.agents.tools.toolbox import Toolbox

folder = Path(sys.argv[1])

async def mark(n: int) -> int:
    "Leaves a mark each time it is done."
    await asyncio.sleep(0.01)
    with (folder / "marks").open("a") as file:
        file.write(f"{n}\\n")
    return n

def script(view):
    if view.steps:
        return Decision(answer=str(len(view.calls)))
    return Decision(calls=tuple(Call(id=f"n{n}", tool="mark", arguments={"n": n}) for n in range(400)))

async def main():
    tool = FunctionTool(mark, Use(idempotent=True, max_concurrency=4))
    runs = Runs(EventLog(folder / "kills.db"), Toolbox([tool]), ScriptedPolicy(script))
    name = sys.argv[2] if len(sys.argv) > 2 else runs.start(RunRequest(task="bench"))
    runs.resume(name)
    print(name, flush=True)
    await runs.ended(name)

asyncio.run(main())
"""


def kills(path: Path, deaths: int = 5) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Kill, resume, and count the calls made again although their result was there."""
    log = EventLog(path / "kills.db")
    name = ""
    for death in range(deaths + 1):
        command = [sys.executable, "-c", CHILD, str(path), *([name] if name else [])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            name = process.stdout.readline().strip()
            if death < deaths:
                time.sleep(0.15)
                process.send_signal(signal.SIGKILL)
            process.wait(60)
    finished: set[str] = set()
    repeated = resumed = 0
    last = ""
    for event in log.events(name):
        last = event.kind
        resumed += event.kind == "resumed"
        if event.kind == "started":
            repeated += event.data["call"] in finished
        elif event.kind == "result":
            finished.add(event.data["call"])
    log.close()
    if last != "final" or len(finished) != 400:
        raise RunError(f"the resumed run ended with {last} and {len(finished)} results.")
    marks = len((path / "marks").read_text().split())
    row = {"deaths": deaths, "resumed": resumed, "calls": 400, "marks": marks, "repeated_completed": repeated}
    return [row], {"repeated_completed": repeated}
