"""`shoal eval evm`: measure a model on the quests of an EVM chain (docs/evm.md)."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from msgspec.structs import replace

from shoal.cli.output import console, error_console, note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import ConfigError, ShoalError, TaskError

if TYPE_CHECKING:
    from shoal.cli.evaluation import Evaluation, Measured
    from shoal.envs.evm.definition import Definition
    from shoal.envs.evm.evaluation import Manner, Played
    from shoal.envs.evm.speakers import Speaker

Many = Annotated[tuple[str, ...], Parameter(negative="", consume_multiple=True)]

RUNS = Path("runs")
MAX_CONCURRENCY = 256
SAY_EVERY_S = 15.0
"""Between two lines of progress where nobody watches a terminal."""


def run(
    *,
    model: str | None = None,
    endpoint: str = "",
    api_key_env: str = "",
    actions: Literal["typescript", "python", "typed"] = "typescript",
    mode: Literal["multi", "naive"] = "multi",
    scoring: Literal["both", "strict", "paper"] = "both",
    groups: Many = (),
    tasks: Many = (),
    limit: int | None = None,
    rounds: int | None = None,
    seed: int = 0,
    max_tokens: int = 1024,
    temperature: float = 0.0,
    constrain: Literal["no", "form", "seen"] = "no",
    brief: Flag = False,
    official: Path | None = None,
    file: Path | None = None,
    fork_url: str = "",
    fork_block: int = 0,
    concurrency: int = 16,
    out: Path | None = None,
    resume: Path | None = None,
    context_tokens: int = 8192,
    threads: int = 1,
    device: str = "auto",
    json: Json = False,
) -> int:
    """Measure a model on the quests of an EVM chain, by group and split, of 10,700 points in all.

    It writes scripts or typed actions; what they do to the chain is judged. Each episode is kept in a folder as soon as
    it is over, so an evaluation that was interrupted can be continued; at its end the folder holds report.html.

    For example:

        shoal eval evm --actions typed --rounds 3
        shoal eval evm --model runs/NAME --actions typed --groups native erc20
        shoal eval evm --model http://127.0.0.1:8000/v1 --limit 20
        shoal eval evm --endpoint https://api.example.com/v1 --model NAME --api-key-env EXAMPLE_KEY
        shoal eval evm --fork-url https://rpc.example.com --fork-block 60000000 --concurrency 2
        shoal eval evm --resume runs/eval-evm-20260101-120000

    Args:
        model: A run's folder, embedded, a directory, a .gguf file, a hub name, or the URL of a server such as shoal
            serve; with --endpoint the name that the server gives it. By default embedded.
        endpoint: URL of a server with OpenAI's API, up to and with /v1.
        api_key_env: Variable of the environment that holds the server's key.
        actions: How the model acts: scripts as the benchmark has them (typescript), in Python, or JSON (typed).
        mode: multi lets it act step by step in a workflow and see what each did; naive lets it answer once.
        scoring: What the table shows; records, summary and report hold both.
        groups: Groups of tasks; see shoal evm tasks.
        tasks: Ids of tasks; all 107 if neither groups nor tasks are given.
        limit: Only the first of these.
        rounds: Instances of each task; from two on there are intervals. By default 1.
        seed: Which instances; also of the sampling, where temperature is above 0.
        max_tokens: Longest answer.
        temperature: 0 is greedy.
        constrain: With form, a grammar lets only valid actions through, with seen also only addresses that the model
            has read: typed actions, on this machine or by shoal serve.
        brief: A short prompt, for small models on payments; with typed actions.
        official: The benchmark's folder of JSON files, for its own wording.
        file: A TOML file of tasks in place of those that come with Shoal.
        fork_url: JSON-RPC of a live chain, to act on forks of it (by Anvil) instead of the offline chain.
        fork_block: The block at which to fork; it pins what the model meets.
        concurrency: Episodes at once, each on a chain of its own.
        out: Folder of the evaluation; by default a new one under runs. One that was begun there is continued.
        resume: Continue the evaluation in this folder, as it was begun; --rounds may add to it.
        context_tokens: Longest conversation, on this machine.
        threads: CPU threads.
        device: auto, cpu, cuda or cuda:N.
    """
    from shoal.cli.evaluation import Evaluation, Measured, read_measured

    if not 1 <= concurrency <= MAX_CONCURRENCY:
        raise ConfigError(f"--concurrency {concurrency} is not between 1 and {MAX_CONCURRENCY}.")
    for name, number in (("--limit", limit), ("--rounds", rounds), ("--max-tokens", max_tokens)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} {number} is not at least 1.")
    if resume is not None:
        measured = read_measured(resume)
        measured = replace(measured, rounds=max(measured.rounds, rounds or 1))
        path = resume
    else:
        where, called = _where(model, endpoint, api_key_env)
        definitions = chosen(known(str(file or ""), str(official or "")), groups, tasks, limit)
        measured = Measured(
            model=called,
            endpoint=where,
            actions=actions,
            mode=mode,
            prompt="brief" if brief else "full",
            constrain=constrain,
            tasks=tuple(definition.id for definition in definitions),
            file=str(file or ""),
            official=str(official or ""),
            rounds=rounds or 1,
            seed=seed,
            max_tokens=max_tokens,
            context_tokens=context_tokens,
            temperature=temperature,
            fork_url=fork_url,
            fork_block=fork_block,
        )
        path = out or RUNS / time.strftime("eval-evm-%Y%m%d-%H%M%S")
    _check(measured)
    engine = {"device": device, "threads": threads}
    with Evaluation(path, measured) as evaluation:
        try:
            found = asyncio.run(_evaluate(evaluation, api_key_env, engine, concurrency))
        except (KeyboardInterrupt, ShoalError):
            if have := len(evaluation.played):
                note(f"{have} of {evaluation.total} episodes are kept. Go on: shoal eval evm --resume {path}")
            else:
                evaluation.discard()
            raise
    if json:
        print_json({"model": measured.model, "actions": measured.actions, "mode": measured.mode, **found})
    else:
        _print(found, ("strict", "paper") if scoring == "both" else (scoring,))
    return 1 if found["missing"] else 0


def _where(model: str | None, endpoint: str, api_key_env: str) -> tuple[str, str]:
    """The server's URL, if there is one, and the model's name."""
    from shoal.envs.evm.speakers import served_model

    if endpoint and model is None:
        raise ConfigError("--endpoint needs --model.", "Give the name that the server has for it.")
    name = "embedded" if model is None else model
    if name.startswith("shoal1"):
        raise ConfigError(
            "a ticket cannot be talked to.", "Serve the swarm's model with shoal serve, and give its URL as --model."
        )
    if not endpoint and name.startswith(("http://", "https://")):
        return name, served_model(name, _key(api_key_env))
    return endpoint, name


def _key(variable: str) -> str:
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise ConfigError(f"the variable {variable} is not set.", "Put the server's key there.")
    return key


def _check(measured: Measured) -> None:
    """Raise `ConfigError` for settings that do not go together."""
    if bool(measured.fork_url) != bool(measured.fork_block):
        raise ConfigError("--fork-url and --fork-block go together.", "A fork without its block is never the same.")
    if measured.actions != "typed" and (measured.constrain != "no" or measured.prompt == "brief"):
        raise ConfigError("--constrain and --brief are about typed actions.", "Add --actions typed.")
    if measured.constrain != "no" and measured.mode == "naive":
        raise ConfigError("--constrain lets one action through at a time.", "Leave out --mode naive.")


def known(file: str, official: str = "") -> Mapping[str, Definition]:
    """The tasks of a file, of the benchmark's folder, or those that come with Shoal, by id."""
    from shoal.envs.evm.definition import load_tasks, shipped_tasks
    from shoal.envs.evm.official import load_official

    if official:
        folder = Path(os.path.expandvars(official)).expanduser()
        return {name: found.definition for name, found in load_official(folder).items()}
    if file and not Path(file).is_file():
        raise TaskError(f"there is no file {file}.", "Make one with shoal evm new.")
    return load_tasks(Path(file)) if file else shipped_tasks()


def chosen(
    tasks_known: Mapping[str, Definition],
    groups: Sequence[str] = (),
    tasks: Sequence[str] = (),
    limit: int | None = None,
) -> list[Definition]:
    """The tasks of these groups and of these ids; nothing given is no bound."""
    unknown = [name for name in tasks if name not in tasks_known]
    if unknown:
        raise TaskError(f"there is no task {unknown[0]!r}.", "See shoal evm tasks.")
    there = {definition.group for definition in tasks_known.values()}
    strange = [group for group in groups if group not in there]
    if strange:
        raise TaskError(f"there is no group {strange[0]!r}.", f"There are {', '.join(sorted(there))}.")
    wanted = set(tasks) if tasks else None
    found = [
        definition
        for definition in tasks_known.values()
        if (not groups or definition.group in groups) and (wanted is None or definition.id in wanted)
    ][:limit]
    if not found:
        raise TaskError("nothing is left to measure.", "Give fewer of --groups, --tasks and --limit.")
    return found


async def _evaluate(
    evaluation: Evaluation, api_key_env: str, engine: Mapping[str, Any], concurrency: int
) -> dict[str, Any]:
    from shoal.cli.evaluation import REPORT, play_all
    from shoal.envs.evm.scores import SCORINGS

    measured = evaluation.measured
    definitions = chosen(known(measured.file, measured.official), tasks=measured.tasks)
    spoilt: list[str] = []
    if evaluation.missing():
        async with (
            _speaker(measured, api_key_env, engine) as speaker,
            _manner(measured) as manner,
        ):
            with _progress(evaluation) as on_played:
                await play_all(
                    evaluation,
                    definitions,
                    speaker,
                    manner,
                    concurrency=concurrency,
                    on_played=on_played,
                    on_void=spoilt.append,
                )
    for why in spoilt[:10]:
        note(f"void: {why}")
    facts = {
        "actions": measured.actions,
        "mode": measured.mode,
        "rounds": str(measured.rounds),
        "temperature": f"{measured.temperature:g}",
        "seed": str(measured.seed),
    }
    if measured.endpoint:
        facts["server"] = measured.endpoint
    if measured.constrain != "no":
        facts["constrained"] = f"by a grammar ({measured.constrain})"
    found = evaluation.finish(facts)
    totals = {f"total_{scoring}": found["splits"]["total"][scoring] for scoring in SCORINGS if found["episodes"]}
    return {**found, **totals, "folder": str(evaluation.path), "report": str(evaluation.path / REPORT)}


@asynccontextmanager
async def _speaker(measured: Measured, api_key_env: str, engine: Mapping[str, Any]) -> AsyncIterator[Speaker]:
    from shoal.envs.evm.speakers import EndpointSpeaker, EngineSpeaker

    max_tokens, temperature = measured.max_tokens, measured.temperature
    if measured.endpoint:
        key = _key(api_key_env)
        async with EndpointSpeaker(
            measured.endpoint, measured.model, key, max_tokens=max_tokens, temperature=temperature
        ) as speaker:
            yield speaker
        return
    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.rollout.host import model_cache

    model = await asyncio.to_thread(resolve, _trained(measured.model), model_cache(), note)
    # What all conversations begin with is computed once.
    async with LocalEngine(
        model, context_tokens=measured.context_tokens, prefix_tokens=measured.context_tokens * 2, **engine
    ) as local:
        yield EngineSpeaker(local, max_tokens, temperature)


def _trained(name: str) -> str:
    """The model of a run, where a run's folder is named."""
    folder = Path(name).expanduser()
    return str(folder / "model") if (folder / "config.toml").is_file() and (folder / "model").is_dir() else name


@asynccontextmanager
async def _manner(measured: Measured) -> AsyncIterator[Manner]:
    from shoal.envs.evm.evaluation import Manner

    brief = measured.prompt == "brief"
    if measured.actions == "typed":
        yield Manner("typed", measured.mode, brief=brief, constrain=measured.constrain)
        return
    from shoal.envs.evm.scripts import ScriptRunner

    runner = ScriptRunner(measured.actions)
    try:
        await runner.__aenter__()
    except ShoalError as error:
        raise ConfigError(
            f"{measured.actions} scripts cannot be run here: {error.problem}",
            f"{error.remedy} Or measure with --actions typed.".strip(),
        ) from error
    try:
        yield Manner(measured.actions, measured.mode, runner=runner)
    finally:
        await runner.__aexit__(None, None, None)


@contextmanager
def _progress(evaluation: Evaluation) -> Iterator[Any]:
    """Tells how far it is: a bar on a terminal, a line now and then elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    terminal = error_console()
    begun = len(evaluation.played)
    if begun:
        note(f"{begun} of {evaluation.total} episodes are there already.")
    said = time.monotonic()

    def line() -> str:
        played = evaluation.played
        return f"{sum(one.strict for one in played) / max(1, len(played)):.1f} points on average"

    if not terminal.is_terminal:

        def say(_: Played) -> None:
            nonlocal said
            if time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                note(f"{len(evaluation.played)} of {evaluation.total} episodes, {line()}")

        yield say
        return
    columns = (
        TextColumn("quests"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=terminal, transient=True) as bar:
        shown = bar.add_task(line(), total=evaluation.total, completed=begun)

        def advance(_: Played) -> None:
            bar.update(shown, advance=1, description=line())

        yield advance


def _print(found: Mapping[str, Any], scorings: Sequence[str]) -> None:
    from rich.table import Table

    from shoal.envs.evm.report import score_words

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title in ("tasks", *scorings, "of"):
        table.add_column(title, justify="right")
    for name, block in [*found["groups"].items(), *found["splits"].items()]:
        scores = [score_words(block, scoring) for scoring in scorings]
        table.add_row(
            name, str(block["tasks"]), *scores, f"{block['maximum']:,}", style="bold" if name == "total" else ""
        )
    out = console()
    out.print(table)
    out.print(
        f"{found['episodes']} episodes in {found['rounds']} rounds; {found['understood']:.0%} of the acts understood; "
        f"{found['tokens']:,} tokens drawn. 95 % intervals over rounds in brackets.",
        markup=False,
    )
    if found["missing"]:
        out.print(
            f"{found['missing']} episodes are missing; go on: shoal eval evm --resume {found['folder']}", markup=False
        )
    out.print(f"Every step: {found['report']}", markup=False)
