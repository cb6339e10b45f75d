"""An agent: a model that calls tools, the caller's own functions among them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.api._background import Kept, wait
from shoal.api.engine import Engine

if TYPE_CHECKING:
    from shoal.agents.scheduler.records import RunEvent
    from shoal.agents.scheduler.service import Runs
    from shoal.agents.tools.toolbox import Callee


@dataclass(frozen=True)
class Done:
    """What came of a task."""

    run: str
    """Its id in the agent's log."""
    answer: str | None
    """None where there is none; `error` says why."""
    error: str
    spent: dict[str, float]
    """Steps, calls, tokens, usd, seconds."""
    events: tuple[RunEvent, ...]
    """Everything that happened, in order."""


class Agent:
    """A model with tools. Close it, or use it as a context.

    Examples:
        ```python
        import shoal


        def price(item: str) -> float:
            "What an item costs, in euros."
            return {"apple": 0.5, "pear": 0.75}[item]


        with shoal.Agent(tools=[price], builtin=["calculator"]) as agent:
            done = agent.run("What do three apples and two pears cost?")
            print(done.answer, done.spent)
        ```
    """

    def __init__(
        self,
        model: Engine | str | Path = "embedded",
        *,
        tools: Sequence[Callable[..., Any]] = (),
        mcp: Path | None = None,
        builtin: Sequence[str] = (),
        root: Path | None = None,
        allow: Sequence[str] = (),
        endpoint: str = "",
        memory: Path | None = None,
        log: Path | None = None,
        threads: int = 1,
    ) -> None:
        """
        Args:
            model: an engine that is open, or what `Engine` takes; with `endpoint` the name that it knows.
            tools: functions with types and a docstring. They are called on another thread than the caller's; what
                waits should be `async`, and what computes for long belongs behind `mcp`.
            mcp: an mcp.json; it may name other agents as well.
            builtin: built-in tools (`shoal tools list`), each in a process of its own.
            root: the folder that documents and corpus read.
            allow: hosts that browser may reach.
            endpoint: an OpenAI-compatible endpoint that decides in place of a model in this process.
            memory: a folder of memories: what fits a task is put before it.
            log: the log's file; by default the one that `shoal agent` has.
            threads: CPU threads of a model that is loaded here.

        Raises:
            ConfigError: a tool cannot be described, or there is no such tool.
            ModelError: the model cannot be had or loaded.
        """
        from shoal.agents.tools.function import FunctionTool
        from shoal.cli.agent import builtin_servers
        from shoal.cli.tools import need_packages

        need_packages()
        own = [FunctionTool(function) for function in tools]
        servers = builtin_servers(tuple(builtin), root, "", tuple(allow))
        self._own_engine = None
        if not endpoint and not isinstance(model, Engine):
            model = self._own_engine = Engine(model, threads=threads, max_sequences=4)
        try:
            self._kept = Kept(_working(model, own, servers, mcp, endpoint, memory, log))
        except BaseException:
            self._close_engine()
            raise

    def run(
        self,
        task: str,
        *,
        steps: int = 16,
        calls: int = 1000,
        tokens: int = 200_000,
        seconds: float = 600.0,
        usd: float = 1.0,
        session: str = "",
        allow_marked: bool = False,
    ) -> Done:
        """Do a task.

        Args:
            task: what to do.
            steps: at most so many decisions.
            calls: at most so many attempts to call a tool.
            tokens: at most so many, read and written.
            seconds: at most so long.
            usd: at most so much money.
            session: tasks of one session see each other's answers.
            allow_marked: call tools that are marked as dangerous; otherwise such calls are refused, nobody being asked.

        Raises:
            RecordError, RunError: the task is empty, too long, or refused.
        """
        from shoal.agents.scheduler.records import Budget, RunRequest

        request = RunRequest(
            task=task,
            budget=Budget(steps=steps, calls=calls, tokens=tokens, seconds=seconds, usd=usd),
            session=session,
            approve="none" if allow_marked else "marked",
        )
        request.check()
        return wait(_done(self._kept.value, request))

    def close(self) -> None:
        """End its tools and let go of a model that it loaded; a second time does nothing."""
        self._kept.close()
        self._close_engine()

    def _close_engine(self) -> None:
        if self._own_engine is not None:
            self._own_engine.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _done(runs: Runs, request: Any) -> Done:
    name = runs.start(request)
    try:
        await runs.ended(name)
    except asyncio.CancelledError:
        runs.cancel(name)  # whoever was interrupted waits for it no more, and it would go on by itself
        raise
    told = runs.summary(name)
    return Done(
        run=name,
        answer=told["answer"],
        error=told["error"] or "",
        spent=dict(told["spent"]),
        events=tuple(runs.log.events(name)),
    )


@asynccontextmanager
async def _working(
    model: Engine | str | Path,
    own: Sequence[Callee],
    servers: Sequence[Any],
    mcp: Path | None,
    endpoint: str,
    memory: Path | None,
    log: Path | None,
) -> AsyncIterator[Runs]:
    """Runs with their tools connected; all of it ends with the context."""
    from shoal.agents.builtin.memories import notes_from
    from shoal.agents.scheduler.local import SamplerPolicy
    from shoal.agents.scheduler.log import EventLog
    from shoal.agents.scheduler.service import Runs
    from shoal.agents.tools.mcp_client import McpServers
    from shoal.agents.tools.mcp_json import read_agents, read_mcp_json
    from shoal.agents.tools.remote_agent import RemoteAgentTool
    from shoal.agents.tools.toolbox import Toolbox
    from shoal.cli.agent import Who, policy_of
    from shoal.fabric.identity import data_dir

    configured = [*(read_mcp_json(mcp) if mcp is not None else []), *servers]
    others = read_agents(mcp) if mcp is not None else []
    async with AsyncExitStack() as stack:
        connected = await stack.enter_async_context(McpServers(configured))
        toolbox = Toolbox([*own, *connected.tools, *map(RemoteAgentTool, others)])
        if isinstance(model, Engine):
            policy: Any = SamplerPolicy(model.local, model.tokenizer)
        else:
            policy = await stack.enter_async_context(policy_of(Who(str(model), endpoint, threads=1)))
        recall = None if memory is None else notes_from(memory)
        # Nobody is there to be asked: what is marked is refused at once.
        runs = Runs(
            EventLog(log or data_dir() / "agents" / "runs.db"), toolbox, policy, recall=recall, approval_timeout_s=0.0
        )
        stack.push_async_callback(runs.close)
        yield runs
