"""`shoal demo`: the main job in minutes: post-train the embedded model on this machine and show what it learnt."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json, Overrides

DEMO_CONFIG = "arithmetic"


def run(*overrides: Overrides, seed: int = 0, control: Flag = False, json: Json = False) -> None:
    """Post-train the embedded model on arithmetic with two worker processes, and show what it learnt.

    Everything is real: a learner and two workers in processes of their own, rollouts over the network stack, signed
    snapshots of the weights. It takes about ten minutes on two cores and leaves a report and the trained model.

    For example:

        shoal demo
        shoal demo --seed 1 --json
        shoal demo --control

    Args:
        seed: Everything random follows from it.
        control: Shuffle the rewards within each batch: nothing should be learnt.
    """
    from shoal.cli.live import LiveView
    from shoal.cli.training import new_run, train
    from shoal.config import load_config
    from shoal.coordinator.reporting.page import write_report

    name = f"demo-{'control-' if control else ''}seed{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    mine = ["--run.name", name, "--run.seed", str(seed), "--rollout.shuffle_rewards", str(control).lower()]
    config = load_config(DEMO_CONFIG, [*mine, *overrides])
    folder = new_run(config, DEMO_CONFIG)
    with LiveView(quiet=json) as view:
        try:
            summary = asyncio.run(train(config, folder, say=note, view=view.update, on_ready=view.ready))
        except KeyboardInterrupt:
            note(f"Interrupted. Continue with: shoal train --resume {folder.path}")
            raise
    report = write_report(folder.path)
    if json:
        print_json({**summary, "control": control, "seed": seed, "run": str(folder.path), "report": str(report)})
    else:
        show(summary, str(folder.path), str(report))


def show(summary: dict[str, Any], path: str, report: str) -> None:
    """The before/after table, sample answers, and where everything is."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table(title=f"Held-out accuracy on {summary['heldout_questions']} questions it never trained on")
    for column in ("an answer counts when", "before", "after", "gain (95 % interval)"):
        table.add_column(column, justify="left" if column.startswith("an") else "right")
    for label, suffix in (("the reply ends with the right number", ""), ("its last number is right", "_lenient")):
        before, after = summary[f"accuracy_before{suffix}"], summary[f"accuracy_after{suffix}"]
        low, high = summary[f"gain_interval{suffix}"]
        gain = f"{100 * (after - before):+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
        table.add_row(label, f"{before:.1%}", f"{after:.1%}", gain)
    out.print(table)
    for sample in summary["samples"]:
        out.print(Text(f"\n{sample['question']}", style="bold"))
        for when in ("before", "after"):
            mark = "right" if sample[f"correct_{when}"] >= 1 else "wrong"
            answer = " ".join(sample[when].split())
            out.print(Text(f"  {when:6} {mark}  {answer[:160]}{'…' if len(answer) > 160 else ''}"))
    shares = ", ".join(f"{name}: {count}" for name, count in summary["worker_rollouts"].items())
    out.print(
        Text(
            f"\n{summary['steps']} steps in {summary['seconds']:.0f} s; rollouts used by worker: {shares}; "
            f"staleness at most {summary['max_staleness']} (bound {summary['S']})."
        )
    )
    out.print(Text(f"report  {report}\nmodel   {path}/model (any Hugging Face tool loads it)"), soft_wrap=True)
    out.print(Text(f"try it  shoal chat {path}/model"), soft_wrap=True)
