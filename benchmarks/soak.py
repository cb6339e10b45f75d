"""Does any process grow while one run trains, serves and lets agents act for a long time, and others come and go?

Real processes on loopback: a run (coordinator, learner, one worker of its own), a second worker that is killed (-9) or
told to end in turn and comes back, `shoal serve --follow` of the run with clients that are killed in the middle of
their answers as well, and an agent with a scripted policy and real tools (`_soak_agent`). What each lasting process
holds is sampled every two seconds: resident memory that is no file's, descriptors, threads, files below its folders
of temporary files and caches.

    ..._growth_percent     of the second half, the worst of the lasting processes: the median slope of all pairs of
                           samples (Theil, Sen), times the half's length, over the half's median
    accepted               whether the second half's growth is at most 2 % everywhere
    steps, answers, agent_runs, churned        what was done meanwhile

As long as `--minutes` says, and some two minutes more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from _chaos_checks import TRACEBACK, Request
from _chaos_keeper import Keeper
from _nat import SHOAL, read_lines, tiny_model
from _soak_growth import Sample, growth, sample
from join import until_told
from shoal.coordinator.audit import audit
from shoal.coordinator.processes import child_of_this
from shoal.errors import RunError
from shoal.lab.packet import own_environment

from _common import benchmark, emit

BENCHMARKS = Path(__file__).parent
DOCUMENTS = BENCHMARKS.parent / "docs"

SAMPLE_S = 2.0
CHURN_S = (10.0, 25.0)
"""Between two deaths, drawn between these."""

START_S = 180.0
MOST_GROWTH = 0.02
STALENESS = 2
MANY = 100_000
"""Churn starts a part more often than a service manager would."""

WHAT = ("memory_mb", "descriptors", "threads", "files")


def say(text: str) -> None:
    print(f"soak: {text}", file=sys.stderr, flush=True)


class Soak:
    """All processes of a soak; `close` ends them."""

    def __init__(self, folder: Path, model: Path, seed: int) -> None:
        self.folder = folder
        self.run = folder / "runs" / "soak"
        self.samples: dict[str, list[Sample]] = {}
        self.churned = 0
        self._model = model
        self._random = random.Random(seed)
        self._keepers: dict[str, Keeper] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]

    async def start(self) -> None:
        """Everything, up to a step and an answer."""
        config = self.folder / "soak.toml"
        config.write_text(tomli_w.dumps(self._config()))
        self._keep("coordinator", [*SHOAL, "train", config, "--json"])
        ticket = self.run / "ticket.txt"
        await self._until(ticket.exists, "the run's ticket")
        work: list[str | Path] = [*SHOAL, "worker", ticket, "--name", "guest", "--device", "cpu", "--grace", "2"]
        self._keep("guest", [*work, "--max-sequences", "16", "--cache-tokens", "2048"])
        serve: list[str | Path] = [*SHOAL, "serve", ticket, "--follow", "--port", str(self._port), "--name", "policy"]
        self._keep("server", [*serve, "--device", "cpu", "--context-tokens", "96", "--json"])
        self._keep("agent", [sys.executable, BENCHMARKS / "_soak_agent.py", self.folder, DOCUMENTS], stdout=PIPE)
        await self._until(lambda: self.steps() > 0, "the first step")
        url = f"http://127.0.0.1:{self._port}/v1"
        self._keep("client", [sys.executable, BENCHMARKS / "_chaos_client.py", url, "policy", self._requests, "30"])
        await self._until(lambda: self.answers() > 0, "the first answer")

    def _keep(self, name: str, argv: Sequence[str | Path], stdout: int | None = None) -> None:
        async def launch() -> Process:
            home, scratch = self.folder / "homes" / name, self.folder / "tmp" / name
            scratch.mkdir(parents=True, exist_ok=True)
            environment = own_environment() | child_of_this()
            environment |= {"SHOAL_HOME": str(home), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
            environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), environment["PYTHONPATH"]])
            with (self.folder / f"{name}.log").open("ab") as log:
                return await asyncio.create_subprocess_exec(
                    *map(str, argv),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=stdout or log.fileno(),
                    stderr=log.fileno(),
                    env=environment,
                    start_new_session=True,
                )

        lasts = name not in ("guest", "client")
        self._keepers[name] = Keeper(name, launch, max_starts=1 if lasts else MANY)
        self._keepers[name].start()

    async def soak(self, seconds: float) -> None:
        """Let it go on, with churn, and take samples."""
        began_s = told_s = time.monotonic()
        churn_s = began_s + self._random.uniform(*CHURN_S)
        while (now_s := time.monotonic()) < began_s + seconds:
            for name, pid in self._lasting().items():
                folders = [self.folder / kind / name for kind in ("homes", "tmp")]
                with suppress(OSError):
                    self.samples.setdefault(name, []).append(sample(pid, now_s, folders))
            if now_s > churn_s:
                churn_s = now_s + self._random.uniform(*CHURN_S)
                how = self._random.choice((signal.SIGKILL, signal.SIGTERM))
                self._keepers[self._random.choice(("guest", "client"))].send(how)
                self.churned += 1
            if now_s > told_s + 60:
                told_s = now_s
                say(f"{now_s - began_s:.0f} s, {self.steps()} steps, {self.answers()} answers, {self.churned} deaths")
            self._check()
            await asyncio.sleep(SAMPLE_S)

    def _lasting(self) -> dict[str, int]:
        """Processes that last from the start to the end: the parts, and the run's children."""
        found = {name: pid for name in ("coordinator", "server", "agent") if (pid := self._keepers[name].pid)}
        with suppress(OSError):
            pid = found["coordinator"]
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
                found["learner" if "_learner" in words else "worker"] = int(child)
        return found

    async def end(self) -> dict[str, Any]:
        """Tell everything to end; gives what the agent said."""
        said = b""
        for name in ("client", "guest", "agent", "server", "coordinator"):
            keeper = self._keepers[name]
            ended = await keeper.end()
            if ended.code is None:
                raise RunError(f"{name} did not end.", f"What it said:\n{self._tail(name)}")
            if name == "agent" and keeper.process is not None and keeper.process.stdout is not None:
                said = await keeper.process.stdout.read()
        return dict(json.loads(said))

    async def close(self) -> None:
        """End what is left."""
        for keeper in self._keepers.values():
            await keeper.stop()
            keeper.send(signal.SIGKILL)
            if keeper.process is not None:
                await keeper.process.wait()

    @property
    def _requests(self) -> Path:
        return self.folder / "requests.jsonl"

    def requests(self) -> list[Request]:
        return [msgspec.convert(line, Request) for line in read_lines(self._requests)]

    def answers(self) -> int:
        return self._requests.read_bytes().count(b'"answered"') if self._requests.exists() else 0

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b'"kind":"step"') if path.exists() else 0

    def tracebacks(self) -> list[str]:
        paths = [*self.folder.glob("*.log"), *(self.run / "logs").glob("*.log")]
        return [path.name for path in paths if TRACEBACK in path.read_text(errors="replace")]

    def _check(self) -> None:
        for name, keeper in self._keepers.items():
            if keeper.problem:
                raise RunError(f"{keeper.problem}", f"What it said:\n{self._tail(name)}")

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            self._check()
            if time.monotonic() > deadline:
                tails = "\n".join(f"== {name}\n{self._tail(name)}" for name in self._keepers)
                raise RunError(f"No {what} in {START_S:g} s.", f"What was said last:\n{tails}")
            await asyncio.sleep(0.1)

    def _tail(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace")[-1500:] if path.exists() else ""

    def _config(self) -> dict[str, Any]:
        sums = {"type": "_chaos_world:SlowArithmetic", "settings": {"add": [0, 6], "reward": "lenient"}}
        return {
            "run": {"name": "soak", "dir": str(self.run.parent), "steps": 1_000_000},
            "model": {"name": str(self._model), "dtype": "fp32", "context_tokens": 96},
            "envs": {"sums": sums},
            "rollout": {"group_size": 8, "groups_per_step": 2, "max_tokens": 8, "lease_timeout_s": 10.0},
            "learner": {"mode": "async", "max_staleness": STALENESS, "lr": 1e-3, "device": "cpu"},
            "workers": {"count": 1, "max_sequences": 16, "cache_tokens": 2048, "device": "cpu"},
            "network": {"ticket_uses": 4096},
            "trust": {"probation": 8},
            "eval": {"questions": 1, "max_tokens": 8, "before": False},
            "output": {"plots": False},
        }


def table(samples: Mapping[str, Sequence[Sample]]) -> list[dict[str, Any]]:
    """By process and kind of thing: the second half's growth, and what was held at most."""
    rows = []
    for name, held in sorted(samples.items()):
        row: dict[str, Any] = {"process": name, "samples": len(held)}
        for what in WHAT:
            points = [(one.at_s, float(getattr(one, what))) for one in held]
            row[what] = max(value for _, value in points)
            row[f"{what}_growth_percent"] = round(100 * growth(points), 3)
        rows.append(row)
    return rows


async def measure(options: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="shoal-soak-"))
    soak = Soak(folder, tiny_model(folder / "model"), options.seed)
    done = False
    try:
        await soak.start()
        say("everything goes")
        began_s = time.monotonic()
        await soak.soak(60 * options.minutes)
        seconds = time.monotonic() - began_s
        agent = await soak.end()
        rows = table(soak.samples)
        found = audit(soak.run, max_staleness=STALENESS)
        worst = {what: max(row[f"{what}_growth_percent"] for row in rows) for what in WHAT}
        tracebacks = soak.tracebacks()
        for problem in [*found.problems, *(f"{name} has a traceback" for name in tracebacks)]:
            say(problem)
        emit(
            rows,
            {
                "seconds": round(seconds, 1),
                **{f"{what.removesuffix('_mb')}_growth_percent": value for what, value in worst.items()},
                "accepted": max(worst.values()) <= 100 * MOST_GROWTH,
                "steps": found.steps,
                "answers": soak.answers(),
                "agent_runs": agent["final"],
                "agent_failures": agent["other"] + agent["failed_calls"],
                "churned": soak.churned,
                "broken_promises": 0 if found.good else 1,
                "tracebacks": len(tracebacks),
            },
        )
        done = found.good and not tracebacks
    finally:
        await soak.close()
        if done and not options.keep:
            shutil.rmtree(folder)
        else:
            say(f"logs are in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="of who dies when")
    parser.add_argument("--keep", action="store_true", help="keep the logs")
    options = parser.parse_args()
    asyncio.run(until_told(measure(options)))


if __name__ == "__main__":
    benchmark(main)
