"""`shoal agent serve` and `shoal agent --port`: an agent for others, as an MCP tool or as runs over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from shoal.agents.scheduler.service import Runs
    from shoal.serving.keys import Keys

KEYS_VARIABLE = "SHOAL_API_KEYS"

STREAM_S = 24 * 3600.0
"""A follower of a run is cut off after this long, and may come back."""

Many = Annotated[tuple[str, ...], Parameter(negative="")]


def serve(
    *,
    name: str = "agent",
    about: str = "Does a task that is told in words, with tools of its own, and answers in a few words.",
    tools: Path | None = None,
    builtin: Many = (),
    root: Path | None = None,
    search_url: str = "",
    allow: Many = (),
    model: str = "embedded",
    endpoint: str = "",
    steps: int = 16,
    calls: int = 1000,
    tokens: int = 200_000,
    seconds: float = 600.0,
    usd: float = 1.0,
    approve: Flag = False,
    log: Path | None = None,
    port: int | None = None,
    host: str = "127.0.0.1",
    threads: int = 1,
) -> None:
    """Be an MCP server with one tool, which is the agent: a task in, an answer out. Other agents can call it.

    On standard input and output, or with --port over HTTP. Each call is a run in the log with the budget given here.

    For example:

        shoal agent serve --name librarian --about "Finds passages in our papers." --builtin corpus --root ~/papers
        shoal agent serve --name librarian --tools mcp.json --port 8300

    Args:
        name: What the tool is called.
        about: What it is good for, in words: others choose it by them.
        tools: An mcp.json; it may name other agents as well.
        builtin: Built-in tools; may be given several times.
        root: The folder that documents and corpus read and pages writes.
        search_url: The search service of the tools web.
        allow: A host that browser may reach, or that web may read although it is not public.
        model: embedded, a directory, a .gguf file or a hub name; with --endpoint the name that it knows.
        endpoint: An OpenAI-compatible endpoint that decides in place of a model in this process, up to /v1.
        steps: At most so many decisions a task.
        calls: At most so many attempts to call a tool.
        tokens: At most so many tokens, read and written.
        seconds: At most so long.
        usd: At most so much money.
        approve: Allow the calls of tools that are marked as dangerous; without it they are refused.
        log: The log's file; by default one under the user's data directory.
        port: Serve streamable HTTP there, at /mcp, instead of standard input and output; 0 takes a free one.
        host: A loopback address to listen on: there are no keys.
        threads: CPU threads of a model in this process.
    """
    import asyncio
    import logging

    from shoal.cli.tools import need_packages

    need_packages()
    from shoal.agents.scheduler.as_tool import AgentTool
    from shoal.agents.scheduler.log import EventLog
    from shoal.agents.scheduler.records import Budget, RunRequest
    from shoal.agents.tools.mcp_server import make_server, serve_stdio
    from shoal.cli.agent import Tooling, Who, builtin_servers, with_runs
    from shoal.cli.tools import serve_over_http
    from shoal.fabric.identity import data_dir

    # Standard output is the protocol's.
    logging.basicConfig(level=logging.WARNING)
    budget = Budget(steps=steps, calls=calls, tokens=tokens, seconds=seconds, usd=usd)
    request = RunRequest(task="a task", budget=budget, approve="none" if approve else "marked")
    request.check()
    opened = EventLog(log or data_dir() / "agents" / "runs.db")
    tooling = Tooling(tools, builtin_servers(builtin, root, search_url, allow))

    async def work(runs: Runs) -> int:
        server = make_server(name, [AgentTool(runs, name, about, request)])
        if port is None:
            await serve_stdio(server)
        else:
            await serve_over_http(server, host, port, progress=True)
        return 0

    who = Who(model=model, endpoint=endpoint, threads=threads)
    asyncio.run(with_runs(opened, who, tooling, work, approval_timeout_s=0.0))


def make_key(path: Path | None, name: str, *, as_json: bool) -> None:
    """Make a key for the HTTP server, and show it once."""
    from shoal.serving import keys

    file = path or _keys_file()
    made = keys.add(file, name)
    if as_json:
        print_json({"name": name, "key": made, "file": str(file)})
        return
    note(f"kept as a hash in {file}; this is the only time that the key itself is shown:")
    console().print(made, soft_wrap=True, markup=False)


def admitted(path: Path | None, host: str) -> Keys:
    """Who is let in; raises `ConfigError` where everybody on the network would be."""
    from shoal.config import is_loopback
    from shoal.serving.keys import Keys, digest, load

    given = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    names = load(path or _keys_file()).names | {digest(key): f"given {n}" for n, key in enumerate(given, start=1)}
    if not names and not is_loopback(host):
        raise ConfigError(
            f"on {host} everybody who can reach this machine could have tasks done.",
            "Make a key with shoal agent --new-key NAME, or listen on 127.0.0.1.",
        )
    return Keys(names)


def _keys_file() -> Path:
    from shoal.fabric.identity import data_dir

    return data_dir() / "agents" / "keys"


class KeyDoor:
    """ASGI middleware: without a valid key nobody learns anything but that one is needed; where none is asked for,
    other sites' pages are kept out (`serving.origin`)."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from shoal.serving.errors import ApiError

        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as refusal:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        from starlette.datastructures import Headers

        from shoal.serving.errors import ApiError
        from shoal.serving.origin import check_page

        if not self._keys.names:
            check_page(Headers(scope=scope))
        elif not self._is_known(scope):
            raise ApiError(401, "A valid API key is needed, as Authorization: Bearer.", code="invalid_api_key")

    def _is_known(self, scope: Scope) -> bool:
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = header.decode("latin-1").partition(" ")
        return kind.lower() == "bearer" and self._keys.owner(key.strip()) is not None


def http_app(runs: Runs, keys: Keys) -> Any:
    """Runs over HTTP, behind keys where there are any."""
    from contextlib import ExitStack

    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException

    from shoal.agents.http import run_routes
    from shoal.serving.door import http_error
    from shoal.serving.events import EventStream

    routes = run_routes(runs, lambda frames: EventStream(frames, STREAM_S, ExitStack()))
    return KeyDoor(Starlette(routes=routes, exception_handlers={HTTPException: http_error}), keys)


async def serve_http(runs: Runs, host: str, port: int, keys: Keys) -> None:
    """Serve runs until Ctrl-C."""
    from shoal.cli.hosting import host as serve_app
    from shoal.serving.server import listen

    listening = listen(host, port)
    note(f"serving runs at http://{host}:{listening.getsockname()[1]}/v1/runs; Ctrl-C ends")
    await serve_app(http_app(runs, keys), listening)
