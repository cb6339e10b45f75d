"""Runs over HTTP, from a real server on loopback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from agent_cases import House, add, answer, call, plan, tool, turns, wait
from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from shoal.agents.http import run_routes
from shoal.agents.scheduler.policy import ScriptedPolicy, View
from shoal.agents.scheduler.records import Decision
from shoal.agents.tools.card import Use
from shoal.serving.door import http_error
from shoal.serving.events import EventStream
from shoal.serving.server import listen


@asynccontextmanager
async def serving(house: House) -> AsyncIterator[httpx.AsyncClient]:
    routes = run_routes(house.runs, lambda frames: EventStream(frames, 60.0, ExitStack()))
    app = Starlette(routes=routes, exception_handlers={HTTPException: http_error})
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    task = asyncio.create_task(server._serve([listening]))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=20) as client:
            yield client
    finally:
        server.should_exit = True
        await task
        listening.close()


async def stream(client: httpx.AsyncClient, run: str, last: str = "", events: int = 0) -> bytes:
    """The events' bytes, cut off after so many events (0: to the end)."""
    found = b""
    headers = {"Last-Event-ID": last} if last else {}
    async with client.stream("GET", f"/v1/runs/{run}/events", headers=headers) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        async for chunk in response.aiter_bytes():
            found += chunk
            if events and found.count(b"\n\n") >= events:
                return b"".join(part + b"\n\n" for part in found.split(b"\n\n")[:events])
    return found


async def test_a_stream_cut_at_every_event_and_resumed_is_the_same_bytes(tmp_path: Path) -> None:
    policy = turns(
        plan(call("w", "wait", seconds=0.1), *(call(f"a{n}", "add", x=n, y=1) for n in range(3)), thought="ü\n\n"),
        answer("ok"),
    )
    async with House(tmp_path, [tool(add), tool(wait)], policy) as house, serving(house) as client:
        made = await client.post("/v1/runs", json={"task": "a task", "tools": ["add", "wait"]})
        assert made.status_code == 201
        run = made.json()["id"]
        whole = await stream(client, run)  # from the beginning to the end, while the run goes on
        count = whole.count(b"\n\n")
        for cut in range(1, count):
            first = await stream(client, run, events=cut)
            last = first.rstrip(b"\n").rpartition(b"id: ")[2].split(b"\n")[0].decode()
            assert last == f"{run}:{cut}"
            assert first + await stream(client, run, last) == whole
        assert await stream(client, run, f"{run}:{count}") == b""
        kinds = [line[7:].decode() for line in whole.split(b"\n") if line.startswith(b"event: ")]
        assert kinds[0] == "run" and kinds[-1] == "final" and kinds.count("result") == 4
        data = json.loads(whole.split(b"data: ")[-1])
        assert data["type"] == "RUN_FINISHED" and data["data"] == {"answer": "ok"}
        shown = (await client.get(f"/v1/runs/{run}")).json()
        assert shown["status"] == "done" and shown["answer"] == "ok" and len(shown["calls"]) == 4
        assert [one["id"] for one in (await client.get("/v1/runs")).json()["data"]] == [run]


async def test_approving_cancelling_and_forking(tmp_path: Path) -> None:
    def script(view: View) -> Decision:
        if not view.steps:
            return plan(call("a", "add", x=1, y=2))
        return plan(call("w", "wait", seconds=99)) if len(view.steps) == 1 else answer("ok")

    tools = [tool(add, Use(needs_approval=True)), tool(wait)]
    async with House(tmp_path, tools, ScriptedPolicy(script)) as house, serving(house) as client:
        run = (await client.post("/v1/runs", json={"task": "t"})).json()["id"]
        await until(client, run, "a", "approval")
        assert (await client.post(f"/v1/runs/{run}/approvals/zzz", json={"allowed": True})).status_code == 409
        assert (await client.post(f"/v1/runs/{run}/approvals/a", json={"allowed": True})).status_code == 200
        await until(client, run, "w", "running")
        assert (await client.post(f"/v1/runs/{run}/cancel")).json()["status"] == "cancelled"
        assert (await client.post(f"/v1/runs/{run}/cancel")).status_code == 409
        seq = next(one.seq for one in house.log.events(run) if one.kind == "result")
        forked = await client.post(f"/v1/runs/{run}/fork", json={"seq": seq})
        assert forked.status_code == 201 and forked.json()["calls"][0]["phase"] == "done"
        await until(client, forked.json()["id"], "w", "running")
        assert (await client.post(f"/v1/runs/{run}/fork", json={"seq": 10_000})).status_code == 400


async def until(client: httpx.AsyncClient, run: str, name: str, phase: str) -> None:
    async with asyncio.timeout(20):
        while True:
            calls: list[dict[str, Any]] = (await client.get(f"/v1/runs/{run}")).json()["calls"]
            if {"id": name, "phase": phase}.items() <= next((c for c in calls if c["id"] == name), {}).items():
                return
            await asyncio.sleep(0.01)


async def test_what_is_wrong_with_a_request_is_said_in_json(tmp_path: Path) -> None:
    async with House(tmp_path, [tool(add)], turns()) as house, serving(house) as client:
        for body, status, words in (
            (b"{", 400, "not what it should be"),
            (b'{"task": "t", "unknown": 1}', 400, "unknown"),
            (b'{"task": ""}', 400, "characters"),
            (b'{"task": "t", "tools": ["rm"]}', 400, "no tool"),
            (b'{"task": "t", "budget": {"steps": -1}}', 400, "out of range"),
            (b'{"task": "' + b"x" * 600_000 + b'"}', 413, "exceeds"),
        ):
            said = await client.post("/v1/runs", content=body)
            assert said.status_code == status and words in said.json()["error"]["message"], said.text
        assert (await client.get("/v1/runs/nothing")).status_code == 404
        assert (await client.get("/v1/runs/nothing/events")).status_code == 404
        run = (await client.post("/v1/runs", json={"task": "t"})).json()["id"]
        for last in ("other:3", f"{run}:x", f"{run}:" + "9" * 20, "\u0661"):
            said = await client.get(f"/v1/runs/{run}/events", headers={"Last-Event-ID": last.encode()})
            assert said.status_code == 400
