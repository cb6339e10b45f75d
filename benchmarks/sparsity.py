"""How little a step changes: values and bytes of a published change, by learning rate and steps between versions.

The versions are those of real GRPO runs of the embedded model on its arithmetic (`shoal train`): short ones at several
learning rates, one that trains adapters, and one long enough to learn, whose held-out accuracy is measured before and
after. Every run notes what each of its versions weighed; what a version would weigh if only every κ-th were published
is computed from those that its store still has at the end.

    shoal bench sparsity --json                                 # 30 to 40 minutes on two cores
    shoal bench sparsity -- --folder runs/sparsity --minutes 20 # goes on where an earlier call stopped
    shoal bench sparsity -- --tiny                              # a toy of two layers, for trying the command

Runs that are finished in the folder are read and not repeated; a run that `--minutes` cuts off is continued by the next
call. The table is written to `table.md` in the folder after every run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from _nat import tiny_model
from codec import CONFIG, rows_of_run
from shoal.broadcast.delta import encode_change
from shoal.broadcast.image import read_version
from shoal.broadcast.store import Store
from shoal.errors import RunError, StorageError
from shoal.fabric.identity import Identity
from shoal.protocol.snapshot import DTYPE_BYTES

from _common import benchmark, emit

KAPPAS = (1, 2, 4)
STOP_S = 60.0
"""An interrupted run has so long to save its state."""


@dataclass(frozen=True)
class Plan:
    """One run."""

    name: str
    lr: float
    steps: int
    lora: bool = False
    learns: bool = False
    """Judged before and after."""

    def config(self, folder: Path, model: str) -> dict[str, Any]:
        """The demo's, changed."""
        config = tomllib.loads(CONFIG.read_text())
        config["run"] = {"name": self.name, "dir": str(folder), "steps": self.steps}
        config["learner"] |= {"lr": self.lr, "checkpoint_every": 5}
        if not self.learns:
            config["learner"] |= {"warmup_steps": 0, "lr_schedule": "constant"}
        config["eval"] |= {"before": self.learns, "after": self.learns}
        config["output"] = {"plots": False}
        if self.lora:
            config["learner"] |= {"lora": {"rank": 16, "alpha": 32.0}}
        if model != "embedded":
            config["model"]["name"] = model
            config["envs"] = {"digit": {"type": "_paced:FirstDigit"}}
            config["eval"] |= {"questions": 16, "max_tokens": 4}
        return config


def plans(steps: int, learning_steps: int) -> list[Plan]:
    """Slow to fast, then adapters, then the run that learns at the demo's rate."""
    rate = float(tomllib.loads(CONFIG.read_text())["learner"]["lr"])
    short = [Plan(f"lr-{lr:g}", lr, steps) for lr in (1e-6, 5e-6, 2e-5)]
    return [*short, Plan("adapters", 2e-4, steps, lora=True), Plan("learns", rate, learning_steps, learns=True)]


def play(plan: Plan, folder: Path, model: str, deadline: float) -> bool:
    """Run it, or go on with it; whether it is finished."""
    run = folder / plan.name
    if (run / "summary.json").exists():
        return True
    if time.monotonic() >= deadline:
        return False
    command = [sys.executable, "-m", "shoal.cli", "train"]
    if (run / "config.toml").exists():
        command += ["--resume", str(run)]
    else:
        config = folder / f"{plan.name}.toml"
        config.write_text(tomli_w.dumps(plan.config(folder, model)))
        command += [str(config)]
    print(f"{plan.name}: {' '.join(command[3:])}", file=sys.stderr, flush=True)
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, stdout=sys.stderr.fileno(), env={**os.environ, "PYTHONPATH": paths})
    try:
        code = process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    if code != 0:
        raise RunError(f"run {plan.name} ended with {code}.", f"Its logs are in {run / 'logs'}.")
    return True


def store_of(run: Path) -> Store:
    """The versions that a run still has."""
    learner = Identity.load_or_create(run / "identity" / "learner")
    return Store(run / "snapshots", run=run.name, trusted_key=learner.public_key, read_only=True)


def by_kappa(store: Store) -> dict[int, tuple[float, float]]:
    """For each κ the bytes of a change over κ steps and the share of values in it, over what the store has; medians."""
    found: dict[int, tuple[float, float]] = {}
    versions = store.versions("policy")
    for kappa in KAPPAS:
        weights = [change_of(store, v - kappa, v) for v in versions if v - kappa in versions]
        kept = [weight for weight in weights if weight is not None]
        if kept:
            found[kappa] = (statistics.median(n for n, _ in kept), statistics.median(share for _, share in kept))
    return found


def change_of(store: Store, old: int, new: int) -> tuple[int, float] | None:
    """Bytes of the change between two versions, and the share of values that differ."""
    try:
        before, after = read_version(store, "policy", old), read_version(store, "policy", new)
    except StorageError:  # cut off by the end of the run
        return None
    changes = [encode_change(before[n].data, v.data, DTYPE_BYTES[v.dtype]) for n, v in after.items()]
    num_values = sum(view.num_bytes // DTYPE_BYTES[view.dtype] for view in after.values())
    return sum(len(change.data) for change in changes), sum(change.num_changed for change in changes) / num_values


def weigh(plan: Plan, run: Path, whole_bytes: int, *, finished: bool) -> dict[str, Any] | None:
    """The row of one run; `None` where it has no step yet."""
    if not (run / "metrics.jsonl").exists():
        return None
    steps = rows_of_run(run)
    changes = [row for row in steps if row["bytes"]]
    if not changes:
        return None
    numbers, shares = [row["bytes"] for row in changes], [row["changed"] for row in changes]
    summary = json.loads((run / "summary.json").read_text()) if finished else {}
    store = store_of(run)
    newest = store.latest("policy")
    row: dict[str, Any] = {
        "run": plan.name,
        "lr": plan.lr,
        "steps": len(changes),
        "finished": finished,
        "changed_min": min(shares),
        "changed_median": statistics.median(shares),
        "changed_max": max(shares),
        "version_bytes": newest.manifest.num_bytes if newest is not None else 0,
        "bytes_median": statistics.median(numbers),
        "ratio": statistics.median(numbers) / whole_bytes,
    }
    for kappa, (num_bytes, share) in by_kappa(store).items():
        row |= {f"bytes_kappa_{kappa}": num_bytes, f"changed_kappa_{kappa}": share}
    if plan.learns and "accuracy_after" in summary:
        row["gain_points"] = 100 * (summary["accuracy_after"] - summary["accuracy_before"])
    return row


def whole_bytes_of(model: str) -> int:
    """Of all weights in bf16."""
    from shoal.engine.source import resolve
    from shoal.rollout.host import model_cache

    return sum(2 * tensor.numel() for tensor in resolve(model, model_cache()).tensors().values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = [
        "| run | learning rate | steps | values that changed (median) | bytes of a change | of the whole |"
        + "".join(f" κ = {kappa} |" for kappa in KAPPAS),
        "| --- " * (6 + len(KAPPAS)) + "|",
    ]
    for row in rows:
        kappas = (row.get(f"bytes_kappa_{kappa}") for kappa in KAPPAS)
        cells = [
            row["run"],
            f"{row['lr']:g}",
            str(row["steps"]),
            f"{row['changed_min']:.2%} to {row['changed_max']:.2%} ({row['changed_median']:.2%})",
            f"{row['bytes_median'] / 1e6:.2f} MB",
            f"1/{1 / row['ratio']:.0f}",
            *("" if one is None else f"{one / 1e6:.2f} MB" for one in kappas),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, read, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/sparsity"), help="where the runs are kept")
    parser.add_argument("--minutes", type=float, default=50.0, help="no run goes on after so long")
    parser.add_argument("--steps", type=int, default=12, help="of the short runs")
    parser.add_argument("--learning-steps", type=int, default=40, help="of the run that learns")
    parser.add_argument("--tiny", action="store_true", help="a toy model instead of the embedded one")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = "embedded"
    if options.tiny:
        model = str(folder / "model")
        if not (folder / "model").exists():
            tiny_model(folder / "model")
    deadline = time.monotonic() + 60.0 * options.minutes
    rows: list[dict[str, Any]] = []
    whole = whole_bytes_of(model)
    for plan in plans(options.steps, options.learning_steps):
        finished = play(plan, folder, model, deadline)
        row = weigh(plan, folder / plan.name, whole, finished=finished)
        if row is not None:
            rows.append(row)
            (folder / "table.md").write_text(table(rows))
            print(json.dumps(row), file=sys.stderr, flush=True)
    if not rows:
        raise RunError(f"no run in {folder} has a step yet.", "Give more --minutes.")
    by_name = {row["run"]: row for row in rows}
    headline = {f"ratio_{name}": row["ratio"] for name, row in by_name.items()}
    headline["delta_bytes_ratio"] = rows[0]["ratio"]
    if "adapters" in by_name:
        headline["adapters_ratio"] = by_name["adapters"]["version_bytes"] / whole
    if "gain_points" in by_name.get("learns", {}):
        headline["gain_points"] = by_name["learns"]["gain_points"]
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
