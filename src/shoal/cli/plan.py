"""`shoal plan`: how many workers a run needs, which staleness and publication interval, and what it costs.

Everything is the planner's arithmetic (docs/capacity.md); `--simulate` plays each line as a run in simulated time and
says what came of it beside what was predicted. Nothing here is measured. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.planning.advice import Advice, Comparison
    from shoal.planning.fleet import Fleet
    from shoal.planning.scenario import Outcome

DEFAULT_BOUNDS = (0, 1, 2, 3, 4, 6, 8, 11)
SIMULATED_STEPS = 120


def run(
    fleet: Path | None = None,
    /,
    *,
    rollouts_per_step: int | None = None,
    train_s: float | None = None,
    rollouts_per_s: float | None = None,
    workers: int | None = None,
    price_usd_per_hour: float | None = None,
    snapshot_mb: float | None = None,
    bcast_s: float | None = None,
    staleness: list[int] | None = None,
    headroom: float = 0.05,
    max_usd_per_hour: float | None = None,
    simulate: Flag = False,
    seed: int = 0,
    plots: Path | None = None,
    json: Json = False,
) -> None:
    """Say how many workers a run needs, for which staleness bound, and what it costs.

    For example:

        shoal plan fleet.toml
        shoal plan fleet.toml --staleness 2 --staleness 6 --simulate --plots plots/
        shoal plan --rollouts-per-step 128 --train-s 60 --rollouts-per-s 0.3 --workers 16 --bcast-s 18

    Args:
        fleet: A fleet file (docs/capacity.md); what is given by options below replaces what it says.
        rollouts_per_step: Rollouts that one optimizer step consumes.
        train_s: Seconds of an optimizer step.
        rollouts_per_s: Rollouts a second of one worker; without a file, all workers are alike.
        workers: Workers that could be had.
        price_usd_per_hour: Of one worker.
        snapshot_mb: Megabytes that reach every worker with each publication.
        bcast_s: Seconds for a snapshot to reach the workers, where it is known.
        staleness: A bound to plan for; may be repeated.
        headroom: Share by which more is activated than the minimum.
        max_usd_per_hour: Never activate more than this pays for, the learner's machine included.
        simulate: Play each plan as a run in simulated time, too.
        seed: Everything random in the simulation follows from it.
        plots: Folder for pictures of the table.
    """
    from shoal.planning.advice import advise, colocated

    asked = {"rollouts_per_step": rollouts_per_step, "train_s": train_s, "snapshot_mb": snapshot_mb, "bcast_s": bcast_s}
    alike = {"rollouts_per_s": rollouts_per_s, "count": workers, "price_usd_per_hour": price_usd_per_hour}
    plan_of = _fleet(fleet, _given(asked), _given(alike))
    bounds = sorted(set(staleness or (*DEFAULT_BOUNDS, plan_of.run.max_staleness)))
    if bounds[0] < 0 or bounds[-1] > 64:
        raise ConfigError(f"--staleness {bounds[0] if bounds[0] < 0 else bounds[-1]} is no bound.", "Use 0 to 64.")
    if not 0 <= headroom <= 10:
        raise ConfigError(f"--headroom {headroom} is no share.", "Use 0 to 10; 0.05 is five percent.")
    budget = math.inf
    if max_usd_per_hour is not None:
        budget = max_usd_per_hour - plan_of.learner.price_usd_per_hour
        if budget <= 0:
            raise ConfigError(
                f"--max-usd-per-hour {max_usd_per_hour:g} does not even pay for the learner.",
                f"It costs {plan_of.learner.price_usd_per_hour:g} dollars an hour.",
            )
    lines = [advise(plan_of, bound, headroom=headroom, max_usd_per_hour=budget) for bound in bounds]
    other = colocated(plan_of)
    outcomes = [_simulated(plan_of, line, headroom, budget, seed) for line in lines] if simulate else []
    pictures = _draw(plots, lines, other, outcomes) if plots is not None else []
    if json:
        print_json(
            {
                "plans": [asdict(line) | {"num_workers": line.num_workers} for line in lines],
                "colocated": asdict(other) if other else None,
                "simulated": [_facts(outcome) for outcome in outcomes],
                "plots": [str(path) for path in pictures],
            }
        )
    else:
        _show(plan_of, lines, other, outcomes)
        for path in pictures:
            note(f"Drawn: {path}")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _fleet(path: Path | None, asked: dict[str, Any], alike: dict[str, Any]) -> Fleet:
    """The file with the options laid over it, or the fleet that the options alone describe."""
    from shoal.planning.fleet import fleet_from, load_fleet

    if path is None:
        if not {"rollouts_per_step", "train_s"} <= set(asked) or "rollouts_per_s" not in alike:
            raise ConfigError(
                "Without a fleet file a plan needs three numbers.",
                "Give --rollouts-per-step, --train-s and --rollouts-per-s, or a file.",
            )
        return fleet_from({"run": asked, "workers": [{"name": "worker", "count": 64, **alike}]}, "the options")
    if alike:
        raise ConfigError(
            "A fleet file says what its workers are.", "Leave --rollouts-per-s, --workers and --price-usd-per-hour out."
        )
    fleet = load_fleet(path)
    tables = fleet.model_dump(exclude_none=True)
    return fleet_from(tables | {"run": tables["run"] | asked}, f"{path} and the options") if asked else fleet


def _simulated(fleet: Fleet, line: Advice, headroom: float, budget: float, seed: int) -> Outcome:
    from dataclasses import replace

    from shoal.planning.simulator import simulate

    note(f"Simulating S = {line.max_staleness} …")
    scenario = fleet.scenario(max_staleness=line.max_staleness, steps=SIMULATED_STEPS, seed=seed, headroom=headroom)
    return simulate(replace(scenario, max_usd_per_hour=budget))


def _facts(outcome: Outcome) -> dict[str, Any]:
    return {
        "utilisation": outcome.utilisation,
        "step_s": outcome.step_s,
        "staleness_mean": outcome.mean_staleness,
        "staleness_violations": outcome.violations,
        "swept": outcome.counts["swept"],
        "workers": outcome.active_workers,
        "usd_per_step": outcome.usd_per_step,
        "idle_usd": outcome.idle_usd,
    }


def _show(fleet: Fleet, lines: Sequence[Advice], other: Comparison | None, outcomes: Sequence[Outcome]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"R = {fleet.run.rollouts_per_step} rollouts a step, {fleet.run.train_s:g} s a step"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    heads = ["S", "κ", "bcast s", "workers", "Σμ", "least", "busy", "step s", "$/h", "$/step"]
    heads += ["change"] if other else []
    heads += ["sim busy", "age"] if outcomes else []
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for i, line in enumerate(lines):
        cells = [
            str(line.max_staleness),
            str(line.interval),
            f"{line.bcast_s:.1f}",
            str(line.num_workers),
            f"{line.rate:.3g}",
            f"{line.needed_rate:.3g}",
            f"{line.utilisation:.0%}",
            f"{line.step_s:.1f}",
            f"{line.usd_per_hour:.2f}",
            f"{line.usd_per_step:.3f}",
        ]
        if other:
            cells.append(f"{line.usd_per_step / other.usd_per_step - 1:+.0%}")
        if outcomes:
            cells += [f"{outcomes[i].utilisation:.0%}", f"{outcomes[i].mean_staleness:.2f}"]
        table.add_row(*cells)
    terminal = console()
    terminal.print(table)
    for remark in _remarks(fleet, lines, other):
        terminal.print(remark, markup=False, soft_wrap=True)


def _remarks(fleet: Fleet, lines: Sequence[Advice], other: Comparison | None) -> list[str]:
    said = next((line for line in lines if line.max_staleness == fleet.run.max_staleness), lines[-1])
    classes = ", ".join(f"{count} × {name}" for name, count in said.workers.items())
    remarks = [f"For S = {said.max_staleness}: {classes or 'nobody'}."]
    if not said.covered:
        remarks.append(
            f"The fleet has {said.rate:.3g} rollouts/s and needs {said.needed_rate:.3g}: the learner will stand idle "
            f"{1 - said.utilisation:.0%} of the time."
        )
    elif said.utilisation < 0.995:
        end = next((line for line in lines if line.utilisation >= 0.995), None)
        faster = f"{said.full_rate:.3g} rollouts/s" if math.isfinite(said.full_rate) else "no number of workers"
        remarks.append(
            f"S = {said.max_staleness} is too small for full overlap: the learner will stand idle "
            f"{1 - said.utilisation:.0%} of the time. What would end that: {faster}"
            + (f", or S = {end.max_staleness}." if end else ", or a faster broadcast.")
        )
    if said.freshest_interval < said.interval:
        remarks.append(
            f"Publishing every {said.freshest_interval} steps instead of {said.interval} costs no time here and gives "
            "fresher rollouts."
        )
    if other:
        remarks.append(
            f"The co-located fleet: {other.step_s:.1f} s and ${other.usd_per_step:.3f} a step, learner busy "
            f"{other.utilisation:.0%}."
        )
    return remarks


def _draw(folder: Path, lines: Sequence[Advice], other: Comparison | None, outcomes: Sequence[Outcome]) -> list[Path]:
    """One picture of the table: how busy the learner is, and what a step costs, over the bound."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#edf2f7"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.6, 3.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        busy, cost = figure.subplots(1, 2)
        bounds = [line.max_staleness for line in lines]
        busy.plot(bounds, [100 * line.utilisation for line in lines], "o-", color="#2b6cb0", label="predicted")
        if outcomes:
            busy.plot(bounds, [100 * o.utilisation for o in outcomes], "x", color="#dd6b20", label="simulated")
        busy.set(title="Learner busy", xlabel="staleness bound S", ylabel="%", ylim=(0, 105))
        busy.legend(loc="lower right", frameon=False)
        cost.plot(bounds, [line.usd_per_step for line in lines], "o-", color="#2f855a", label="this fleet")
        if other:
            cost.axhline(other.usd_per_step, color="#2d3748", linestyle="--", linewidth=1.1, label="co-located")
        cost.set(title="Cost of a step", xlabel="staleness bound S", ylabel="dollars")
        cost.set_ylim(bottom=0)
        cost.legend(loc="lower right", frameon=False)
        path = folder / "plan.png"
        figure.savefig(path)
    return [path]
