"""Does asynchronous training at S = 2 learn what strictly on-policy training learns, in how much less time?

    learning  `shoal train` in `async` (S = 2) and `pull` mode, and TRL's own GRPO trainer, from the same model with the
              same hyper-parameters, a few seeds each. Final reward: what the trained model earns at the training
              temperature on held-out tasks, sampled by one engine for all three
    pace      one run of each mode with steps and generation of equal length (`_paced`): wall-clock time a step

`equivalent` is 1 where two one-sided t-tests over the seeds' paired differences both say, at 5 % each, that the means
of async and pull are within 5 points of each other. The model is the tests' two-layer one. Results of finished runs are
kept in `--folder`, so that a run that was interrupted goes on where it was. Some fifteen minutes alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import tomli_w

from _nat import tiny_model
from shoal.config.learner import AsyncLearner, GrpoLoss
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.errors import RunError
from shoal.protocol.sampling import SampleRequest, SamplingParams

from _common import benchmark, emit

STALENESS = 2
GROUPS_PER_STEP, GROUP_SIZE, MAX_TOKENS = 16, 8, 8
KL_BETA = 0.4
"""Weight of the KL penalty. With advantages that are not scaled it gives the task an optimum that is neither 0 nor 1:
rewards r of a reference r0 come to logit(r) = logit(r0) + 1 / beta, here from 0.12 to about 0.6."""

MARGIN = 0.05
LEVEL = 0.05
EVALUATED = 2000
"""Held-out replies sampled from each trained model: a standard error of one point."""

PACE_S = 2.0
"""A step, and the generation of its rollouts, each."""

PACE_STEPS, PACE_SKIPPED, PACE_GROUPS = 24, 5, 8
WORKERS, SLOTS = 2, 4
RUN_S = 900.0
MODES = ("async", "pull", "trl")


def say(text: str) -> None:
    print(f"training: {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="+", choices=("learning", "pace"), default=("learning", "pace"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--folder", type=Path, default=None, help="where results of finished runs are kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-training-") as scratch:
        bench = Bench(Path(scratch), options.folder or Path(scratch) / "results", options.steps, options.lr)
        rows: list[dict[str, Any]] = []
        found: dict[str, float] = {}
        if "learning" in options.only:
            rows = [bench.learn(mode, seed) for seed in range(options.seeds) for mode in options.modes]
            found |= comparison(rows)
        if "pace" in options.only:
            paced = {mode: bench.pace(mode) for mode in ("async", "pull")}
            rows += paced.values()
            found["async_over_pull"] = paced["async"]["step_s"] / paced["pull"]["step_s"]
    emit(rows, found)


def comparison(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the seeds say together."""
    final = {mode: [row["final_reward"] for row in rows if row["mode"] == mode] for mode in MODES}
    found = {f"final_reward_{mode}": statistics.fmean(values) for mode, values in final.items() if values}
    found |= {f"final_reward_{mode}_min": min(values) for mode, values in final.items() if values}
    found |= {f"final_reward_{mode}_max": max(values) for mode, values in final.items() if values}
    if len(final["async"]) == len(final["pull"]) > 1:
        differences = [a - b for a, b in zip(final["async"], final["pull"], strict=True)]
        low, high = interval(differences)
        found |= {"difference_low": low, "difference_high": high}
        found["equivalent"] = float(low > -MARGIN and high < MARGIN)
    return found


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The interval that lies inside the margin exactly where both one-sided t-tests at `LEVEL` reject."""
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = student_quantile(1 - LEVEL, len(differences) - 1) * error
    return mean - half, mean + half


def student_quantile(share: float, freedom: int) -> float:
    """The quantile of Student's t, by bisection of its integrated density."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def below(x: float, pieces: int = 2000) -> float:
        # Simpson's rule from 0 to x.
        step = x / pieces
        values = [scale * (1 + (step * n) ** 2 / freedom) ** (-(freedom + 1) / 2) for n in range(pieces + 1)]
        return 0.5 + step / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))

    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < share else (low, middle)
    return low


class Bench:
    """All runs, one after the other.

    Args:
        kept: folder of finished runs' results.
    """

    def __init__(self, scratch: Path, kept: Path, steps: int, lr: float) -> None:
        self.scratch = scratch
        self.kept = kept
        self.steps = steps
        self.lr = lr
        self.model = tiny_model(scratch / "model")
        kept.mkdir(parents=True, exist_ok=True)

    def learn(self, mode: str, seed: int) -> dict[str, Any]:
        """One training run and its final reward; from the folder if it was done before."""
        return self._once(f"{mode}-{seed}-{self.steps}-{self.lr:g}", lambda name: self._learn(name, mode, seed))

    def pace(self, mode: str) -> dict[str, Any]:
        """One paced run: how long a step takes, by the clock."""
        return self._once(f"pace-{mode}", lambda name: self._pace(name, mode))

    def _once(self, name: str, make: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        path = self.kept / f"{name}.json"
        if not path.exists():
            row = make(name)
            path.write_text(json.dumps(row))
        row = dict(json.loads(path.read_text()))
        say(f"{name}: {json.dumps({key: value for key, value in row.items() if key != 'rewards'})}")
        return row

    def _learn(self, name: str, mode: str, seed: int) -> dict[str, Any]:
        started = time.monotonic()
        if mode == "trl":
            trained, rewards = self._trl(name, seed)
        else:
            folder = self._shoal(name, mode, seed)
            trained = folder / "model"
            rewards = [line["reward"] for line in steps_of(folder)]
        seconds = time.monotonic() - started
        final = asyncio.run(evaluated(trained, seed))
        return {"mode": mode, "seed": seed, "final_reward": final, "seconds": seconds, "rewards": rewards}

    def _shoal(self, name: str, mode: str, seed: int) -> Path:
        config = self.scratch / f"{name}.toml"
        config.write_text(tomli_w.dumps(self._config(name, mode, seed)))
        log = self.scratch / f"{name}.log"
        with process(
            [sys.executable, "-m", "shoal.cli", "train", str(config), "--json"], self._environment(), log
        ) as p:
            wait(p, name, log)
        return self.scratch / "runs" / name

    def _config(self, name: str, mode: str, seed: int) -> dict[str, Any]:
        learner: dict[str, Any] = {
            "mode": mode,
            "lr": self.lr,
            "lr_schedule": "linear",
            "device": "cpu",
            "checkpoint_every": 0,
            "advantage": {"scale_by_std": False},
            "loss": {"kl_beta": KL_BETA},
            "microbatch_tokens": 4096,
        }
        if mode == "async":
            learner["max_staleness"] = STALENESS
        return {
            "run": {"name": name, "dir": str(self.scratch / "runs"), "steps": self.steps, "seed": seed},
            "model": {"name": str(self.model), "dtype": "fp32", "context_tokens": 64},
            "envs": {"digit": {"type": "tiny:FirstDigit"}},
            "rollout": {"group_size": GROUP_SIZE, "groups_per_step": GROUPS_PER_STEP, "max_tokens": MAX_TOKENS},
            "learner": learner,
            "workers": {"count": WORKERS, "max_sequences": 32, "cache_tokens": 4096, "device": "cpu"},
            "eval": {"before": False, "after": False, "max_tokens": MAX_TOKENS},
            "output": {"plots": False},
        }

    def _trl(self, name: str, seed: int) -> tuple[Path, list[float]]:
        defaults, output = AsyncLearner(lr=self.lr), self.scratch / "trl" / name
        assert isinstance(defaults.loss, GrpoLoss)
        given = {
            "model": str(self.model),
            "output": str(output),
            "steps": self.steps,
            "seed": seed,
            "groups_per_step": GROUPS_PER_STEP,
            "group_size": GROUP_SIZE,
            "max_tokens": MAX_TOKENS,
            "temperature": 1.0,
            "lr": self.lr,
            "betas": defaults.betas,
            "eps": defaults.eps,
            "weight_decay": defaults.weight_decay,
            "grad_clip": defaults.grad_clip,
            "clip": defaults.loss.eps_low,
            "kl_beta": KL_BETA,
            "prompts": [f"{n % 64}?" for n in range(self.steps * GROUPS_PER_STEP)],
        }
        log = self.scratch / f"{name}.log"
        script = Path(__file__).with_name("_trl_grpo.py")
        # Without this folder on its path, whose `kernels` a library would take for the package of that name.
        environment = self._environment() | {"PYTHONPATH": ""}
        with process([sys.executable, "-P", str(script), json.dumps(given)], environment, log) as p:
            wait(p, name, log)
        said = [json.loads(line) for line in log.read_text(errors="replace").splitlines() if line.startswith('{"step"')]
        return output, [line["reward"] for line in said]

    def _pace(self, name: str, mode: str) -> dict[str, Any]:
        tables = self._config(name, mode, 0)
        tables["run"]["steps"] = PACE_STEPS
        tables["envs"] = {"digit": {"type": "_paced:FirstDigit"}}
        tables["rollout"] |= {"group_size": 4, "groups_per_step": PACE_GROUPS, "lease_timeout_s": 60.0}
        tables["learner"]["advantage"] = {"type": "_paced:padded", "scale_by_std": False}
        tables["workers"] = {"count": 0, "device": "cpu"}
        tables["trust"] = {"check": False}
        config, log = self.scratch / f"{name}.toml", self.scratch / f"{name}.log"
        config.write_text(tomli_w.dumps(tables))
        folder = self.scratch / "runs" / name
        environment = self._environment() | {
            "PACED_ROLLOUT_S": repr(PACE_S * WORKERS * SLOTS / PACE_GROUPS),
            "PACED_TRAIN_S": repr(PACE_S),
            "PACED_FORGIVEN_S": "0.0",
            "PACED_BCAST_S": "0.05",
            "PACED_STALL": "0",
            "PACED_SLOTS": str(SLOTS),
            "PACED_GROUP_SIZE": "4",
        }
        with ExitStack() as stack:
            train = stack.enter_context(
                process([sys.executable, "-m", "shoal.cli", "train", str(config), "--json"], environment, log)
            )
            ticket = ticket_of(folder, train, log)
            for number in range(WORKERS):
                call = f"import _paced; _paced.work({ticket!r}, 'paced-{number}', {str(folder)!r})"
                stack.enter_context(process([sys.executable, "-c", call], environment, log))
            wait(train, name, log)
        steps = steps_of(folder)
        kept = steps[PACE_SKIPPED:]
        return {
            "mode": mode,
            "paced": True,
            "step_s": (kept[-1]["time"] - kept[0]["time"]) / (len(kept) - 1),
            "train_s": statistics.fmean(line["train_s"] for line in kept),
            "wait_s": statistics.fmean(line["wait_s"] for line in kept),
            "max_staleness": max(line["staleness_max"] for line in kept),
        }

    def _environment(self) -> dict[str, str]:
        here = Path(__file__).parent
        search = [str(here), str(here.parent / "tests"), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, search)),
            "SHOAL_HOME": str(self.scratch / "home"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


async def evaluated(directory: Path, seed: int) -> float:
    """What a model earns on held-out tasks, at temperature 1."""
    async with LocalEngine(
        LocalModel("trained", directory),
        dtype="fp32",
        device="cpu",
        max_sequences=64,
        cache_tokens=8192,
        context_tokens=64,
    ) as engine:
        from shoal.protocol.chat import Message

        async def reply(number: int) -> float:
            ids = engine.tokenizer.prompt([Message(role="user", content=f"{number % 64}?")])
            params = SamplingParams(max_tokens=1, seed=1_000_003 * seed + number)
            drawn = await engine.sample(SampleRequest(prompt_ids=tuple(ids), params=params))
            return float(drawn.text[:1].isdigit())

        earned = [await asyncio.gather(*(reply(at + n) for n in range(64))) for at in range(0, EVALUATED, 64)]
    return statistics.fmean(value for part in earned for value in part)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


@contextlib.contextmanager
def process(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as out:
        started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(environment))
    try:
        yield started
    finally:
        if started.poll() is None:
            started.terminate()
            try:
                started.wait(20.0)
            except subprocess.TimeoutExpired:
                started.kill()
        started.wait()


def wait(started: subprocess.Popen[bytes], name: str, log: Path) -> None:
    """Until it is done.

    Raises:
        RunError: it takes too long, or failed.
    """
    try:
        code = started.wait(RUN_S)
    except subprocess.TimeoutExpired:
        code = None
    if code != 0:
        what = f"was not over after {RUN_S:g} s" if code is None else f"ended with exit code {code}"
        raise RunError(f"{name} {what}: {log.read_text(errors='replace')[-1500:]}")


def ticket_of(folder: Path, train: subprocess.Popen[bytes], log: Path, seconds: float = 180.0) -> str:
    deadline = time.monotonic() + seconds
    while not (folder / "ticket.txt").exists():
        if train.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"the run in {folder} did not begin: {log.read_text(errors='replace')[-1500:]}")
        time.sleep(0.1)
    return (folder / "ticket.txt").read_text().strip()


if __name__ == "__main__":
    benchmark(main)
