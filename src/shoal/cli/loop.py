"""`shoal loop`: everything at once on one machine, measured before and after, with one report at the end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from shoal.cli.loop_parts import Part
from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json, Overrides
from shoal.errors import ConfigError, ShoalError

if TYPE_CHECKING:
    from shoal.cli.loop_parts import Parts
    from shoal.cli.loop_state import LoopFolder
    from shoal.config import Config

DEFAULT = "loop"


def run(
    config: str = "",
    /,
    *overrides: Overrides,
    minutes: float | None = None,
    without: Annotated[tuple[Part, ...], Parameter(negative="")] = (),
    resume: str = "",
    dry_run: Flag = False,
    json: Json = False,
) -> None:
    """Serve a policy, have agents act with it, remember what helps, train it on what they did: all of it at once.

    Held-out questions and problems are asked before and after. Every version is served while training goes on; other
    machines join with the tickets that are printed.

    For example:

        shoal loop configs/loop.toml
        shoal loop configs/loop.toml --minutes 10 --run.seed 1 --json
        shoal loop configs/loop.toml --without memory
        shoal loop configs/loop.toml --dry-run
        shoal loop --resume runs/loop-20260101-120000

    Args:
        config: A TOML file, or the name of a shipped configuration; by default the shipped loop.
        minutes: What the whole may take, instead of the configuration's loop.minutes.
        without: Leave a part out: memory or collective. May be given twice.
        resume: The folder or name of an interrupted loop, to continue it.
        dry_run: Say what would run here, what would not and why, and start nothing.
    """
    from shoal.cli.loop_parts import parts_of
    from shoal.config import load_config
    from shoal.coordinator.processes import die_with_parent

    die_with_parent()
    if resume:
        if config or overrides or minutes is not None or without:
            raise ConfigError("a resumed loop keeps its configuration.", "Leave everything but --resume away.")
        _go(*_resumed(resume), json=json)
        return
    extra = list(overrides) if minutes is None else [*overrides, "--loop.minutes", str(minutes)]
    parts = parts_of(load_config(config or DEFAULT, extra), without)
    if dry_run:
        _dry_run(parts, json=json)
        return
    _go(*_begun(parts, config or DEFAULT), json=json)


def _begun(parts: Parts, name: str) -> tuple[Config, LoopFolder]:
    """A new run's folder with a loop's in it."""
    from shoal.cli.loop_state import FOLDER, LoopFolder, LoopState
    from shoal.cli.training import new_run
    from shoal.config import to_toml

    config = parts.config
    run = new_run(config, name)
    memory = {"recall": parts.memory, "folder": config.memory.folder or str(run.path / FOLDER / "memory")}
    config = config.model_copy(
        update={
            # The loop measures by itself, with the same questions and more.
            "eval": config.eval.model_copy(update={"before": False, "after": False, "every": 0}),
            "memory": config.memory.model_copy(update=memory),
        }
    )
    run.write_atomic("config.toml", to_toml(config).encode())
    run.close()
    state = LoopState(
        minutes=config.loop.minutes, memory=parts.memory, collective=parts.collective, left_out=parts.left_out
    )
    return config, LoopFolder(run.path, state)


def _resumed(where: str) -> tuple[Config, LoopFolder]:
    from shoal.cli.loop_state import LoopFolder
    from shoal.cli.training import resumed_run

    run, config = resumed_run(where)
    return config, LoopFolder(run.path)


def _go(config: Config, folder: LoopFolder, *, json: bool) -> None:
    from shoal.cli.live import LiveView
    from shoal.cli.loop_report import write
    from shoal.cli.loop_run import LoopRun
    from shoal.coordinator.reporting.page import write_report

    try:
        with LiveView(quiet=json) as view:
            loop = LoopRun(config, folder, say=note, view=view.update, on_ready=view.ready)
            try:
                asyncio.run(loop.go())
            except (KeyboardInterrupt, ShoalError) as error:
                how = "Interrupted" if isinstance(error, KeyboardInterrupt) else "The loop stopped"
                note(f"{how}. Continue with: shoal loop --resume {folder.run}")
                raise
        found = write(loop.config, folder)
        if config.output.plots:
            write_report(folder.run)
    finally:
        folder.close()
    if json:
        print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from pathlib import Path

    out = console()
    out.print((Path(found["run"]) / "report.md").read_text(), markup=False, soft_wrap=True)
    out.print(f"report  {found['run']}/report.md, report.json, report.html", soft_wrap=True, markup=False)


def _dry_run(parts: Parts, *, json: bool) -> None:
    from shoal.cli.memory_report import lines_of, memory_of

    # Server, experts and trials are engines as a worker is one.
    engines = sum(name not in ("coordinator", "learner") for name in parts.processes)
    workers = parts.config.workers.model_copy(update={"count": engines})
    loop, memory = parts.config.loop, memory_of(parts.config.model_copy(update={"workers": workers}))
    plan = {
        "minutes": loop.minutes,
        "environments": {name: env.type for name, env in parts.config.envs.items()},
        "memory": parts.memory,
        "collective": parts.collective,
        "left_out": parts.left_out,
        "processes": parts.processes,
        "memory_gib": memory,
    }
    if json:
        print_json(plan)
        return

    def say(text: str) -> None:
        console().print(text, markup=False, soft_wrap=True)

    say(f"{loop.minutes:g} minutes: {loop.questions} held-out questions of each of {', '.join(parts.config.envs)}")
    if parts.collective:
        say(f"and {loop.problems} held-out problems for the collective; then training; then the same again")
    say(f"{len(parts.processes)} processes while training: {', '.join(parts.processes)}")
    for part, why in parts.left_out.items():
        say(f"left out: {part}: {why}")
    for line in lines_of(memory) if memory is not None else ():
        say(line.replace("workers", "engines"))
