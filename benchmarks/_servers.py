"""MCP servers: what a call costs over each transport; servers of others, driven by runs; ours, by the official client.

Of others, the protocol's reference servers from npm (`everything`, `filesystem`, `memory`), installed once and kept.
`third_party_wrong` counts calls of a run whose outcome is not the one written beside it, refusals included;
`ours_with_official_client_wrong` counts built-in servers that the SDK's own client finds wanting.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

from shoal.agents.builtin.catalogue import BUILTIN, builtin_tools
from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import ScriptedPolicy
from shoal.agents.scheduler.records import Call, Decision, RunRequest
from shoal.agents.scheduler.service import Runs
from shoal.agents.tools.mcp_client import McpServers
from shoal.agents.tools.mcp_json import HttpServer, ServerConfig, StdioServer, read_mcp_json
from shoal.agents.tools.outcome import Failure, Outcome
from shoal.agents.tools.toolbox import Callee, Toolbox
from shoal.envs.web.browser import BrowserError, require_browser
from shoal.errors import RunError
from shoal.fabric.identity import data_dir

from _common import need_program

VERSION = "2026.8.31"
NAMES = ("server-everything", "server-filesystem", "server-memory")
INSTALL_S = 400
CALLS = 200
PATHS = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def transports(path: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Milliseconds a call."""
    command = ("-m", "shoal.cli", "tools", "serve", "calculator")

    async def each(callees: Sequence[Callee]) -> float:
        (callee,) = callees
        clock = time.perf_counter()
        for _ in range(CALLS):
            await callee.call({"expression": "6 * 7"}, lambda _: None)
        return 1000 * (time.perf_counter() - clock) / CALLS

    async def work() -> dict[str, float]:
        found = {"memory": await each(builtin_tools("calculator"))}
        stdio = StdioServer(command=sys.executable, args=command, env=PATHS)
        async with McpServers([ServerConfig(name="c", where=stdio)]) as servers_:
            found["stdio"] = await each(servers_.tools)
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, "--port", "0", stderr=asyncio.subprocess.PIPE, env={**os.environ, **PATHS}
        )
        try:
            assert process.stderr is not None
            url = (await process.stderr.readline()).decode().split(" at ")[1].split(";")[0]
            async with McpServers([ServerConfig(name="c", where=HttpServer(url=url))]) as servers_:
                found["http"] = await each(servers_.tools)
        finally:
            process.terminate()
            await process.wait()
        return found

    found = asyncio.run(work())
    rows = [{"transport": name, "ms_per_call": ms} for name, ms in found.items()]
    return rows, {f"{name}_ms_per_call": ms for name, ms in found.items()}


def servers(path: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Servers of others, then ours."""
    others = asyncio.run(_third_party(path, _installed()))
    rows: list[dict[str, Any]] = [{"server": "others", "call": name, "right": right} for name, right in others.items()]
    ours = asyncio.run(_ours(path))
    rows += [
        {"server": name, "tools": tools, "right": not wrong, "wrong": wrong} for name, (tools, wrong) in ours.items()
    ]
    return rows, {
        "third_party_calls": len(others),
        "third_party_wrong": sum(not right for right in others.values()),
        "ours_with_official_client": len(ours),
        "ours_with_official_client_wrong": sum(bool(wrong) for _, wrong in ours.values()),
    }


def _installed() -> Path:
    """The folder of the reference servers' programs."""
    npm = need_program("npm", "apt-get install -y npm")
    place = data_dir() / "peers" / f"mcp-servers-{VERSION}"
    programs = place / "node_modules" / ".bin"
    if not (programs / "mcp-server-memory").exists():
        print(f"Installing the reference servers in {place} (once).", file=sys.stderr)
        install = [str(npm), "install", "--prefix", str(place), "--no-audit", "--no-fund"]
        install += [f"@modelcontextprotocol/{name}@{VERSION}" for name in NAMES]
        done = subprocess.run(install, capture_output=True, text=True, timeout=INSTALL_S, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise RunError(f"npm could not install the reference servers: {done.stderr[-300:]}")
    return programs


Right = Callable[[Outcome], bool]


def gives(words: str) -> Right:
    return lambda found: not isinstance(found, Failure) and words in str(found.value)


def fails(kind: str) -> Right:
    return lambda found: isinstance(found, Failure) and found.kind == kind


async def _third_party(path: Path, programs: Path) -> dict[str, bool]:
    """One run over three servers; what each call gave, held against what it should."""
    data = path / "data"
    data.mkdir()
    (data / "note.txt").write_text("the blue whale")
    config = {
        "everything": {"command": str(programs / "mcp-server-everything")},
        "files": {"command": str(programs / "mcp-server-filesystem"), "args": [str(data)]},
        "memory": {
            "command": str(programs / "mcp-server-memory"),
            "env": {"MEMORY_FILE_PATH": str(path / "memory.jsonl")},
        },
    }
    file = path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": config}))
    entity = {"name": "whale", "entityType": "animal", "observations": ["is blue"]}
    link = {"from": "whale", "to": "whale", "relationType": "sings to"}
    written = {"path": str(data / "new.txt"), "content": "written by a run"}
    wanted: list[tuple[str, dict[str, Any], tuple[str, ...], Right]] = [
        ("everything.echo", {"message": "hello"}, (), gives("hello")),
        ("everything.get-sum", {"a": 2, "b": 40}, (), gives("42")),
        ("everything.get-sum", {"a": "two", "b": 40}, (), fails("arguments")),
        ("everything.no-such-tool", {}, (), fails("denied")),
        ("files.read_text_file", {"path": str(data / "note.txt")}, (), gives("the blue whale")),
        ("files.read_text_file", {"path": "/etc/passwd"}, (), fails("error")),
        ("files.write_file", written, (), gives("new.txt")),
        ("files.list_directory", {"path": str(data)}, ("c6",), gives("new.txt")),
        ("files.read_text_file", {"path": str(data / "new.txt")}, ("c6",), gives("written by a run")),
        ("memory.create_entities", {"entities": [entity]}, (), gives("whale")),
        ("memory.create_relations", {"relations": [link]}, ("c9",), gives("sings to")),
        ("memory.search_nodes", {"query": "whale"}, ("c10",), gives("is blue")),
        ("memory.read_graph", {}, ("c10",), gives("sings to")),
    ]
    calls = tuple(
        Call(id=f"c{n}", tool=tool, arguments=arguments, after=after)
        for n, (tool, arguments, after, _) in enumerate(wanted)
    )
    policy = ScriptedPolicy(lambda view: Decision(answer="done") if view.steps else Decision(calls=calls))
    log = EventLog(path / "third.db")
    async with McpServers(read_mcp_json(file)) as connected:
        runs = Runs(log, Toolbox(connected.tools), policy)
        name = runs.start(RunRequest(task="bench", approve="none"))
        async with asyncio.timeout(120):
            await runs.ended(name)
        state = runs.state(name)
        found = {
            f"c{n} {tool}": (outcome := state.calls[f"c{n}"].outcome) is not None and right(outcome)
            for n, (tool, _, __, right) in enumerate(wanted)
        }
        await runs.close()
    log.close()
    return found


TRIED: dict[str, tuple[str, dict[str, Any], str]] = {
    "calculator": ("calculate", {"expression": "2 ** 10 / 8"}, "128"),
    "python": ("run_python", {"program": "print(6 * 7)"}, "42"),
    "documents": ("read_document", {"document": "a.md"}, "150 tonnes"),
    "corpus": ("search", {"query": "how heavy is a whale"}, "150 tonnes"),
    "web": ("read_page", {"url": "http://127.0.0.1:9/"}, "not public"),
    "browser": ("navigate", {"url": "http://not-allowed.example/"}, "not-allowed.example"),
    "pages": ("check_page", {"name": "index.html", "texts": ["Hello"]}, '"ok":true'),
    "evm": ("balance", {}, "base_units"),
    "memory": ("add_memory", {"text": "Write the carry above the next column.", "family": "sums"}, "candidate"),
}
"""Each built-in server's tool, arguments, and words that its answer (or its refusal) has."""


async def _ours(path: Path) -> dict[str, tuple[int, str]]:
    """How many tools each of our servers has, and what is wrong with it."""
    root = path / "root"
    root.mkdir()
    (root / "a.md").write_text("# Whales\n\nThe blue whale weighs 150 tonnes.\n")
    (root / "index.html").write_text("<!doctype html><title>t</title><h1>Hello</h1>")
    try:
        require_browser()
        names = list(BUILTIN)
    except BrowserError as error:
        print(f"servers: {error.problem}", file=sys.stderr)
        names = [name for name in BUILTIN if name not in ("browser", "pages")]
    found: dict[str, tuple[int, str]] = {}
    for name in names:
        command = ["-m", "shoal.cli", "tools", "serve", name, "--root", str(root)]
        environment = {**PATHS, "SHOAL_HOME": str(data_dir())}
        tool, arguments, words = TRIED[name]
        async with (
            asyncio.timeout(120),
            Client(StdioServerParameters(command=sys.executable, args=command, env=environment)) as client,
        ):
            listed = {one.name: one for one in (await client.list_tools()).tools}
            answered = await client.call_tool(tool, arguments)
            text = "".join(getattr(block, "text", "") for block in answered.content)
            refused = await client.call_tool(tool, {"no_such_argument": 1})
        wrong = "" if words in text else f"{tool} answered {text[:200]!r}"
        if not refused.is_error:
            wrong = f"{tool} takes any argument"
        found[name] = (len(listed), wrong)
    return found
