"""The sixty questions (`_questions`) worked on in several ways with the same tools.

A solver stands for a model that knows what to do, so what differs is only how calls are scheduled:

- `ours`: all calls that are possible now are one decision;
- `sequential`: one call a decision (ReAct);
- `minions`: a fixed supervisor with one worker type, which reads: it first has all chunks of all documents read, since
  it has no search, and works out the rest itself.

A decision takes `DECISION_S`, which stands for a quick model. Tokens are the characters of the prompts and decisions
that a model would have read and written, divided by four; money is what they would cost at `USD_PER_MILLION`.

`export` writes the sixty in GAIA's layout; `through_gaia` has them answered by the loop of `shoal eval gaia` by the
solver, `by_a_model` by a real model in the same three ways, whatever that shows.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from _questions import SERVED, Question, Solver, Wanted, make, read
from shoal.agents.builtin.catalogue import Surroundings, builtin_tools
from shoal.agents.gaia.dataset import Asked, write
from shoal.agents.gaia.dataset import read as read_set
from shoal.agents.gaia.evaluation import Answered, Manner, answer_all, record_of
from shoal.agents.scheduler.local import SamplerPolicy
from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import Decided, Policy, View
from shoal.agents.scheduler.prompt import messages
from shoal.agents.scheduler.records import Budget, Call, Decision, RunEvent, RunRequest, Spent
from shoal.agents.scheduler.service import Runs
from shoal.agents.tools.card import Use
from shoal.agents.tools.mcp_client import McpServers
from shoal.agents.tools.mcp_json import ServerConfig, StdioServer
from shoal.agents.tools.outcome import Failure
from shoal.agents.tools.toolbox import Callee, Toolbox
from shoal.engine.local import LocalEngine
from shoal.engine.source import resolve
from shoal.protocol.sampling import SamplingParams
from shoal.rollout.host import model_cache

DECISION_S = 0.2
USD_PER_MILLION = (0.15, 0.60)
"""Tokens read and written: the order of small hosted models' prices in 2026."""

SEEDS = 10

MODEL_TOKENS = 96
MODEL_AT_ONCE = 12
MODEL_CONTEXT = 4096
MODEL_PROMPT_CHARS = 8000
"""About two thousand tokens: what it reads is what takes its time."""

WAYS = ("ours", "sequential", "minions")

LEVELS = {"totals": 1, "compared": 1, "counts": 2, "hops": 2, "searched": 2, "statistics": 3}
"""By how many steps and tools a question takes."""


class Working:
    """A policy that works on one question in one way, and counts what a model would have read and written."""

    def __init__(self, question: Question, way: str) -> None:
        self._question, self._way = question, way
        self._steps = question.solve() if way != "minions" else self._supervise()
        self._wave: list[Wanted] | None = None
        self._values: list[Any] = []
        self._asked = 0

    async def decide(self, view: View) -> Decided:
        await asyncio.sleep(DECISION_S)
        decision = self._next(view)
        written = json.dumps({"answer": decision.answer, "calls": [call.arguments for call in decision.calls]})
        read_, wrote = sum(len(message.content) for message in messages(view, "full")) // 4, len(written) // 4
        usd = (read_ * USD_PER_MILLION[0] + wrote * USD_PER_MILLION[1]) / 1e6
        return Decided(decision, spent=Spent(tokens_in=read_, tokens_out=wrote, usd=usd))

    def _next(self, view: View) -> Decision:
        last = view.steps[-1].calls if view.steps else []
        if any(isinstance(view.calls[name].outcome, Failure) for name in last):
            return Decision(answer="unknown")
        self._values += [view.value(name) for name in last]
        try:
            if self._wave is None:
                self._wave = next(self._steps)
            elif len(self._values) == len(self._wave):
                values, self._values, self._asked = self._values, [], 0
                self._wave = self._steps.send(values)
        except StopIteration as ended:
            return Decision(answer=ended.value)
        wanted: Iterable[Wanted] = self._wave[self._asked :]
        wanted = list(wanted)[:1] if self._way == "sequential" else list(wanted)
        self._asked += len(wanted)
        return Decision(calls=tuple(Call(id="", tool=tool, arguments=given) for tool, given in wanted))

    def _supervise(self) -> Solver:
        (names,) = yield [("documents.list_documents", {})]
        firsts = yield [read(name) for name in names]
        rest = [(one["document"], number) for one in firsts for number in range(1, one["chunks"])]
        more = (yield [read(name, number) for name, number in rest]) if rest else []
        texts: dict[str, str] = {}
        for one in [*firsts, *more]:
            texts[one["document"]] = "\n".join(filter(None, [texts.get(one["document"], ""), one["text"]]))
        return self._question.minion(texts)


def questions(path: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Sixty questions, each worked on in three ways with our MCP servers."""
    use = Use(idempotent=True, timeout_s=60, max_concurrency=16)

    async def work() -> list[dict[str, Any]]:
        done: dict[str, list[Answered]] = {way: [] for way in WAYS}
        log = EventLog(path / "questions.db")
        for kind in SERVED:
            for seed in range(SEEDS):
                folder = path / f"{kind.__name__}-{seed}"
                asked = make(folder, kind, seed)
                one = Asked(folder.name, asked.text, LEVELS[kind.__name__], asked.answer, None)
                async with McpServers([builtin_server(name, folder, use) for name in SERVED[kind]]) as servers:
                    # Whoever is first warms the servers up, so each way is first as often as the others.
                    for way in (*WAYS[seed % 3 :], *WAYS[: seed % 3]):
                        runs = Runs(log, Toolbox(servers.tools), Working(asked, way))
                        name = runs.start(RunRequest(task=asked.text, budget=Budget(steps=64)))
                        await runs.ended(name)
                        done[way].append(record_of(one, runs.state(name)))
                        await runs.close()
            print(f"questions: {kind.__name__} done", file=sys.stderr)
        log.close()
        return [row(way, results) for way, results in done.items()]

    rows = asyncio.run(work())
    return rows, {f"{one['way']}_{key}": one[key] for one in rows for key in ("success", "latency_s", "tokens", "usd")}


def row(way: str, results: list[Answered]) -> dict[str, Any]:
    """One way's means."""
    count = max(1, len(results))
    return {
        "way": way,
        "questions": len(results),
        "success": sum(bool(one.right) for one in results) / count,
        "latency_s": sum(one.seconds for one in results) / count,
        "tokens": sum(one.tokens for one in results) / count,
        "usd": sum(one.usd for one in results) / count,
        "calls": sum(one.calls for one in results) / count,
        "decisions": sum(one.decisions for one in results) / count,
    }


def export(folder: Path, seeds: int = SEEDS) -> dict[str, Question]:
    """Write the questions in GAIA's layout; gives them by their ids."""
    made: dict[str, Question] = {}
    lines: list[tuple[Asked, list[Path]]] = []
    for kind in SERVED:
        for seed in range(seeds):
            name = f"{kind.__name__}-{seed}"
            question = made[name] = make(folder / "files" / name, kind, seed)
            asked = Asked(name, question.text, LEVELS[kind.__name__], question.answer, None)
            lines.append((asked, sorted((folder / "files" / name).iterdir())))
    write(folder, lines)
    return made


class Prefixed:
    """A tool of ours in this process under the name that its server would give it."""

    def __init__(self, callee: Callee, server: str) -> None:
        self._callee = callee
        self.card = msgspec.structs.replace(callee.card, name=f"{server}.{callee.card.name}")

    async def call(self, arguments: dict[str, Any], progress: Any) -> Any:
        return await self._callee.call(arguments, progress)


@asynccontextmanager
async def tools_here(folder: Path) -> AsyncIterator[list[Callee]]:
    """All tools that the questions need, in this process."""
    names = ("documents", "corpus", "calculator", "python")
    yield [Prefixed(one, name) for name in names for one in builtin_tools(name, Surroundings(folder))]


def through_gaia(path: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The sixty in GAIA's layout, read back, answered by the solver through GAIA's loop, and scored by its rules."""
    made = export(path / "set")
    kept: list[Answered] = []
    log = EventLog(path / "gaia.db")
    manner = Manner(Budget(steps=64), concurrency=8, instruct=False)
    asyncio.run(
        answer_all(
            read_set(path / "set"), log, lambda one: Working(made[one.id], "ours"), tools_here, manner, kept.append
        )
    )
    log.close()
    right = sum(bool(one.right) for one in kept)
    return [{**row("gaia", kept), "levels": sorted({one.level for one in kept})}], {"gaia_right": right}


@dataclass(frozen=True)
class OneCall:
    """A model that may only call one tool a decision: of what it wants, the first is done."""

    policy: Policy

    async def decide(self, view: View) -> Decided:
        made = await self.policy.decide(view)
        if made.decision is None or len(made.decision.calls) < 2:
            return made
        return replace(made, decision=msgspec.structs.replace(made.decision, calls=made.decision.calls[:1]))


class Supervisor:
    """A fixed supervisor over readers: all chunks of all documents are read, then the model answers from the texts."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    async def decide(self, view: View) -> Decided:
        match len(view.steps):
            case 0:
                return _calls([("documents.list_documents", {})])
            case 1:
                return _calls([read(name) for name in view.value(view.steps[0].calls[0]) or ()])
            case 2:
                firsts = [view.value(name) for name in view.steps[1].calls]
                rest = [(one["document"], number) for one in firsts if one for number in range(1, one["chunks"])]
                if rest:
                    return _calls([read(name, number) for name, number in rest])
        return await self._policy.decide(replace(view, must_answer="all that there is has been read"))


def _calls(wanted: list[Wanted]) -> Decided:
    return Decided(Decision(calls=tuple(Call(id="", tool=tool, arguments=given) for tool, given in wanted)))


MODEL_WAYS: dict[str, tuple[Callable[[Policy], Policy], int]] = {
    "ours": (lambda policy: policy, 4),
    "sequential": (OneCall, 8),
    "minions": (Supervisor, 4),
}
"""How a model works in each way, and its decisions at most: one call a decision needs more of them."""


def by_a_model(path: Path, name: str, seconds: float) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The same sixty by a model in this process in all three ways, each within a time.

    A question that it did not come to counts as wrong.
    """
    export(path / "set")
    asked = read_set(path / "set")
    # One of each kind in turn, so that a time that is too short leaves out none of them.
    order = [asked[kind * SEEDS + seed] for seed in range(SEEDS) for kind in range(len(SERVED))]

    async def work() -> list[dict[str, Any]]:
        model = await asyncio.to_thread(resolve, name, model_cache(), lambda text: print(text, file=sys.stderr))
        log = EventLog(path / "model.db")
        engine = LocalEngine(
            model, context_tokens=MODEL_CONTEXT, max_sequences=MODEL_AT_ONCE, prefix_tokens=2 * MODEL_CONTEXT
        )
        rows = []
        async with engine as local:
            params = SamplingParams(max_tokens=MODEL_TOKENS, temperature=0.0)
            plain = SamplerPolicy(local, local.tokenizer, params, prompt_chars=MODEL_PROMPT_CHARS)
            for way, (working, steps) in MODEL_WAYS.items():
                policy = working(plain)
                manner = Manner(Budget(steps=steps, seconds=seconds), concurrency=MODEL_AT_ONCE)
                kept = await _reached(order, log, policy, manner, seconds, f"model, {way}")
                found = {**row(way, kept), "way": f"{name}, {way}", "reached": len(kept), "questions": len(order)}
                rows.append({**found, "success": sum(bool(one.right) for one in kept) / len(order)})
        log.close()
        return rows

    rows = asyncio.run(work())
    ways = zip(MODEL_WAYS, rows, strict=True)
    return rows, {f"model_{way}_{key}": one[key] for way, one in ways for key in ("success", "reached", "latency_s")}


async def _reached(
    order: list[Asked], log: EventLog, policy: Policy, manner: Manner, seconds: float, said: str
) -> list[Answered]:
    """The questions that were answered in time."""
    kept: list[Answered] = []

    def keep(one: Answered) -> None:
        kept.append(one)
        print(f"{said}: {len(kept)} of {len(order)}, {sum(bool(x.right) for x in kept)} right", file=sys.stderr)

    try:
        async with asyncio.timeout(seconds):
            await answer_all(order, log, lambda _: policy, tools_here, manner, keep)
    except TimeoutError:
        print(f"{said}: its {seconds:g} s are over", file=sys.stderr)
    return kept


def seconds_between(events: list[RunEvent]) -> float:
    """From the run's first event to its last."""
    return events[-1].time - events[0].time


def builtin_server(name: str, root: Path, use: Use) -> ServerConfig:
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = ("-m", "shoal.cli", "tools", "serve", name, "--root", str(root))
    where = StdioServer(command=sys.executable, args=command, env=environment)
    return ServerConfig(name=name, where=where, use=use)
