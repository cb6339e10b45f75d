"""`shoal train`: post-train a model as a configuration says, with workers here and anywhere."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json, Overrides
from shoal.errors import ConfigError, ShoalError

if TYPE_CHECKING:
    from shoal.config import Config


def run(
    config: str = "",
    /,
    *overrides: Overrides,
    workers: int | None = None,
    resume: str = "",
    dry_run: Flag = False,
    console: Flag = False,
    console_host: str = "127.0.0.1",
    console_port: int = 8900,
    json: Json = False,
) -> None:
    """Post-train a model as a configuration says.

    Prints a ticket with which workers on other machines join: `shoal worker TICKET`.

    For example:

        shoal train configs/arithmetic.toml
        shoal train configs/arithmetic.toml --workers 0 --network.host 0.0.0.0
        shoal train arithmetic --learner.lr 2e-6 --run.steps 100 --dry-run
        shoal train --resume runs/arithmetic-20260101-120000

    Args:
        config: A TOML file, or the name of a shipped configuration.
        workers: Workers to start on this machine, instead of the configuration's workers.count.
        resume: The folder or name of an interrupted run, to continue it.
        dry_run: Print the resolved configuration and the memory it would take, and start nothing; an error where it
            can't fit this machine.
        console: Show the run in a browser as well (see shoal console).
        console_host: Address on which the console listens; beyond loopback a key is needed.
        console_port: Its port; 0 takes a free one.
    """
    from shoal.cli.console import beside_run
    from shoal.cli.live import LiveView
    from shoal.cli.training import new_run, nothing_beside, resumed_run, train
    from shoal.config import load_config
    from shoal.coordinator.tasks import make_environments

    if bool(config) == bool(resume):
        raise ConfigError("shoal train takes either a configuration or --resume RUN.", "See shoal train --help.")
    beside = beside_run(console_host, console_port) if console and not dry_run else nothing_beside
    extra = list(overrides) if workers is None else [*overrides, "--workers.count", str(workers)]
    if resume:
        if extra:
            raise ConfigError("a resumed run keeps its configuration.", "Leave the overrides away.")
        folder, resolved = resumed_run(resume)
    else:
        resolved = load_config(config, extra)
        make_environments(resolved)  # settings are checked before anything starts
        if dry_run:
            _dry_run(resolved, json=json)
            return
        folder = new_run(resolved, config)
    with LiveView(quiet=json) as view:
        try:
            training = train(
                resolved,
                folder,
                say=note,
                view=view.update,
                on_ready=view.ready,
                beside=beside,
            )
            summary = asyncio.run(training)
        except (KeyboardInterrupt, ShoalError) as error:
            if folder.path.exists():
                how = "Interrupted" if isinstance(error, KeyboardInterrupt) else "The run stopped"
                note(f"{how}. Continue with: shoal train --resume {folder.path}")
            raise
    finish(summary, folder.path, json=json, plots=resolved.output.plots)


def _dry_run(config: Config, *, json: bool) -> None:
    from shoal.cli.config import show
    from shoal.cli.memory_report import lines_of, memory_of, refuse

    memory = memory_of(config)
    show(config, json=json, memory_gib=memory)
    if memory is None:
        note(f"the memory it would take is not known: the sizes of {config.model.name} are not on this machine")
        return
    if not json:
        for line in lines_of(memory):
            note(line)
    refuse(memory)


def finish(summary: dict[str, Any], path: Any, *, json: bool, plots: bool) -> None:
    """Write the report and say how the run went."""
    from shoal.coordinator.reporting.page import write_report

    report = write_report(path) if plots else None
    if json:
        print_json({**summary, "run": str(path), "report": str(report) if report else None})
        return
    out = console()
    out.print(f"{summary['steps']} steps in {summary['seconds']:.0f} s; the model is in {path}/model", markup=False)
    if "accuracy_before" in summary and "accuracy_after" in summary:
        out.print(
            f"held-out accuracy {summary['accuracy_before']:.1%} -> {summary['accuracy_after']:.1%} "
            f"on {summary['heldout_questions']} questions",
            markup=False,
        )
    if report:
        out.print(f"report: {report}", markup=False)
