"""`shoal evm`: quests on an EVM chain: list them, look at one, test them, measure a model (docs/evm.md)."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

from cyclopts import App

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import ConfigError, TaskError

app = App(name="evm", help="Quests on an EVM chain: list, try and test them, and measure a model on them.")

EPISODES_AT_ONCE = 64

NEW_TASK = """\
[[task]]
id = "{id}"
group = "erc20"
templates = [
  "Send {{amount}} USDT to {{to}}.",
  "Transfer {{amount}} USDT to {{to}}.",
  "{{to}} should get {{amount}} USDT.",
  "Pay {{to}} {{amount}} USDT (token {{USDT}}).",
]
parameters.to = {{ kind = "address" }}
parameters.amount = {{ kind = "amount", low = "1", high = "100", decimals = 2 }}
solution = ["USDT.transfer(to, amount)"]
checks.success = [30, "ok()"]
checks.function = [30, "sent(USDT.transfer(to, amount))"]
checks.balance = [40, "gain(USDT.balanceOf(to)) == amount"]
"""


@app.command
def tasks(*, file: Path | None = None, json: Json = False) -> None:
    """List the quests, by group.

    For example:

        shoal evm tasks

    Args:
        file: A TOML file of tasks in place of those that come with Shoal.
    """
    found = _definitions(file, ())
    if json:
        print_json({"tasks": [{"id": t.id, "group": t.group, "optimal_steps": t.optimal_steps} for t in found]})
        return
    for task in found:
        console().print(f"{task.group:12} {task.id}  ({task.optimal_steps} steps)", markup=False)


@app.command
def show(task: str, /, *, seed: int = 0, file: Path | None = None, json: Json = False) -> None:
    """Show one instance of a quest: its words, the reference solution as actions, and the checks.

    For example:

        shoal evm show erc20_transfer_fixed --seed 3

    Args:
        task: Its id.
        seed: Which instance.
        file: A TOML file of tasks in place of those that come with Shoal.
    """
    from shoal.envs.evm.actions import write_action
    from shoal.envs.evm.pyrevm_chain import PyrevmChain
    from shoal.envs.evm.sampling import sample
    from shoal.envs.evm.selftest import reference

    (definition,) = _definitions(file, (task,))
    instance = sample(definition, seed)
    actions, verdict = reference(instance, PyrevmChain())
    if json:
        print_json(
            {
                "id": task,
                "seed": seed,
                "instruction": instance.instruction,
                "reference": [write_action(action) for action in actions],
                "checks": {name: [points, that] for name, (points, that) in definition.checks.items()},
                "points": verdict.points,
            }
        )
        return
    out = console()
    out.print(instance.instruction, markup=False)
    for action in actions:
        out.print(f"  {write_action(action)}", markup=False)
    for name, (points, that) in definition.checks.items():
        out.print(f"{points:4} {name}: {that}", markup=False)


@app.command
def new(id_: str, /, *, file: Path, json: Json = False) -> None:
    """Write a file with a first task to change, and test it with `shoal evm selftest --file`.

    For example:

        shoal evm new my_transfer --file quests.toml

    Args:
        id_: Id of the task: lower-case letters, digits and underscores.
        file: Where to write; an existing file is kept.
    """
    from shoal.envs.evm.definition import read_tasks

    content = NEW_TASK.format(id=id_)
    read_tasks(content, str(file))
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(content)
    except FileExistsError:
        raise ConfigError(f"{file} exists already.", "Name another file, or add the task to it by hand.") from None
    if json:
        print_json({"file": str(file), "id": id_})
    else:
        console().print(f"{file} holds the task {id_}. Next: shoal evm selftest --file {file}", markup=False)


@app.command
def selftest(
    *tasks: str,
    seeds: int = 20,
    mutant_seeds: int = 1,
    backend: Literal["pyrevm", "anvil", "both"] = "pyrevm",
    file: Path | None = None,
    json: Json = False,
) -> int:
    """Check that every reference solution earns all points and that nothing wrong does.

    For example:

        shoal evm selftest --json
        shoal evm selftest --backend both --seeds 1
        shoal evm selftest --file quests.toml

    Args:
        tasks: Ids; all of them if none is given.
        seeds: Instances a task, each solved by its reference.
        mutant_seeds: Of these, how many are also done wrongly in every way known.
        backend: What executes; both compares the two on every run.
        file: A TOML file of tasks in place of those that come with Shoal.
    """
    from shoal.envs.evm.chain import ChainBackend
    from shoal.envs.evm.pyrevm_chain import PyrevmChain
    from shoal.envs.evm.selftest import selftest as run_selftest

    definitions = _definitions(file, tasks)
    chains: list[ChainBackend] = []
    try:
        if backend != "anvil":
            chains.append(PyrevmChain())
        if backend != "pyrevm":
            from shoal.envs.evm.anvil import AnvilChain

            chains.append(AnvilChain())
        found = run_selftest(definitions, chains, seeds=seeds, mutant_seeds=mutant_seeds)
    finally:
        for chain in chains:
            chain.close()
    summary = {"backend": backend, "seeds": seeds, **found.summary()}
    if json:
        print_json(summary)
    else:
        out = console()
        for problem in summary.pop("problems"):
            out.print(problem, markup=False)
        for name, value in summary.items():
            out.print(f"{name:22} {value}", markup=False)
    return 0 if found.good else 1


@app.command(name="eval")
def eval_(
    model: str = "embedded",
    /,
    *tasks: str,
    rounds: int = 1,
    max_tokens: int = 256,
    context_tokens: int = 4096,
    temperature: float = 0.0,
    seed: int = 0,
    official: Path | None = None,
    brief: Flag = False,
    threads: int = 1,
    device: str = "auto",
    json: Json = False,
) -> None:
    """Measure a model on the quests with typed actions, by group, with both scorings.

    For example:

        shoal evm eval embedded --rounds 3 --json
        shoal evm eval runs/NAME/model bnb_transfer_basic --brief

    Args:
        model: embedded, a directory, a .gguf file or a hub name.
        tasks: Ids; all 107 if none is given.
        rounds: Instances a task; the interval is over them all.
        max_tokens: Longest action.
        context_tokens: Longest episode.
        temperature: 0 is greedy.
        seed: Of the sampling, where temperature is above 0.
        official: The benchmark's folder of JSON files, for its own wording.
        brief: A short prompt, for small models on payments.
        threads: CPU threads.
        device: auto, cpu, cuda or cuda:N.
    """
    settings: dict[str, Any] = {"tasks": tasks, "prompt": "brief" if brief else "full"}
    if official is not None:
        settings["official"] = str(official)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    engine = {"device": device, "threads": threads, "context_tokens": context_tokens}
    result = asyncio.run(_evaluate(model, settings, rounds, sampling, engine))
    if json:
        print_json(result)
        return
    out = console()
    for name, row in result["groups"].items():
        out.print(f"{name:12} {row['strict']:6.1f} strict {row['paper']:6.1f} paper  ({row['episodes']})", markup=False)
    low, high = result["interval"]
    out.print(
        f"total {result['total_strict']:.0f} strict, {result['total_paper']:.0f} paper, of {result['maximum']}; "
        f"mean {result['mean_strict']:.1f} (95 % interval {low:.1f} to {high:.1f}); {result['void']} void",
        markup=False,
    )


def _definitions(file: Path | None, wanted: tuple[str, ...]) -> list[Any]:
    from shoal.envs.evm.definition import load_tasks, shipped_tasks

    if file is not None and not file.is_file():
        raise TaskError(f"there is no file {file}.", "Make one with shoal evm new.")
    known = load_tasks(file) if file is not None else shipped_tasks()
    missing = [name for name in wanted if name not in known]
    if missing:
        raise TaskError(f"there is no task {missing[0]!r}.", "See shoal evm tasks.")
    return [known[name] for name in wanted] if wanted else list(known.values())


async def _evaluate(
    name: str, settings: dict[str, Any], rounds: int, sampling: dict[str, Any], engine_options: dict[str, Any]
) -> dict[str, Any]:
    from shoal.engine.local import LocalEngine
    from shoal.engine.source import resolve
    from shoal.envs.base import stable_int
    from shoal.envs.evm.definition import FULL_POINTS, shipped_tasks
    from shoal.envs.registry import make
    from shoal.protocol.sampling import SamplingParams
    from shoal.rollout.episode import EpisodeSpec, run_episode
    from shoal.rollout.host import model_cache

    env = make("evm", settings)
    count = (len(settings["tasks"]) or len(shipped_tasks())) * rounds
    asked = [env.task("heldout", index, 0) for index in range(count)]
    model = await asyncio.to_thread(resolve, name, model_cache(), note)
    gate = asyncio.Semaphore(EPISODES_AT_ONCE)
    async with LocalEngine(model, **engine_options) as engine:

        async def play(index: int) -> Any:
            params = SamplingParams(**{**sampling, "seed": stable_int("eval", sampling["seed"], index)})
            spec = EpisodeSpec(id=f"evm/{index}", group="evm", index=index, task=asked[index], params=params)
            context = engine_options["context_tokens"]
            async with gate:
                return await run_episode(spec, engine, engine.tokenizer, env.fresh(), context_tokens=context)

        episodes = await asyncio.gather(*(play(index) for index in range(count)))
    done = [episode for episode in episodes if episode.outcome == "done"]
    return {"model": name, "rounds": rounds, "void": count - len(done), **summarise(done, rounds, FULL_POINTS)}


def summarise(episodes: list[Any], rounds: int, full: int) -> dict[str, Any]:
    """Totals, groups and an interval from the parts of finished episodes; one that did not end earned nothing."""
    from shoal.envs.evm.definition import shipped_tasks

    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for episode in episodes:
        parts = episode.reward_parts
        mark = (full * parts.get("strict", 0.0), full * parts.get("paper", 0.0))
        definition = shipped_tasks()[episode.task.id.partition("/")[0]]
        groups[definition.group].append(mark)
        groups["composite" if definition.composite else "atomic"].append(mark)
    marks = groups["atomic"] + groups["composite"]
    mean = sum(s for s, _ in marks) / max(1, len(marks))
    spread = (sum((s - mean) ** 2 for s, _ in marks) / max(1, len(marks) - 1)) ** 0.5
    half = 1.96 * spread / max(1, len(marks)) ** 0.5
    return {
        "episodes": len(marks),
        "total_strict": sum(s for s, _ in marks) / rounds,
        "total_paper": sum(p for _, p in marks) / rounds,
        "maximum": full * len(marks) // rounds,
        "mean_strict": mean,
        "interval": [max(0.0, mean - half), min(float(full), mean + half)],
        "groups": {
            name: {
                "episodes": len(rows),
                "strict": sum(s for s, _ in rows) / len(rows),
                "paper": sum(p for _, p in rows) / len(rows),
            }
            for name, rows in groups.items()
            if rows
        },
    }
