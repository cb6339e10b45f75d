"""Followers of a run over HTTP, cut off after every event and resumed: the bytes must be those of one never cut off."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import ScriptedPolicy
from shoal.agents.scheduler.records import Call, Decision, RunRequest
from shoal.agents.scheduler.service import Runs
from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool
from shoal.agents.tools.toolbox import Toolbox
from shoal.cli.agent_serving import http_app
from shoal.cli.hosting import host
from shoal.serving.keys import Keys
from shoal.serving.server import listen

CALLS = 60


async def slow_echo(n: int) -> int:
    """Gives back what it was given, a moment later."""
    await asyncio.sleep(0.01)
    return n


async def _stream(client: httpx.AsyncClient, run: str, after: int, events: int) -> bytes:
    """The bytes from behind event `after`, cut off after so many events (0: to the end)."""
    found = b""
    headers = {"Last-Event-ID": f"{run}:{after}"} if after else {}
    async with client.stream("GET", f"/v1/runs/{run}/events", headers=headers) as response:
        response.raise_for_status()
        async for chunk in response.aiter_bytes():
            found += chunk
            if events and found.count(b"\n\n") >= events:
                return b"\n\n".join(found.split(b"\n\n")[:events]) + b"\n\n"
    return found


async def _work(path: Path) -> tuple[int, int]:
    log = EventLog(path / "cuts.db")
    calls = tuple(Call(id=f"n{n}", tool="slow_echo", arguments={"n": n}) for n in range(CALLS))
    policy = ScriptedPolicy(lambda view: Decision(answer="done") if view.steps else Decision(calls=calls))
    runs = Runs(log, Toolbox([FunctionTool(slow_echo, Use(max_concurrency=4))]), policy)
    listening = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    serving = asyncio.create_task(host(http_app(runs, Keys({})), listening))
    try:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            run = runs.start(RunRequest(task="bench"))
            live = await _stream(client, run, 0, 0)  # While the run goes on.
            count = live.count(b"\n\n")
            different = 0
            for cut in range(1, count + 1):
                first = await _stream(client, run, 0, cut)
                different += first + await _stream(client, run, cut, 0) != live
        return different, count
    finally:
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving
        await runs.close()
        log.close()


def cuts(path: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Every cut of one run's stream."""
    different, events = asyncio.run(_work(path))
    return [{"events": events, "different": different}], {"sse_different": different, "sse_events": events}
