"""Is the capacity model right? Real runs at a given pace, both regimes, at 1.0 and 0.8 of what the rule asks for.

Each run is `shoal train` with two workers, all processes real: a tiny model, real tokens, steps, snapshots and leases;
rollouts, steps and broadcasts are stretched to a set time (`_paced`), so that they and not the machine's load decide.
The rule says how fast workers must be; each run gets workers of exactly that speed, or 0.8 of it. `predicted` is
`capacity.utilisation` of that speed, with the step time that the run itself had (publishing is not stretched).
`fresh` and `early` compare runs with and without pacing where workers are 1.5 times as fast as needed. 13 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from _nat import tiny_model
from shoal.errors import RunError
from shoal.planning.capacity import Load, overlaps, provision_rate, publish_interval, utilisation

from _common import benchmark, emit

WORKERS, SLOTS, GROUP_SIZE = 2, 4, 4
"""Each worker acts on `SLOTS` groups at once."""

GROUPS_PER_STEP = 8
MAX_STALENESS = 6
TRAIN_S, PUBLISH_S = 2.5, 0.03
"""A step is stretched to the first; the second is what publishing it and asking for the next are taken to add."""

BCAST_SHARE = 0.4
"""T_bcast, as a share of T_train."""

WARM_STEPS = MAX_STALENESS + 4
COOL_STEPS = MAX_STALENESS + 2
RUN_S = 420.0
"""A run that takes longer has failed."""

JOIN_S = 120.0


@dataclass(frozen=True)
class Pace:
    """How fast everything is."""

    rollout_s: float
    bcast_s: float = 0.0
    stalls: bool = False
    interval: int = 1
    steps: int = 45
    paced: bool = True
    forgiven_s: float = 1.5
    """What leasing takes between two groups of a slot that is never idle; an idle one would gain by it."""


@dataclass(frozen=True)
class Measured:
    """What a run came to, beginning and end left out."""

    step_s: float
    train_s: float
    """T_train: all that the learner does in a step."""
    staleness: float
    violations: int
    swept: int
    facts: dict[str, float]

    @property
    def utilisation(self) -> float:
        return self.train_s / self.step_s


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=45, help="of each run with a prediction")
    steps = parser.parse_args().steps
    if steps <= WARM_STEPS + COOL_STEPS + 1:
        raise RunError(f"{steps} steps are less than beginning and end.", f"Give {WARM_STEPS + COOL_STEPS + 10}.")
    with tempfile.TemporaryDirectory(prefix="shoal-capacity-") as scratch:
        bench = Bench(Path(scratch), steps)
        rows = bench.both_regimes()
        fresh = bench.pacing()
    worst = max(abs(row["utilisation"] - row["predicted_utilisation"]) for row in rows)
    at_minimum = min(row["utilisation"] for row in rows if row["provision"] == 1.0)
    violations = sum(row["staleness_violations"] for row in (*rows, *fresh))
    emit(
        [*rows, *fresh],
        {
            "max_abs_error_utilisation": worst,
            "utilisation_at_minimum": at_minimum,
            "staleness_violations": violations,
            "staleness_mean_paced": fresh[1]["staleness_mean"],
            "staleness_mean_unpaced": fresh[0]["staleness_mean"],
            "step_s_paced_over_unpaced": fresh[1]["step_s"] / fresh[0]["step_s"],
        },
    )


class Bench:
    """All runs, one after the other."""

    def __init__(self, scratch: Path, steps: int) -> None:
        self.scratch = scratch
        self.model = tiny_model(scratch / "model")
        self.steps = steps

    def both_regimes(self) -> list[dict[str, Any]]:
        return [self.at(provision, stalls=stalls) for stalls in (False, True) for provision in (1.0, 0.8)]

    def at(self, provision: float, *, stalls: bool) -> dict[str, Any]:
        """One run at so much of its minimum."""
        train_s = TRAIN_S + PUBLISH_S
        bcast_s = BCAST_SHARE * train_s
        rollout_s = train_s  # a first guess, then what the rate that it leads to takes
        for _ in range(20):
            load = Load(GROUPS_PER_STEP, train_s, bcast_s, MAX_STALENESS, float(stalls), rollout_s)
            interval = publish_interval(load)
            rate = provision * provision_rate(load, interval)
            rollout_s = WORKERS * SLOTS / rate
        found = self.run(
            f"{'pausing' if stalls else 'overlapped'}-{provision:g}",
            Pace(rollout_s, bcast_s=bcast_s, stalls=stalls, interval=interval, steps=self.steps),
        )
        load = Load(GROUPS_PER_STEP, found.train_s, bcast_s, MAX_STALENESS, float(stalls), rollout_s)
        predicted = utilisation(load, interval, rate)
        return {
            "run": "pausing" if stalls else "overlapped",
            "provision": provision,
            "provision_of_the_run": rate / provision_rate(load, interval),
            "predicted_utilisation": predicted,
            **_row(found),
            "interval": interval,
            "overlaps": overlaps(load, interval),
            "bcast_s": bcast_s,
            "rollout_s": rollout_s,
            "rate": rate * GROUP_SIZE,
        }

    def pacing(self) -> list[dict[str, Any]]:
        """Workers with time to spare, let loose and paced."""
        rollout_s = WORKERS * SLOTS * (TRAIN_S + PUBLISH_S) / GROUPS_PER_STEP / 1.5
        rows = []
        for paced in (False, True):
            name = "fresh" if paced else "early"
            steps = WARM_STEPS + COOL_STEPS + 15
            found = self.run(name, Pace(rollout_s, paced=paced, steps=steps, forgiven_s=0.0))
            rows.append({"run": name, "provision": 1.5, **_row(found)})
        return rows

    def run(self, name: str, pace: Pace) -> Measured:
        """Play one run to its end."""
        folder = self.scratch / "runs" / name
        config = self.scratch / f"{name}.toml"
        config.write_text(tomli_w.dumps(self._config(name, pace)))
        log = self.scratch / f"{name}.log"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            "SHOAL_HOME": str(self.scratch / "home"),
            "OMP_NUM_THREADS": "1",
            "PACED_ROLLOUT_S": repr(pace.rollout_s),
            "PACED_TRAIN_S": repr(TRAIN_S),
            "PACED_FORGIVEN_S": repr(pace.forgiven_s),
            "PACED_BCAST_S": repr(pace.bcast_s),
            "PACED_STALL": str(int(pace.stalls)),
            "PACED_SLOTS": str(SLOTS),
            "PACED_GROUP_SIZE": str(GROUP_SIZE),
        }
        print(f"{name}: {pace}", file=sys.stderr)
        with _process([sys.executable, "-m", "shoal.cli", "train", str(config), "--json"], environment, log) as train:
            ticket = _ticket(folder, train, log)
            with _workers(ticket, folder, environment, log):
                try:
                    code = train.wait(RUN_S)
                except subprocess.TimeoutExpired:
                    raise RunError(f"run {name} was not over after {RUN_S:g} s: {_tail(log)}") from None
        if code != 0:
            raise RunError(f"run {name} failed: {_tail(log)}")
        return _measured(folder)

    def _config(self, name: str, pace: Pace) -> dict[str, Any]:
        return {
            "run": {"name": name, "dir": str(self.scratch / "runs"), "steps": pace.steps},
            "model": {"name": str(self.model), "dtype": "fp32", "context_tokens": 64},
            "envs": {"digit": {"type": "_paced:FirstDigit"}},
            "rollout": {
                "group_size": GROUP_SIZE,
                "groups_per_step": GROUPS_PER_STEP,
                "max_tokens": 8,
                "lease_timeout_s": 60.0,
                "lookahead_groups": (MAX_STALENESS + 2) * GROUPS_PER_STEP,
            },
            "learner": {
                "mode": "async",
                "max_staleness": MAX_STALENESS,
                "publish_every": pace.interval,
                "lr": 1e-3,
                "device": "cpu",
                "checkpoint_every": 0,
                "advantage": {"type": "_paced:padded"},
            },
            "workers": {"count": 0, "device": "cpu"},
            "eval": {"before": False, "after": False, "max_tokens": 8},
            "capacity": {"pace": pace.paced},
            "output": {"plots": False, "keep_episodes": False},
        }


def _measured(folder: Path) -> Measured:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    kept = steps[WARM_STEPS : len(steps) - COOL_STEPS]
    first, kept = kept[0], kept[1:]
    elapsed_s = kept[-1]["time"] - first["time"]
    waited_s = math.fsum(line["wait_s"] for line in kept)
    ages = [(int(key.partition("/")[2]), n) for line in kept for key, n in line.items() if key.startswith("staleness/")]
    summary = json.loads((folder / "summary.json").read_text())
    return Measured(
        step_s=elapsed_s / len(kept),
        train_s=(elapsed_s - waited_s) / len(kept),
        staleness=sum(age * n for age, n in ages) / sum(n for _, n in ages),
        violations=int(summary["max_staleness"] > MAX_STALENESS),
        swept=int(summary["rollouts"]["swept_groups"]),
        facts={key: value for key, value in steps[-COOL_STEPS].items() if key.startswith("capacity/")},
    )


def _row(found: Measured) -> dict[str, Any]:
    return {
        "utilisation": found.utilisation,
        "step_s": found.step_s,
        "train_s": found.train_s,
        "staleness_mean": found.staleness,
        "staleness_violations": found.violations,
        "swept": found.swept,
        "measured_by_the_run": found.facts,
    }


@contextmanager
def _process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


@contextmanager
def _workers(ticket: str, folder: Path, environment: dict[str, str], log: Path) -> Iterator[None]:
    """Paced workers, ended with the context."""
    with ExitStack() as stack:
        for number in range(WORKERS):
            call = f"import _paced; _paced.work({ticket!r}, 'paced-{number}', {str(folder)!r})"
            stack.enter_context(_process([sys.executable, "-c", call], environment, log))
        yield


def _ticket(folder: Path, train: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + JOIN_S
    while not (folder / "ticket.txt").exists():
        if train.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"the run in {folder} did not begin: {_tail(log)}")
        time.sleep(0.1)
    return (folder / "ticket.txt").read_text().strip()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:]


if __name__ == "__main__":
    benchmark(main)
