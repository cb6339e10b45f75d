"""`shoal agent`: a task done by a model that calls tools, with a live tree; or a server of such runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.agents.scheduler.log import EventLog
    from shoal.agents.scheduler.policy import Policy
    from shoal.agents.scheduler.service import Runs

KEY_VARIABLE = "SHOAL_AGENT_KEY"


def run(
    task: str = "",
    /,
    *,
    tools: Path | None = None,
    builtin: tuple[str, ...] = (),
    root: Path | None = None,
    model: str = "embedded",
    endpoint: str = "",
    steps: int = 16,
    calls: int = 1000,
    tokens: int = 200_000,
    seconds: float = 600.0,
    usd: float = 1.0,
    session: str = "",
    approve: Flag = False,
    log: Path | None = None,
    resume: str = "",
    fork: str = "",
    list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
    port: int | None = None,
    threads: int = 1,
    json: Json = False,
) -> int:
    """Do a task by calling tools, many at once where they do not need each other.

    Tools come from an mcp.json and from Shoal's own (see shoal tools list). Everything that happens is kept in a log;
    a run that was killed goes on with --resume. A key for --endpoint is taken from SHOAL_AGENT_KEY.

    For example:

        shoal agent "What is 37 * 41, and what is 12 * 55?" --builtin calculator
        shoal agent "Which paper cites BM25?" --builtin corpus --root ~/papers --endpoint http://localhost:8000/v1
        shoal agent --tools mcp.json --port 8100

    Args:
        task: What to do.
        tools: An mcp.json.
        builtin: Built-in tools, each as a server of its own: calculator, python, documents, corpus.
        root: The folder that documents and corpus read.
        model: embedded, a directory, a .gguf file or a hub name; with --endpoint the name that it knows.
        endpoint: An OpenAI-compatible endpoint that decides in place of a model in this process, up to /v1.
        steps: At most so many decisions.
        calls: At most so many attempts to call a tool.
        tokens: At most so many tokens, read and written.
        seconds: At most so long.
        usd: At most so much money.
        session: Runs of one session see each other's tasks and answers.
        approve: Allow without asking the calls of tools that are marked as dangerous.
        log: The log's file; by default one under the user's data directory.
        resume: Go on with this run.
        fork: Begin another run with the events of a run up to a number: RUN:SEQ.
        list_: List the log's runs.
        port: Serve runs over HTTP there, on loopback, in place of doing one task; 0 takes a free one.
        threads: CPU threads of a model in this process.
    """
    from shoal.cli.tools import need_packages

    need_packages()
    from shoal.agents.scheduler.log import EventLog
    from shoal.agents.scheduler.records import Budget, RunRequest
    from shoal.agents.tools.mcp_json import read_mcp_json
    from shoal.fabric.identity import data_dir

    opened = EventLog(log or data_dir() / "agents" / "runs.db")
    if list_:
        _list(opened, json)
        return 0
    if not (task or resume or fork or port is not None):
        raise ConfigError("there is nothing to do.", "Give a task, --resume RUN, --fork RUN:SEQ, --list or --port.")
    servers = [*(read_mcp_json(tools) if tools is not None else []), *_builtin_servers(builtin, root)]
    budget = Budget(steps=steps, calls=calls, tokens=tokens, seconds=seconds, usd=usd)
    request = None
    if task:
        request = RunRequest(task=task, budget=budget, session=session, approve="none" if approve else "marked")
        request.check()
    return asyncio.run(_work(opened, servers, (model, endpoint, threads), request, resume, fork, port, json))


def _builtin_servers(names: tuple[str, ...], root: Path | None) -> list[Any]:
    """Our own tools in processes of their own, where a deadline can end them."""
    import sys

    import shoal
    from shoal.agents.builtin.catalogue import NEEDS_ROOT, builtin_tools
    from shoal.agents.tools.card import Use
    from shoal.agents.tools.mcp_json import ServerConfig, StdioServer

    found = []
    for name in names:
        builtin_tools(name, root)  # says now what would be wrong there
        arguments: tuple[str, ...] = ("-m", "shoal.cli", "tools", "serve", name)
        if name in NEEDS_ROOT and root is not None:
            arguments += ("--root", str(root.resolve()))
        env = {"PYTHONPATH": str(Path(shoal.__file__).parents[1])}
        where = StdioServer(command=sys.executable, args=arguments, env=env)
        found.append(ServerConfig(name=name, where=where, use=Use(idempotent=True)))
    return found


async def _work(
    log: EventLog,
    servers: list[Any],
    who: tuple[str, str, int],
    request: Any,
    resume: str,
    fork: str,
    port: int | None,
    as_json: bool,
) -> int:
    from shoal.agents.scheduler.service import Runs
    from shoal.agents.tools.mcp_client import McpServers
    from shoal.agents.tools.toolbox import Toolbox

    async with AsyncExitStack() as stack:
        connected = await stack.enter_async_context(McpServers(servers))
        policy = await stack.enter_async_context(_policy(*who))
        runs = Runs(log, Toolbox(connected.tools), policy)
        stack.push_async_callback(runs.close)
        if port is not None:
            await _serve(runs, port)
            return 0
        if resume:
            runs.resume(resume)
            name = resume
        elif fork:
            of, _, number = fork.rpartition(":")
            if not of or not number.isdigit():
                raise ConfigError(f"{fork!r} names no event.", "Write RUN:SEQ, as the events' ids are written.")
            name = runs.fork(of, int(number))
        else:
            name = runs.start(request)
        if as_json:
            await runs.ended(name)
        else:
            await _show(runs, name)
        summary = runs.summary(name)
    if as_json:
        print_json(summary)
    elif summary["answer"] is not None:
        console().print(summary["answer"], markup=False, soft_wrap=True)
    else:
        note(f"{summary['status']}: {summary['error']}")
    return 0 if summary["answer"] is not None else 1


@asynccontextmanager
async def _policy(model: str, endpoint: str, threads: int) -> AsyncIterator[Policy]:
    """Who decides: an endpoint, or a model in this process."""
    if endpoint:
        from shoal.agents.scheduler.endpoint import Endpoint, EndpointPolicy

        key = os.environ.get(KEY_VARIABLE, "")
        async with EndpointPolicy(Endpoint(url=endpoint, model=model, key=key)) as policy:
            yield policy
        return
    from shoal.agents.scheduler.local import SamplerPolicy
    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.rollout.host import model_cache

    found = await asyncio.to_thread(resolve, model, model_cache(), note)
    context = found.config().max_position_embeddings
    async with LocalEngine(found, threads=threads, max_sequences=4, context_tokens=context) as engine:
        yield SamplerPolicy(engine, engine.tokenizer)


async def _serve(runs: Runs, port: int) -> None:
    from contextlib import ExitStack

    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException

    from shoal.agents.http import run_routes
    from shoal.cli.hosting import host
    from shoal.serving.door import http_error
    from shoal.serving.events import EventStream
    from shoal.serving.server import listen

    routes = run_routes(runs, lambda frames: EventStream(frames, 24 * 3600.0, ExitStack()))
    listening = listen("127.0.0.1", port)
    note(f"serving runs at http://127.0.0.1:{listening.getsockname()[1]}/v1/runs; Ctrl-C ends")
    await host(Starlette(routes=routes, exception_handlers={HTTPException: http_error}), listening)


async def _show(runs: Runs, name: str) -> None:
    """Follow a run with a live tree, and ask for approval where a call waits for it."""
    import msgspec
    from rich.live import Live

    from shoal.cli.agent_tree import tree_of
    from shoal.cli.output import error_console

    note(f"run {name}")
    terminal = error_console()
    with Live(console=terminal, auto_refresh=False) as live:
        async for event in runs.follow(name):
            live.update(tree_of(runs.state(name)), refresh=terminal.is_terminal)
            if event.kind == "approval":
                data = msgspec.json.decode(event.data)
                live.stop()
                allowed = await asyncio.to_thread(_ask, f"{data['tool']} {data['arguments']}")
                runs.approve(name, data["call"], allowed, "terminal")
                live.start()
        live.update(tree_of(runs.state(name)), refresh=True)


def _ask(what: str) -> bool:
    import sys

    note(f"Allow this call? {what}")
    if not sys.stdin.isatty():
        note("nobody is there to ask: not allowed")
        return False
    return input("y/N ").strip().lower() in ("y", "yes")


def _list(log: EventLog, as_json: bool) -> None:
    import msgspec

    found = []
    for name, first, last in log.runs():
        task = msgspec.json.decode(first.data)["request"]["task"]
        status = (
            "open" if last is None else "done" if last.kind == "final" else msgspec.json.decode(last.data)["reason"]
        )
        found.append({"run": name, "status": status, "task": task})
    if as_json:
        print_json({"runs": found})
        return
    for one in found:
        console().print(f"{one['run']}  {one['status']:10} {one['task'][:80]}", markup=False, soft_wrap=True)
