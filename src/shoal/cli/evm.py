"""`shoal evm`: quests on an EVM chain: list them, look at one, test them (docs/evm.md). `shoal eval evm` measures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App

from shoal.cli.eval_evm import chosen, known
from shoal.cli.output import console, print_json
from shoal.cli.parameters import Json
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.envs.evm.definition import Definition

app = App(name="evm", help="Quests on an EVM chain: list, try and test them; shoal eval evm measures a model on them.")

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


def _definitions(file: Path | None, wanted: tuple[str, ...]) -> list[Definition]:
    return chosen(known(str(file or "")), tasks=wanted)
