"""`shoal agent`: a task done by a model that calls tools, with a live tree; or a server of such runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from shoal.cli import agent_host, agent_join, agent_serving
from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.agents.scheduler.log import EventLog
    from shoal.agents.scheduler.policy import Policy
    from shoal.agents.scheduler.records import RunRequest
    from shoal.agents.scheduler.service import Runs
    from shoal.agents.tools.mcp_json import ServerConfig

KEY_VARIABLE = "SHOAL_AGENT_KEY"

Many = Annotated[tuple[str, ...], Parameter(negative="")]

app = App(name="agent")
app.command(agent_serving.serve)
app.command(agent_host.run, name="host")
app.command(agent_join.run, name="join")


@app.default
def run(
    task: str = "",
    /,
    *,
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
    session: str = "",
    memory: Path | None = None,
    approve: Flag = False,
    episode: Path | None = None,
    reward: float = 0.0,
    log: Path | None = None,
    resume: str = "",
    fork: str = "",
    list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
    port: int | None = None,
    host: str = "127.0.0.1",
    keys: Path | None = None,
    new_key: str | None = None,
    threads: int = 1,
    json: Json = False,
) -> int:
    """Do a task by calling tools, many at once where they do not need each other.

    Tools come from an mcp.json and from Shoal's own (see shoal tools list). Everything that happens is kept in a log;
    a run that was killed goes on with --resume. A key for --endpoint is taken from SHOAL_AGENT_KEY.

    For example:

        shoal agent "What is 37 * 41, and what is 12 * 55?" --builtin calculator
        shoal agent "Which paper cites BM25?" --builtin corpus --root ~/papers --endpoint http://localhost:8000/v1
        shoal agent "What do they charge?" --builtin browser --allow example.org
        shoal agent --tools mcp.json --port 8100
        shoal agent serve --name librarian --tools mcp.json

    Args:
        task: What to do.
        tools: An mcp.json; it may name other agents as well.
        builtin: Built-in tools, each as a server of its own (see shoal tools list); may be given several times.
        root: The folder that documents and corpus read and pages writes.
        search_url: The search service of the tools web: a SearXNG instance, or an address with {query} in it.
        allow: A host that browser may reach, or that web may read although it is not public; several times for more.
        model: embedded, a directory, a .gguf file or a hub name; with --endpoint the name that it knows.
        endpoint: An OpenAI-compatible endpoint that decides in place of a model in this process, up to /v1.
        steps: At most so many decisions.
        calls: At most so many attempts to call a tool.
        tokens: At most so many tokens, read and written.
        seconds: At most so long.
        usd: At most so much money.
        session: Runs of one session see each other's tasks and answers.
        memory: A folder of memories: what fits the task is put before it, as notes (shoal memory).
        approve: Allow without asking the calls of tools that are marked as dangerous.
        episode: Add the run to this file, as an episode that can be trained on; for a model in this process.
        reward: What the episode was worth.
        log: The log's file; by default one under the user's data directory.
        resume: Go on with this run.
        fork: Begin another run with the events of a run up to a number: RUN:SEQ.
        list_: List the log's runs.
        port: Serve runs over HTTP there, in place of doing one task; 0 takes a free one.
        host: Address to serve on; beyond loopback keys are needed.
        keys: File of keys' hashes; by default one under the user's data directory.
        new_key: Make a key of this name, print it once, keep its hash in the file, and leave.
        threads: CPU threads of a model in this process.
    """
    from shoal.cli.tools import need_packages

    need_packages()
    from shoal.agents.scheduler.log import EventLog
    from shoal.agents.scheduler.records import Budget, RunRequest
    from shoal.fabric.identity import data_dir

    if new_key is not None:
        agent_serving.make_key(keys, new_key, as_json=json)
        return 0
    opened = EventLog(log or data_dir() / "agents" / "runs.db")
    if list_:
        _list(opened, json)
        return 0
    if not (task or resume or fork or port is not None):
        raise ConfigError("there is nothing to do.", "Give a task, --resume RUN, --fork RUN:SEQ, --list or --port.")
    if episode is not None and endpoint:
        raise ConfigError("an endpoint's text is no token: --episode needs a model in this process.")
    admitted = agent_serving.admitted(keys, host) if port is not None else None
    who = Who(model=model, endpoint=endpoint, threads=threads)
    tooling = Tooling(tools, builtin_servers(builtin, root, search_url, allow))
    budget = Budget(steps=steps, calls=calls, tokens=tokens, seconds=seconds, usd=usd)
    request = None
    if task:
        request = RunRequest(
            task=task,
            budget=budget,
            session=session,
            approve="none" if approve else "marked",
            record=episode is not None,
        )
        request.check()

    async def work(runs: Runs) -> int:
        if port is not None:
            assert admitted is not None
            await agent_serving.serve_http(runs, host, port, admitted)
            return 0
        name = _begin(runs, request, resume, fork)
        if json:
            await runs.ended(name)
        else:
            await _show(runs, name)
        if episode is not None:
            _keep_episode(runs, name, episode, reward)
        return _report(runs.summary(name), json)

    return asyncio.run(with_runs(opened, who, tooling, work, memory=memory))


@dataclass(frozen=True)
class Who:
    """Who decides."""

    model: str
    endpoint: str
    threads: int


@dataclass(frozen=True)
class Tooling:
    """Which tools there are."""

    file: Path | None
    """An mcp.json."""
    own: Sequence[ServerConfig]


async def with_runs(
    log: EventLog,
    who: Who,
    tooling: Tooling,
    work: Callable[[Runs], Awaitable[int]],
    *,
    approval_timeout_s: float | None = None,
    memory: Path | None = None,
) -> int:
    """Do something with runs that have their tools connected and their model loaded; all of it ends afterwards.

    Args:
        approval_timeout_s: nobody's answer within this is a no.
        memory: a folder of memories that runs are shown notes from.
    """
    from shoal.agents.scheduler.runner import APPROVAL_TIMEOUT_S
    from shoal.agents.scheduler.service import Runs
    from shoal.agents.tools.mcp_client import McpServers
    from shoal.agents.tools.mcp_json import read_agents, read_mcp_json
    from shoal.agents.tools.remote_agent import RemoteAgentTool
    from shoal.agents.tools.toolbox import Callee, Toolbox

    servers = [*(read_mcp_json(tooling.file) if tooling.file is not None else []), *tooling.own]
    others = read_agents(tooling.file) if tooling.file is not None else []
    async with AsyncExitStack() as stack:
        connected = await stack.enter_async_context(McpServers(servers))
        callees: list[Callee] = [*connected.tools, *map(RemoteAgentTool, others)]
        policy = await stack.enter_async_context(policy_of(who))
        timeout_s = APPROVAL_TIMEOUT_S if approval_timeout_s is None else approval_timeout_s
        recall = None
        if memory is not None:
            from shoal.agents.builtin.memories import notes_from

            recall = notes_from(memory)
        runs = Runs(log, Toolbox(callees), policy, recall=recall, approval_timeout_s=timeout_s)
        stack.push_async_callback(runs.close)
        return await work(runs)


def builtin_servers(
    names: Sequence[str], root: Path | None, search_url: str = "", allow: Sequence[str] = ()
) -> list[ServerConfig]:
    """Our own tools in processes of their own, where a deadline can end them."""
    return [builtin_server((name,), root, search_url, allow, called=name) for name in names]


def builtin_server(
    names: Sequence[str],
    root: Path | None,
    search_url: str = "",
    allow: Sequence[str] = (),
    *,
    called: str = "tools",
) -> ServerConfig:
    """Several of our tools in one process."""
    import sys

    import shoal
    from shoal.agents.builtin.catalogue import Surroundings, check_builtin
    from shoal.agents.tools.card import Use
    from shoal.agents.tools.mcp_json import ServerConfig, StdioServer

    arguments = ["-m", "shoal.cli", "tools", "serve", *names]
    for name in names:
        check_builtin(name, Surroundings(root, search_url, tuple(allow)))  # says now what would be wrong there
    if root is not None:
        arguments += ["--root", str(root.resolve())]
    if search_url:
        arguments += ["--search-url", search_url]
    for host in allow:
        arguments += ["--allow", host]
    env = {"PYTHONPATH": str(Path(shoal.__file__).parents[1])}
    if "SHOAL_HOME" in os.environ:
        env["SHOAL_HOME"] = os.environ["SHOAL_HOME"]
    acting = {"click", "type_text", "select_option", "scroll", "go_back"}
    where = StdioServer(command=sys.executable, args=tuple(arguments), env=env)
    return ServerConfig(name=called, where=where, use=Use(idempotent=True), tools=dict.fromkeys(acting, Use()))


def _begin(runs: Runs, request: RunRequest | None, resume: str, fork: str) -> str:
    if resume:
        runs.resume(resume)
        return resume
    if fork:
        of, _, number = fork.rpartition(":")
        if not of or not number.isdigit():
            raise ConfigError(f"{fork!r} names no event.", "Write RUN:SEQ, as the events' ids are written.")
        return runs.fork(of, int(number))
    assert request is not None
    return runs.start(request)


def _report(summary: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print_json(summary)
    elif summary["answer"] is not None:
        console().print(summary["answer"], markup=False, soft_wrap=True)
    else:
        note(f"{summary['status']}: {summary['error']}")
    return 0 if summary["answer"] is not None else 1


def _keep_episode(runs: Runs, name: str, file: Path, reward: float) -> None:
    """Add the run's episode to a file of episodes."""
    from shoal.agents.scheduler.episodes import episode_of
    from shoal.errors import StorageError
    from shoal.protocol.codec import to_json

    made = episode_of(list(runs.log.events(name)), reward)
    made.check()
    try:
        with file.open("ab") as lines:
            lines.write(to_json(made) + b"\n")
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror}.", "Name another file.") from None
    note(f"the run is an episode in {file}: {len(made.turns)} turns, {made.num_tokens} tokens drawn")


@asynccontextmanager
async def policy_of(who: Who) -> AsyncIterator[Policy]:
    """Who decides: an endpoint, or a model in this process."""
    if who.endpoint:
        from shoal.agents.scheduler.endpoint import Endpoint, EndpointPolicy

        key = os.environ.get(KEY_VARIABLE, "")
        async with EndpointPolicy(Endpoint(url=who.endpoint, model=who.model, key=key)) as policy:
            yield policy
        return
    from shoal.agents.scheduler.local import SamplerPolicy
    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.rollout.host import model_cache

    found = await asyncio.to_thread(resolve, who.model, model_cache(), note)
    context = found.config().max_position_embeddings
    async with LocalEngine(found, threads=who.threads, max_sequences=4, context_tokens=context) as engine:
        yield SamplerPolicy(engine, engine.tokenizer)


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
