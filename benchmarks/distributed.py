"""Do several ranks compute the gradients of one? FSDP2 under torchrun, on a tiny model, full and with adapters.

    shoal bench distributed --json
    shoal bench distributed -- --ranks 3 --only full lora

Each case makes one step from ragged episodes of several turns in this process, and the same step on the ranks (gloo, on
a CPU), with padding-free rows dealt to them. What is compared is the gradient that reached the optimizer, tensor by
tensor, relative to its norm. About a minute.

    gradient_error        the largest over the fp32 cases and their tensors
    gradient_error_bf16   of the cases that compute in bf16, over all tensors together: two orders of addition
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from shoal.errors import RunError
from shoal.learner import checkpoint
from shoal.learner.trainer import Trainer

from _common import benchmark, emit

TESTS = Path(__file__).parents[1] / "tests"
LAUNCH_S = 300.0

BETA = 0.9
"""The cases' first decay rate: after one step Adam's first moment is (1 − β) times the gradient."""

NOTHING = 1e-6
"""A tensor whose gradient is smaller is left out: nothing flows there."""


def main() -> None:
    sys.path += [str(TESTS), str(TESTS / "learner")]
    from rank_cases import CASES, episodes_of, make

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="cases to compare")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="shoal-ranks-") as scratch:
        print(f"{options.ranks} ranks …", file=sys.stderr, flush=True)
        together(Path(scratch), options.ranks)
        for name in options.only:
            print(f"{name} …", file=sys.stderr, flush=True)
            alone = make(Trainer, name)
            alone.step(episodes_of(0))
            own = gradients(alone.checkpoint())
            theirs = gradients(checkpoint.load(checkpoint.path_of(Path(scratch) / name, 1)))
            each = {key: apart(own[key], theirs[key]) for key in own if float(own[key].norm()) > NOTHING}
            worst = max(each, key=each.__getitem__)
            whole = apart(*(torch.cat([found[key].flatten() for key in own]) for found in (own, theirs)))
            rows.append(
                {
                    "case": name,
                    "dtype": str(CASES[name][1]).removeprefix("torch."),
                    "tensors": len(each),
                    "error": whole,
                    "worst_tensor": worst,
                    "worst_error": each[worst],
                }
            )
    exact = [row["worst_error"] for row in rows if row["dtype"] == "float32"]
    rounded = [row["error"] for row in rows if row["dtype"] != "float32"]
    headline = {"ranks": options.ranks}
    headline |= {"gradient_error": max(exact)} if exact else {}
    headline |= {"gradient_error_bf16": max(rounded)} if rounded else {}
    emit(rows, headline)


def together(folder: Path, ranks: int) -> None:
    """Have so many ranks make every case's steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(TESTS / "learner" / "rank_cases.py"), str(folder)]
    places = [str(TESTS), str(TESTS / "learner"), *filter(None, sys.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(places)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LAUNCH_S, env=environment)
    except subprocess.TimeoutExpired:
        raise RunError(f"{ranks} ranks were not through after {LAUNCH_S:.0f} s.") from None
    if done.returncode != 0:
        raise RunError(f"the ranks failed: {done.stderr[-2000:]}")


def gradients(saved: checkpoint.Checkpoint) -> dict[str, torch.Tensor]:
    """Of the one step that was taken."""
    prefix = "exp_avg."
    found = {k.removeprefix(prefix): v for k, v in saved.optimizer.items() if k.startswith(prefix)}
    return {name: moment.double() / (1 - BETA) for name, moment in found.items()}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The difference relative to the first's norm."""
    return float((one - other).norm() / one.norm())


if __name__ == "__main__":
    benchmark(main)
