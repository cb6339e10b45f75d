"""MCP: our servers with the official client, servers that misbehave, and those of others."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from agent_cases import House, answer, call, plan, results, turns
from mcp import MCPError
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp_types import CONNECTION_CLOSED

from shoal.agents.tools.card import Use
from shoal.agents.tools.mcp_client import McpServer, McpServers
from shoal.agents.tools.mcp_json import HttpServer, ServerConfig, StdioServer, read_mcp_json
from shoal.agents.tools.outcome import Failure, Outcome, Success
from shoal.agents.tools.toolbox import Toolbox
from shoal.envs.web.browser import BrowserError, require_browser
from shoal.errors import ConfigError, NetworkError

HERE = Path(__file__).parent
PATHS = {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}

SERVER = """
import asyncio, os, sys
from pathlib import Path
from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool, Progress, ToolError
from shoal.agents.tools.mcp_server import make_server, serve_stdio

async def add(x: int, y: int) -> int:
    "Adds two numbers."
    return x + y

async def pair(x: int) -> dict[str, int]:
    "The number twice."
    return {"a": x, "b": x}

async def hang() -> None:
    "Never answers."
    await asyncio.sleep(3600)

async def die() -> None:
    "Ends its server."
    os._exit(3)

async def refuse() -> str:
    "Refuses, for now."
    raise ToolError("not today", retryable=True)

async def crash() -> str:
    "Has a defect."
    raise ValueError("a secret of the server")

async def pid() -> int:
    "Its server's process."
    return os.getpid()

async def spawn() -> int:
    "Starts a process that outlives its parent if nobody ends it."
    process = await asyncio.create_subprocess_exec("sleep", "3600")
    return process.pid

asyncio.run(serve_stdio(make_server("test", [FunctionTool(f, Use(needs_approval=f is die)) for f in
    (add, pair, hang, die, refuse, crash, pid, spawn)])))
"""


def config(code: str = SERVER, **options: object) -> ServerConfig:
    where = StdioServer(command=sys.executable, args=("-c", code), env=PATHS)
    return ServerConfig(name="test", where=where, **options)  # type: ignore[arg-type]


async def perform(box: Toolbox, name: str, **arguments: object) -> Outcome:
    found = box.tool(name)
    assert found is not None
    return await found.perform(dict(arguments), await box.capacity.take(name, "run:1"), lambda _: None)


def kind_of(outcome: Outcome) -> str:
    return outcome.kind if isinstance(outcome, Failure) else "success"


async def test_tools_of_a_server_over_standard_input_and_output() -> None:
    async with McpServers([config(use=Use(timeout_s=2, max_concurrency=32))]) as servers:
        box = Toolbox(servers.tools)
        card = box.cards()["test.add"]
        assert card.description == "Adds two numbers." and card.output == {"type": "integer"}
        assert box.cards()["test.die"].use.needs_approval, "it calls itself destructive"
        assert not card.use.needs_approval
        assert await perform(box, "test.add", x=1, y=2) == Success(value=3)
        assert await perform(box, "test.pair", x=1) == Success(value={"a": 1, "b": 1})
        many = await asyncio.gather(*(perform(box, "test.add", x=n, y=n) for n in range(30)))
        assert many == [Success(value=2 * n) for n in range(30)]
        refused = await perform(box, "test.refuse")
        assert isinstance(refused, Failure) and refused.retryable and refused.message == "not today"
        crashed = await perform(box, "test.crash")
        assert isinstance(crashed, Failure) and "secret" not in crashed.message
        assert kind_of(await perform(box, "test.add", x="one", y=2)) == "error", "the server checks as well"
        assert box.capacity.taken() == 0


async def test_a_call_that_hangs_is_ended_and_its_server_goes_on() -> None:
    async with McpServers([config(use=Use(timeout_s=0.3))]) as servers:
        box = Toolbox(servers.tools)
        assert kind_of(await perform(box, "test.hang")) == "timeout"
        assert await perform(box, "test.add", x=1, y=2) == Success(value=3)
        assert servers.servers[0].num_starts == 1


@pytest.mark.slow
async def test_a_server_that_dies_is_started_again_and_leaves_nothing_behind() -> None:
    async with McpServers([config()]) as servers:
        box = Toolbox(servers.tools)
        first, child = await perform(box, "test.pid"), await perform(box, "test.spawn")
        assert isinstance(first, Success) and isinstance(child, Success)
        assert kind_of(await perform(box, "test.die")) == "disconnected"
        second = await perform(box, "test.pid")
        assert isinstance(second, Success) and second.value != first.value
        os.kill(second.value, signal.SIGKILL)
        await asyncio.sleep(0.05)
        outcomes = [await perform(box, "test.add", x=1, y=2) for _ in range(2)]
        assert outcomes[-1] == Success(value=3)
        third = await perform(box, "test.pid")
        left = await perform(box, "test.spawn")
        assert isinstance(third, Success) and isinstance(left, Success)
    for process in (first.value, second.value, third.value, child.value, left.value):
        await has_ended(process)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def has_ended(process: int) -> None:
    async with asyncio.timeout(10):
        while is_running(process):  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.02)


KILLED = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
import test_tool_mcp as t
async def main():
    async with t.McpServers([t.config()]) as servers:
        box = t.Toolbox(servers.tools)
        print((await t.perform(box, "test.pid")).value, flush=True)
        await t.perform(box, "test.hang")
asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_killed_scheduler_leaves_no_server_behind() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, str(HERE), stdout=asyncio.subprocess.PIPE, env={**os.environ, **PATHS}
    )
    assert process.stdout is not None
    server = int(await process.stdout.readline())
    assert is_running(server)
    process.kill()
    await process.wait()
    await has_ended(server)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit('no such thing here')", "no such thing here"),
        pytest.param(
            "print('hello, I speak no MCP', flush=True); import time; time.sleep(60)",
            "within 1 s",
            marks=pytest.mark.slow,
        ),
    ],
)
async def test_a_server_that_cannot_be_used_says_why(code: str, words: str) -> None:
    server = McpServer(config(code, connect_timeout_s=1.0 if "within" in words else 20.0))
    with pytest.raises(NetworkError) as caught:
        await server.start()
    assert words in str(caught.value)
    await server.close()


async def test_a_program_that_is_not_there_and_an_address_where_nobody_is() -> None:
    for where in (StdioServer(command="no-such-program-anywhere"), HttpServer(url="http://127.0.0.1:9/mcp")):
        server = McpServer(ServerConfig(name="gone", where=where, connect_timeout_s=10))
        with pytest.raises(NetworkError, match="gone cannot be used"):
            await server.start()
        await server.close()


async def test_our_servers_pass_with_the_official_client(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Whales\n\nThe blue whale weighs 150 tonnes.\n")
    command = ["-m", "shoal.cli", "tools", "serve", "corpus", "--root", str(tmp_path)]
    async with Client(StdioServerParameters(command=sys.executable, args=command, env=PATHS)) as client:
        (listed,) = (await client.list_tools()).tools
        assert listed.name == "search" and listed.input_schema["required"] == ["query"]
        found = await client.call_tool("search", {"query": "how heavy is a whale"})
        assert not found.is_error and "150 tonnes" in str(found.content)
        assert found.structured_content["result"][0]["document"] == "a.md"
        assert (await client.call_tool("search", {"query": ""})).is_error
        assert (await client.call_tool("nothing", {})).is_error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tool", "arguments", "words"),
    [
        ("calculator", "calculate", {"expression": "2 ** 10 / 8"}, "128"),
        ("python", "run_python", {"program": "print(6 * 7)"}, "42"),
        ("documents", "read_document", {"document": "a.md"}, "150 tonnes"),
        ("web", "read_page", {"url": "http://127.0.0.1:9/"}, "not public"),
        ("browser", "navigate", {"url": "http://not-allowed.example/"}, "not-allowed.example"),
        ("pages", "check_page", {"name": "index.html", "texts": ["Hello"]}, '"ok":true'),
        ("evm", "balance", {"account": "me"}, "base_units"),
        ("memory", "add_memory", {"text": "Write the carry above the next column.", "family": "sums"}, "candidate"),
    ],
)
async def test_every_server_of_ours_with_the_official_client(
    tmp_path: Path, name: str, tool: str, arguments: dict[str, object], words: str
) -> None:
    if name in ("browser", "pages"):
        try:
            require_browser()
        except BrowserError as error:
            pytest.skip(f"no browser on this machine: {error.problem}")
    (tmp_path / "a.md").write_text("The blue whale weighs 150 tonnes.")
    (tmp_path / "index.html").write_text("<!doctype html><title>t</title><h1>Hello</h1>")
    command = ["-m", "shoal.cli", "tools", "serve", name, "--root", str(tmp_path)]
    server = StdioServerParameters(
        command=sys.executable, args=command, env={**PATHS, "SHOAL_HOME": str(tmp_path / "home")}
    )
    async with asyncio.timeout(100), Client(server) as client:
        for listed in (await client.list_tools()).tools:
            assert listed.description and listed.input_schema["type"] == "object" and listed.output_schema is not None
        found = await client.call_tool(tool, arguments)
        assert words in str(found.content)
        assert (await client.call_tool(tool, {"no_such_argument": 1})).is_error


@pytest.mark.slow
async def test_our_servers_over_http(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shoal.cli", "tools", "serve", "calculator", "--port", "0"]
    process = await asyncio.create_subprocess_exec(
        *command, stderr=asyncio.subprocess.PIPE, env={**os.environ, **PATHS}
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            said = (await process.stderr.readline()).decode()
        url = said.split(" at ")[1].split(";")[0]
        async with McpServers([ServerConfig(name="calc", where=HttpServer(url=url))]) as servers:
            policy = turns(plan(call("a", "calc.calculate", expression="2 ** 10 / 8")), answer("ok"))
            async with House(tmp_path, servers.tools, policy) as house:
                assert results(await house.run()) == {"a": "128"}
    finally:
        process.terminate()
        await process.wait()


def test_an_mcp_json_as_users_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_KEY", "s3cret")
    file = tmp_path / "mcp.json"
    search = {"type": "http", "url": "https://example.org/mcp", "headers": {"Authorization": "Bearer ${SEARCH_KEY}"}}
    search["shoal"] = {"timeout_s": 20, "tools": {"find": {"idempotent": True}}, "only": ["find"]}
    servers = {"files": {"command": "npx", "args": ["-y", "thing", "/data"], "disabled": False}, "search": search}
    file.write_text(json.dumps({"mcpServers": servers}))
    files, found = read_mcp_json(file)
    assert files.where == StdioServer(command="npx", args=("-y", "thing", "/data"))
    assert found.where == HttpServer(url="https://example.org/mcp", headers={"Authorization": "Bearer s3cret"})
    assert found.use_of("find") == Use(timeout_s=20, idempotent=True) and found.use_of("other") == Use(timeout_s=20)
    assert found.only == ("find",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("{}", "no mcpServers"),
        ('{"mcpServers": {"a b": {"command": "x"}}}', "a name has"),
        ('{"mcpServers": {"a": 7}}', "no object"),
        ('{"mcpServers": {"a": {}}}', "url"),
        ('{"mcpServers": {"a": {"command": "x", "env": {"K": "${NOT_SET_ANYWHERE}"}}}}', "NOT_SET_ANYWHERE is not set"),
        ('{"mcpServers": {"a": {"command": "x", "shoal": {"timeout_s": 0}}}}', "timeout_s = 0"),
        ('{"mcpServers": {"a": {"command": "x", "shoal": {"timeout": 5}}}}', "timeout"),
    ],
)
def test_what_is_wrong_with_an_mcp_json_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_mcp_json(file)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
async def test_servers_of_others_from_npm(tmp_path: Path) -> None:
    """The reference servers of the protocol, driven by a run from end to end."""
    names = ("server-everything", "server-filesystem", "server-memory")
    install = ["npm", "install", "--prefix", str(tmp_path / "npm"), "--no-audit", "--no-fund"]
    install += [f"@modelcontextprotocol/{name}@2026.8.31" for name in names]
    done = await asyncio.to_thread(subprocess.run, install, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"npm cannot install: {done.stderr[-200:]}")
    programs = tmp_path / "npm" / "node_modules" / ".bin"
    data = tmp_path / "data"
    data.mkdir()
    (data / "note.txt").write_text("the blue whale")
    servers = {
        "everything": {"command": str(programs / "mcp-server-everything")},
        "files": {"command": str(programs / "mcp-server-filesystem"), "args": [str(data)]},
        "memory": {
            "command": str(programs / "mcp-server-memory"),
            "env": {"MEMORY_FILE_PATH": str(tmp_path / "memory.jsonl")},
        },
    }
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": servers}))
    entity = {"name": "whale", "entityType": "animal", "observations": ["is blue"]}
    policy = turns(
        plan(
            call("echo", "everything.echo", message="hello"),
            call("sum", "everything.get-sum", a=2, b=40),
            call("read", "files.read_text_file", path=str(data / "note.txt")),
            call("escape", "files.read_text_file", path="/etc/passwd"),
            call("made", "memory.create_entities", entities=[entity]),
            call("found", "memory.search_nodes", "made", query="whale"),
            call("wrong", "everything.get-sum", a="two", b=40),
        ),
        answer("ok"),
    )
    async with McpServers(read_mcp_json(file)) as connected, House(tmp_path, connected.tools, policy) as house:
        found = results(await house.run(approve="none"))
    assert "hello" in str(found["echo"]) and "42" in str(found["sum"])
    assert "the blue whale" in str(found["read"]) and "is blue" in str(found["found"])
    assert found["escape"] == "!error" and found["wrong"] == "!arguments"


class Breaking:
    """A connection that breaks for each of its calls when that is let go."""

    def __init__(self) -> None:
        self.calls: list[asyncio.Event] = []

    async def call_tool(self, *_: object, **__: object) -> None:
        self.calls.append(asyncio.Event())
        await self.calls[-1].wait()
        raise MCPError(CONNECTION_CLOSED, "it is closed")


async def test_a_call_that_hears_late_of_a_broken_connection_leaves_the_next_one_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = McpServer(ServerConfig(name="s", where=StdioServer(command="none")))
    made: list[Breaking] = []

    async def hold(ready: asyncio.Future[Breaking], stop: asyncio.Event) -> None:
        made.append(Breaking())
        ready.set_result(made[-1])
        await stop.wait()

    monkeypatch.setattr(server, "_hold", hold)
    calls = [asyncio.create_task(server.call("x", {}, print)) for _ in range(2)]
    while not made or len(made[0].calls) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    for number, call_ in enumerate(calls):
        made[0].calls[number].set()
        await asyncio.wait({call_})
        assert isinstance(call_.exception(), MCPError)
        assert await server._connected(print) is made[1]  # type: ignore[comparison-overlap]
    await server.close()
    assert len(made) == 2


async def test_a_start_that_is_ended_by_others_is_no_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    server = McpServer(ServerConfig(name="s", where=StdioServer(command="none")))

    async def hold(ready: object, stop: asyncio.Event) -> None:
        await stop.wait()

    monkeypatch.setattr(server, "_hold", hold)
    connecting = asyncio.create_task(server._connected(lambda _: None))
    while server._owner is None:  # noqa: ASYNC110
        await asyncio.sleep(0)
    server._owner.cancel()
    with pytest.raises(NetworkError, match="it was ended"):
        await connecting
