"""An agent that works until told to end: a scripted policy, real tools (arithmetic, sandboxed Python, documents).

    python _soak_agent.py FOLDER DOCUMENTS

Each run plans three calls at once, then one that needs their results, then answers; the log is kept in FOLDER. At its
end it prints how many runs ended well and how many did not.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

from shoal.agents.builtin.catalogue import Surroundings, builtin_tools
from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import ScriptedPolicy, View
from shoal.agents.scheduler.records import Call, Decision, RunRequest
from shoal.agents.scheduler.service import Runs
from shoal.agents.tools.toolbox import Toolbox
from shoal.coordinator.processes import die_with_parent

PAUSE_S = 1.0
"""Between two runs."""

AT_ONCE = 2
TOOLS = ("calculator", "python", "documents")


def script(view: View) -> Decision:
    """Three calls, then one, then the answer."""
    if not view.steps:
        return Decision(
            calls=(
                Call(id="sum", tool="calculate", arguments={"expression": f"{len(view.task)} * 41"}),
                Call(id="program", tool="run_python", arguments={"program": "print(sum(range(100)))"}),
                Call(id="names", tool="list_documents", arguments={}),
            )
        )
    if len(view.steps) == 1:
        names = view.value("names")
        assert isinstance(names, list)
        return Decision(calls=(Call(id="read", tool="read_document", arguments={"document": names[0]}),))
    return Decision(answer=str(view.value("sum")))


async def main(folder: Path, documents: Path) -> None:
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    box = Toolbox(tool for name in TOOLS for tool in builtin_tools(name, Surroundings(root=documents)))
    log = EventLog(folder / "runs.db")
    runs = Runs(log, box, ScriptedPolicy(script))
    counts = {"final": 0, "failed_calls": 0, "other": 0}

    async def work() -> None:
        while not ending.is_set():
            name = runs.start(RunRequest(task="what a soak does"))
            last = await runs.ended(name)
            counts["final" if last.kind == "final" else "other"] += 1
            results = [event.data["ok"] for event in log.events(name) if event.kind == "result"]
            counts["failed_calls"] += results.count(False)
            try:
                await asyncio.wait_for(ending.wait(), PAUSE_S)
            except TimeoutError:
                continue

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    await runs.close()
    log.close()
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
