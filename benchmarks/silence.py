"""How soon are a stopped worker, a stopped learner and a stopped transfer named to whoever looks?

Real commands in a packet lab (docs/lab.md), a tiny model. A process is stopped (SIGSTOP); time runs from there until
the run's terminal has a line about it, and until a `shoal status` has ended that says so (each is a new process, as a
user's is; its own start counts). Then the process goes on, and both must say so before the next trial. In the transfer
part a worker with a slow link is fetching its first weights when the process that serves them is stopped.

Needs root and /dev/net/tun. Some three minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _nat import SHOAL, NatRun, tiny_model
from shoal.errors import RunError
from shoal.lab import tun

from _common import benchmark, emit

JOIN_S = 240.0
RUN_S = 240.0
NOTICE_S = 60.0
"""What is named later counts as not named."""

ENDLESS_STEPS = 1_000_000

WIDTH = 512
"""Of the model whose transfer is stopped: 18 MB, which have to pass a worker's slower link."""

SLOW_MBPS = 20.0

BEGUN_BYTES = 4_000_000
"""So much has arrived when the transfer is stopped: about a quarter."""


def say(text: str) -> None:
    print(f"silence: {text}", file=sys.stderr, flush=True)


def child(pid: int, word: str) -> int:
    """The child of `pid` with this word in its command line.

    Raises:
        RunError: there is none.
    """
    for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if word in Path(f"/proc/{found}/cmdline").read_text().split("\0"):
            return int(found)
    raise RunError(f"Process {pid} has no child {word!r}.", "Has the command line changed?")


async def status(run: NatRun) -> list[str]:
    """The sentences about who is silent, of a `shoal status` beside the run."""
    argv: list[str | Path] = [*SHOAL, "status", run.path, "--json"]
    process = await run.start("home", "status", argv, stdout=PIPE)
    out, _ = await asyncio.wait_for(process.communicate(), NOTICE_S)
    return list(json.loads(out)["silent"]) if process.returncode == 0 else []


async def told(run: NatRun, holds: Callable[[list[str]], bool], what: str) -> float:
    """When a `shoal status` ended that satisfied the condition."""
    deadline = time.monotonic() + NOTICE_S
    while not holds(await status(run)):
        if time.monotonic() > deadline:
            raise RunError(f"`shoal status` did not tell {what} within {NOTICE_S:g} s.", run.tails())
    return time.monotonic()


async def printed(run: NatRun, words: str, start: int, what: str) -> float:
    """When the run's terminal had these words, looking from a place in what it said."""

    def said() -> bool:
        return words in terminal(run)[start:]

    await run.until(said, NOTICE_S, what)
    return time.monotonic()


def terminal(run: NatRun) -> str:
    return (run.folder / "train.log").read_text()


async def trial(run: NatRun, pid: int, subject: str, again: str) -> dict[str, float]:
    """Stop a process, and see it named; let it go on, and see that named too.

    Args:
        subject: how the sentences about it begin: a name, for a process ("learner silent for 6 s, …", "learner: …").
        again: how the terminal's line about its end begins.
    """
    start = len(terminal(run))
    os.kill(pid, signal.SIGSTOP)
    stopped_at = time.monotonic()
    try:
        on_terminal, in_status = await asyncio.gather(
            printed(run, f"Waiting: {subject}", start, f"line about {subject!r}"),
            told(run, lambda silent: any(text.startswith(subject) for text in silent), f"of {subject!r}"),
        )
    finally:
        os.kill(pid, signal.SIGCONT)
    await asyncio.gather(
        printed(run, f"No longer: {again}", start, f"line that {again!r} is over"),
        told(run, lambda silent: not any(text.startswith(subject) for text in silent), f"the end of {subject!r}"),
    )
    return {"terminal_s": on_terminal - stopped_at, "status_s": in_status - stopped_at}


async def stopped_processes(folder: Path, model: Path, rounds: int) -> list[dict[str, Any]]:
    """A worker and the learner, one after the other, in a run that goes on."""
    rows = []
    async with NatRun(folder, model, steps=ENDLESS_STEPS, num_workers=2) as run:
        await run.start_router(0)
        await run.start_training()
        for number in range(2):
            await run.start_worker(number)
        await run.joined(JOIN_S)
        await run.until(lambda: run.steps, RUN_S, "first step")
        for _ in range(rounds):
            for part, name in (("worker", "worker-0"), ("learner", "learner")):
                train = run.processes["train"].pid
                pid = run.processes[name].pid if part == "worker" else child(train, "_learner")
                row = {"part": part, **await trial(run, pid, name, f"{name} is silent")}
                say(f"{part}: terminal {row['terminal_s']:.1f} s, status {row['status_s']:.1f} s")
                rows.append(row)
    return rows


def wider(model: Path, folder: Path) -> Path:
    """The tiny model with more weights."""
    from transformers import AutoConfig, LlamaForCausalLM

    shutil.copytree(model, folder)
    config = AutoConfig.from_pretrained(model)
    config.hidden_size, config.intermediate_size, config.head_dim = WIDTH, 2 * WIDTH, WIDTH // 4
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


async def stopped_transfer(folder: Path, model: Path, rounds: int) -> list[dict[str, Any]]:
    """The process that serves weights, while a worker fetches its first."""
    rows = []
    wide = wider(model, folder / "model")
    for number in range(rounds):
        async with NatRun(folder / str(number), wide, steps=ENDLESS_STEPS, num_workers=1, down_mbps=SLOW_MBPS) as run:
            await run.start_router(0)
            await run.start_training()
            await run.until(lambda run=run: is_in(run, "learner"), JOIN_S, "learner")  # type: ignore[misc]
            await run.start_worker(0)
            await run.joined(JOIN_S)
            deadline = time.monotonic() + RUN_S
            while await arrived(run) < BEGUN_BYTES:
                if time.monotonic() > deadline:
                    raise RunError("The worker does not fetch the weights.", run.tails())
                await asyncio.sleep(0.05)
            server = child(run.processes["train"].pid, "_learner")
            wait = "worker-0 waits for the weights"
            row = {"part": "transfer", **await trial(run, server, wait, wait)}
            say(f"transfer: terminal {row['terminal_s']:.1f} s, status {row['status_s']:.1f} s")
            rows.append(row)
    return rows


def is_in(run: NatRun, name: str) -> bool:
    return any(event["data"]["name"] == name for event in run.events("node.joined"))


async def arrived(run: NatRun) -> int:
    return (await run.lab.statistics()).nodes["worker-0"].down.bytes


PARTS = {"processes": stopped_processes, "transfer": stopped_transfer}


async def measure(only: list[str], rounds: int) -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="shoal-silence-") as scratch:
        model = tiny_model(Path(scratch) / "model")
        for name in only:
            rows += await PARTS[name](Path(scratch) / name, model, rounds)
    headline = {}
    for part in dict.fromkeys(row["part"] for row in rows):
        for where in ("terminal", "status"):
            headline[f"{part}_{where}_max_s"] = max(row[f"{where}_s"] for row in rows if row["part"] == part)
    emit(rows, {"named_max_s": max(headline.values())} | headline)


def main() -> None:
    parser = argparse.ArgumentParser(prog="silence", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; all by default")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is stopped")
    options = parser.parse_args()
    if problem := tun.missing():
        raise RunError(problem, "Run it there as root.")
    asyncio.run(measure(options.only, options.rounds))


if __name__ == "__main__":
    benchmark(main)
