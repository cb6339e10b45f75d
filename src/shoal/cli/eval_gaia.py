"""`shoal eval gaia`: have the questions of a GAIA set answered by runs, and score the answers (docs/agents.md)."""

from __future__ import annotations

import asyncio
import json as json_module
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Json
from shoal.errors import ConfigError, RecordError, RunError, StorageError
from shoal.protocol.codec import Record, from_json, read_jsonl

if TYPE_CHECKING:
    from shoal.agents.gaia.dataset import Asked
    from shoal.agents.gaia.evaluation import Answered

Many = Annotated[tuple[str, ...], Parameter(negative="", consume_multiple=True)]

RUNS = Path("runs")
SETTINGS, ANSWERS, SUMMARY, LOG = "settings.json", "answers.jsonl", "summary.json", "runs.db"
SAY_EVERY_S = 15.0
MAX_CONCURRENCY = 64


class Asking(Record, frozen=True):
    """What an evaluation asks of whom; two with the same are the same."""

    data: str
    model: str
    endpoint: str
    tools: str
    builtin: tuple[str, ...]
    questions: tuple[str, ...]
    steps: int
    tokens: int
    seconds: float
    usd: float
    max_tokens: int
    usd_per_million_in: float
    usd_per_million_out: float


def run(
    *,
    data: Path | None = None,
    model: str = "embedded",
    endpoint: str = "",
    level: tuple[int, ...] = (),
    questions: Many = (),
    limit: int | None = None,
    tools: Path | None = None,
    builtin: Many = ("calculator", "documents", "corpus", "python"),
    steps: int = 12,
    tokens: int = 200_000,
    seconds: float = 600.0,
    usd: float = 1.0,
    max_tokens: int = 1024,
    usd_per_million_in: float = 0.0,
    usd_per_million_out: float = 0.0,
    concurrency: int = 4,
    out: Path | None = None,
    resume: Path | None = None,
    context_tokens: int = 8192,
    threads: int = 1,
    device: str = "auto",
    json: Json = False,
) -> int:
    """Have GAIA's questions answered by an agent, and score the answers by the benchmark's rules.

    A set is a folder with metadata.jsonl and the files that its questions name, as the benchmark publishes it. Each
    answer is kept as soon as it is there, so an evaluation that was interrupted can be continued. A key for --endpoint
    is taken from SHOAL_AGENT_KEY.

    For example:

        shoal eval gaia --data ~/GAIA/2023/validation --endpoint https://api.example.com/v1 --model NAME
        shoal eval gaia --data ~/GAIA --level 1 --tools mcp.json --limit 20
        shoal eval gaia --resume runs/eval-gaia-20260101-120000

    Args:
        data: The set's folder.
        model: embedded, a directory, a .gguf file or a hub name; with --endpoint the name that it knows.
        endpoint: An OpenAI-compatible endpoint that decides in place of a model in this process, up to /v1.
        level: Only questions of this level; may be given several times.
        questions: Only these, by their task_id.
        limit: Only the first of them.
        tools: An mcp.json with tools for all questions, such as a search of the web and a browser.
        builtin: Built-in tools, started for each question with its files as their folder.
        steps: At most so many decisions a question.
        tokens: At most so many tokens a question, read and written.
        seconds: At most so long a question.
        usd: At most so much money a question.
        max_tokens: Of one decision.
        usd_per_million_in: What the endpoint charges for tokens read.
        usd_per_million_out: What it charges for tokens written.
        concurrency: Questions at once.
        out: Folder of the evaluation; by default a new one under runs. One that was begun there is continued.
        resume: Continue the evaluation in this folder, as it was begun.
        context_tokens: Longest conversation, of a model in this process.
        threads: CPU threads of a model in this process.
        device: auto, cpu, cuda or cuda:N.
    """
    from shoal.cli.tools import need_packages

    need_packages()
    if not 1 <= concurrency <= MAX_CONCURRENCY:
        raise ConfigError(f"--concurrency {concurrency} is not between 1 and {MAX_CONCURRENCY}.")
    if resume is not None:
        asking, path = _read_asking(resume), resume
    else:
        if data is None:
            raise ConfigError("there is nothing to ask.", "Name a set's folder with --data, or --resume FOLDER.")
        chosen = _chosen(data, level, questions, limit)
        asking = Asking(
            data=str(data.resolve()),
            model=model,
            endpoint=endpoint,
            tools=str(tools.resolve()) if tools is not None else "",
            builtin=builtin,
            questions=tuple(one.id for one in chosen),
            steps=steps,
            tokens=tokens,
            seconds=seconds,
            usd=usd,
            max_tokens=max_tokens,
            usd_per_million_in=usd_per_million_in,
            usd_per_million_out=usd_per_million_out,
        )
        path = out or RUNS / time.strftime("eval-gaia-%Y%m%d-%H%M%S")
    engine = {"context_tokens": context_tokens, "threads": threads, "device": device}
    found = asyncio.run(_evaluate(path, asking, concurrency, engine))
    if json:
        print_json(found)
    else:
        _print(found)
    return 0


def _chosen(data: Path, levels: Sequence[int], names: Sequence[str], limit: int | None) -> list[Asked]:
    from shoal.agents.gaia.dataset import read

    asked = read(data)
    if unknown := set(names) - {one.id for one in asked}:
        raise ConfigError(f"there is no question {min(unknown)!r} in {data}.")
    kept = [one for one in asked if (not levels or one.level in levels) and (not names or one.id in names)][:limit]
    if not kept:
        raise ConfigError(f"no question of {data} is left.", "Ask for other levels, or for more than --limit 0.")
    return kept


def _read_asking(path: Path) -> Asking:
    try:
        return from_json((path / SETTINGS).read_bytes(), Asking)
    except OSError:
        raise RunError(f"there is no evaluation in {path}.", "Begin one with shoal eval gaia --data.") from None
    except RecordError as error:
        raise StorageError(f"{path / SETTINGS} is damaged: {error.problem}", "Begin anew in another folder.") from None


async def _evaluate(path: Path, asking: Asking, concurrency: int, engine: dict[str, Any]) -> dict[str, Any]:
    from shoal.agents.gaia.dataset import read
    from shoal.agents.gaia.evaluation import Answered, Manner, answer_all
    from shoal.agents.scheduler.log import EventLog
    from shoal.agents.scheduler.records import Budget
    from shoal.agents.tools.mcp_client import McpServers
    from shoal.agents.tools.mcp_json import read_mcp_json
    from shoal.cli.agent import builtin_server
    from shoal.coordinator.rundir import RunDir

    known = {one.id: one for one in read(Path(asking.data))}
    if gone := [one for one in asking.questions if one not in known]:
        raise ConfigError(f"the question {gone[0]!r} is no longer in {asking.data}.", "Begin anew with --out.")
    folder = RunDir(path)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be made: {error.strerror}.", "Name another folder with --out.") from None
    folder.lock()
    try:
        if (folder.path / SETTINGS).exists() and _read_asking(folder.path) != asking:
            raise ConfigError(f"{path} holds another evaluation.", "Name another folder with --out, or use --resume.")
        folder.write_atomic(SETTINGS, json_module.dumps(msgspec.to_builtins(asking), indent=1).encode())
        folder.cut_half_line(ANSWERS)
        file = folder.path / ANSWERS
        done = {one.task: one for one in read_jsonl(file, Answered)} if file.exists() else {}
        missing = [known[one] for one in asking.questions if one not in done]
        if done:
            note(f"{len(done)} of {len(asking.questions)} answers are there already.")
        said = time.monotonic()

        def keep(one: Answered) -> None:
            nonlocal said
            folder.append_record(ANSWERS, one)
            done[one.task] = one
            if time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                right = sum(bool(x.right) for x in done.values())
                note(f"{len(done)} of {len(asking.questions)} answered, {right} right")

        if missing:
            budget = Budget(steps=asking.steps, tokens=asking.tokens, seconds=asking.seconds, usd=asking.usd)
            budget.check()
            async with AsyncExitStack() as stack:
                shared = McpServers(read_mcp_json(Path(asking.tools)) if asking.tools else [])
                servers = await stack.enter_async_context(shared)
                policy = await stack.enter_async_context(_policy(asking, engine, min(concurrency, len(missing))))

                @asynccontextmanager
                async def tools_for(place: Path) -> AsyncIterator[Sequence[Any]]:
                    own = [builtin_server(asking.builtin, place)] if asking.builtin else []
                    async with McpServers(own) as started:
                        yield [*started.tools, *servers.tools]

                log = EventLog(folder.path / LOG)
                manner = Manner(budget, min(concurrency, len(missing)))
                try:
                    await answer_all(missing, log, lambda _: policy, tools_for, manner, keep)
                finally:
                    log.close()
        found = summarise([done[one] for one in asking.questions if one in done])
        found |= {"model": asking.model, "asked": len(asking.questions), "folder": str(folder.path)}
        folder.write_atomic(SUMMARY, json_module.dumps(found, indent=1, allow_nan=False).encode())
        return found
    finally:
        folder.close()


@asynccontextmanager
async def _policy(asking: Asking, engine: dict[str, Any], at_once: int) -> AsyncIterator[Any]:
    """Who decides, with the settings that an evaluation fixes."""
    import os

    from shoal.cli.agent import KEY_VARIABLE

    if asking.endpoint:
        from shoal.agents.scheduler.endpoint import Endpoint, EndpointPolicy

        where = Endpoint(
            url=asking.endpoint,
            model=asking.model,
            key=os.environ.get(KEY_VARIABLE, ""),
            max_tokens=asking.max_tokens,
            usd_per_million_in=asking.usd_per_million_in,
            usd_per_million_out=asking.usd_per_million_out,
        )
        async with EndpointPolicy(where) as policy:
            yield policy
        return
    from shoal.agents.scheduler.local import SamplerPolicy
    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.protocol.sampling import SamplingParams
    from shoal.rollout.host import model_cache

    found = await asyncio.to_thread(resolve, asking.model, model_cache(), note)
    # What all questions' prompts begin with is computed once.
    prefix = 2 * engine["context_tokens"]
    async with LocalEngine(found, max_sequences=at_once, prefix_tokens=prefix, **engine) as local:
        yield SamplerPolicy(local, local.tokenizer, SamplingParams(max_tokens=asking.max_tokens, temperature=0.0))


def summarise(answers: Iterable[Answered]) -> dict[str, Any]:
    """Scores by level and in all, with 95 % intervals; means of what a question took."""
    kept = list(answers)
    levels = sorted({one.level for one in kept})
    blocks = {f"level {level}": _block([one for one in kept if one.level == level]) for level in levels}
    return {"levels": blocks, "all": _block(kept)}


def _block(answers: Sequence[Answered]) -> dict[str, Any]:
    from shoal.coordinator.reporting.paired import interval

    scored = [one for one in answers if one.right is not None]
    count = max(1, len(answers))
    share = sum(bool(one.right) for one in scored) / max(1, len(scored))
    return {
        "questions": len(answers),
        "scored": len(scored),
        "right": sum(bool(one.right) for one in scored),
        "success": share,
        "interval": list(interval(share, len(scored))) if scored else [0.0, 1.0],
        "seconds": sum(one.seconds for one in answers) / count,
        "tokens": sum(one.tokens for one in answers) / count,
        "usd": sum(one.usd for one in answers) / count,
        "calls": sum(one.calls for one in answers) / count,
        "decisions": sum(one.decisions for one in answers) / count,
        "unanswered": sum(one.answer is None for one in answers),
    }


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title in ("questions", "right", "success", "95 % interval", "seconds", "tokens", "usd", "calls"):
        table.add_column(title, justify="right")
    for name, block in [*found["levels"].items(), ("all", found["all"])]:
        low, high = block["interval"]
        table.add_row(
            name,
            str(block["questions"]),
            str(block["right"]),
            f"{block['success']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{block['seconds']:.1f}",
            f"{block['tokens']:.0f}",
            f"{block['usd']:.4f}",
            f"{block['calls']:.1f}",
        )
    console().print(table)
    if found["all"]["questions"] < found["asked"]:
        note(f"answers are missing; go on: shoal eval gaia --resume {found['folder']}")
    console().print(f"Every answer: {found['folder']}/{ANSWERS}", markup=False, soft_wrap=True)
