"""Web agents: the browser, the world model, and whether dreaming of the web helps on real pages.

    shoal bench dreams --json
    shoal bench dreams -- --only resets kill
    shoal bench dreams --timeout-s 3600 -- --only train --seed 1                    one seed of training, resumable
    shoal bench dreams --timeout-s 3600 -- --only train --seed 1 --row copy         or another: --help

`episodes`: reference policies on one-page tasks of MiniWoB++, four tabs at once: `reference_episodes_per_s`, with the
share that succeeded. `resets`: a thousand seeded resets in one process: milliseconds each, growth of the browser's
memory from the hundredth to the last, processes left when it is closed. `kill`: the browser killed with -9 in the
middle of an episode (which must become void) and the seconds until the next episode begins; then the process that owns
a browser killed with -9, and what is left of that browser. `sites`: reference policies on every template of our own
sites, four at once.

`world`: collects episodes, fits the world model and measures it on held-out templates and the held-out site, beside the
page left as it is, the model before it was fitted, and what can be known at all. `imitate`: learns from experts, and
takes the best by validation. `train`: goes on from there in dreams (GSPO), and plays the same real held-out episodes
before and after. `report`: sums up all seeds that have been trained. These four keep what they make in a folder, go on
where they stopped, and end after `--minutes`; `--quick` shows in small that they run, and measures nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from _dreams_stages import QUICK, ROW, Sizes, Stages, gain
from shoal.envs.web.actions import Stop
from shoal.envs.web.browser import BrowserError, close_browser, require_browser
from shoal.envs.web.listed import listed
from shoal.envs.web.play import Play
from shoal.envs.web.sites.templates import TEMPLATES
from shoal.errors import RunError
from shoal.fabric.identity import data_dir

from _common import benchmark, emit

NUM_TABS = 4
ONE_PAGE = listed(
    """click-test click-test-2 click-test-transfer click-button click-button-sequence click-dialog
    click-dialog-2 click-link click-option click-tab click-widget choose-list copy-paste enter-date
    enter-password enter-text enter-text-2 enter-time find-greatest find-word focus-text focus-text-2
    form-sequence-3 login-user read-table simple-algebra simple-arithmetic"""
)
"""Tasks of one page and at most three acts."""
EPISODES_PER_TASK = 12
NUM_RESETS = 1000
LAST_S = 10.0
"""Processes that end by themselves have this long."""

Part = Callable[[], Awaitable[tuple[dict[str, Any], dict[str, float]]]]


def descendants(pid: int) -> Iterator[int]:
    """All processes below one."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        children = [word for task in tasks for word in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from descendants(child)


def browser_processes(pid: int) -> list[int]:
    """Those that run a browser's program, or our guard of it."""
    found = []
    for one in descendants(pid):
        try:
            command = Path(f"/proc/{one}/cmdline").read_bytes()
        except OSError:
            continue
        if b"chrom" in command or b"guard.py" in command:
            found.append(one)
    return found


def browser_main(pids: list[int]) -> int:
    """The browser's first process among its processes."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}
    return next(pid for pid, words in commands.items() if b"--headless" in words and b"guard.py" not in words)


def memory_mib(pids: list[int]) -> float:
    """Proportional memory of these processes."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def cpu_s(pids: list[int]) -> float:
    """Processor time that these processes have used."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def gone(pids: list[int]) -> int:
    """How many of these are still there after a while."""
    end = time.monotonic() + LAST_S
    while left := sum(map(exists, pids)):
        if time.monotonic() > end:
            break
        await asyncio.sleep(0.05)
    return left


async def play(kind: str, seed: int) -> float:
    """One episode by the reference policy; its reward."""
    one = await Play.begin(kind, seed)
    try:
        policy = one.policy()
        assert policy is not None
        action = next(policy, None)
        while not one.done:
            await one.act(action or Stop())
            if not one.done:
                try:
                    action = policy.send(one.page) if action is not None else None
                except StopIteration:
                    action = None
        return one.reward
    finally:
        await one.close()


async def play_all(work: list[tuple[str, int]]) -> tuple[int, float]:
    """Play these, four at once; how many succeeded, and the seconds it took."""
    todo = iter(work)
    right = 0

    async def player() -> None:
        nonlocal right
        for kind, seed in todo:
            reward = await play(kind, seed)
            right += reward == 1.0

    started = time.monotonic()
    await asyncio.gather(*(player() for _ in range(NUM_TABS)))
    return right, time.monotonic() - started


async def episodes() -> tuple[dict[str, Any], dict[str, float]]:
    await play_all([("miniwob/click-test", seed) for seed in range(NUM_TABS)])
    # Each player stays with a task for a while, as it does where a task's rollouts are a group.
    blocks = [[(f"miniwob/{task}", seed) for seed in range(EPISODES_PER_TASK)] for task in ONE_PAGE]
    columns = [[one for block in blocks[first::NUM_TABS] for one in block] for first in range(NUM_TABS)]
    us = [os.getpid(), *descendants(os.getpid())]
    used = cpu_s(us)
    right, started = 0, time.monotonic()

    failed: list[str] = []

    async def player(column: list[tuple[str, int]]) -> None:
        nonlocal right
        for kind, seed in column:
            reward = await play(kind, seed)
            right += reward == 1.0
            if reward != 1.0:
                failed.append(f"{kind}/{seed}")

    await asyncio.gather(*(player(column) for column in columns))
    seconds = time.monotonic() - started
    total = len(ONE_PAGE) * EPISODES_PER_TASK
    used = cpu_s(us) - used
    row: dict[str, Any] = {
        "tasks": len(ONE_PAGE),
        "episodes": total,
        "succeeded": right,
        "seconds": round(seconds, 2),
        "tabs": NUM_TABS,
    }
    row["failed"] = failed
    row["cpu_ms_per_episode"] = round(1000 * used / total, 1)
    return row, {"reference_episodes_per_s": total / seconds, "reference_success": right / total}


async def resets() -> tuple[dict[str, Any], dict[str, float]]:
    early = 0.0
    started = time.monotonic()
    for number in range(NUM_RESETS):
        one = await Play.begin(f"miniwob/{ONE_PAGE[number // 50 % len(ONE_PAGE)]}", number)
        await one.close()
        if number + 1 == NUM_RESETS // 10:
            early = memory_mib(browser_processes(os.getpid()))
    seconds = time.monotonic() - started
    before = browser_processes(os.getpid())
    late = memory_mib(before)
    await close_browser()
    left = await gone(before)
    row = {"resets": NUM_RESETS, "ms": seconds * 1000 / NUM_RESETS, "mib_at_100": early, "mib_at_end": late}
    return {**row, "processes": len(before), "left": left}, {
        "reset_ms": seconds * 1000 / NUM_RESETS,
        "memory_growth": late / early - 1,
        "processes_left": float(left),
    }


async def kill() -> tuple[dict[str, Any], dict[str, float]]:
    one = await Play.begin("miniwob/click-checkboxes-large", 1)
    before = browser_processes(os.getpid())
    main = browser_main(before)
    os.kill(main, signal.SIGKILL)
    started = time.monotonic()
    policy = one.policy()
    assert policy is not None
    void = 0
    try:
        await one.act(next(policy))
    except BrowserError:
        void = 1
    await one.close()
    reward = await play("miniwob/click-test", 1)
    recovery = time.monotonic() - started
    left = await gone(before)
    had, orphans = await asyncio.to_thread(kill_owner)
    row = {"void": void, "recovery_s": recovery, "reward_after": reward, "left": left, "owner_left": orphans}
    return {**row, "owner_had": had}, {
        "kill_void": float(void),
        "kill_recovery_s": recovery,
        "kill_left": float(left + orphans),
    }


OWNER = """
import asyncio
from shoal.envs.web.play import Play
async def main():
    await Play.begin("miniwob/click-test", 1)
    print("up", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def kill_owner() -> tuple[int, int]:
    """Kill a process that owns a browser: processes that its browser had, and those that are left of them."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    owner.stdout.readline()
    theirs = browser_processes(owner.pid)
    owner.kill()
    owner.wait()
    return len(theirs), asyncio.run(gone(theirs))


async def sites() -> tuple[dict[str, Any], dict[str, float]]:
    work = [(kind, seed) for seed in range(2) for kind in TEMPLATES]
    right, seconds = await play_all(work)
    row = {"templates": len(TEMPLATES), "episodes": len(work), "succeeded": right, "seconds": round(seconds, 2)}
    return row, {"site_episodes_per_s": len(work) / seconds, "site_success": right / len(work)}


async def world(stages: Stages) -> tuple[dict[str, Any], dict[str, float]]:
    """In a thread: its commands have loops of their own."""
    found = await asyncio.to_thread(stages.world_eval)
    headline: dict[str, float] = {"dream_agreement": found["judging"].get("agreement", 0.0)}
    for place, name in (("template", ""), ("site", "site_")):
        row = found["held_out"][place]
        for who, prefix in (("world", ""), ("untuned", "untuned_")):
            if row.get(who, {}).get("transitions"):
                headline[f"{name}{prefix}exact_minus_copy"] = row[who]["exact"] - row["copy"]["exact"]
                headline[f"{name}{prefix}edit_f1"] = row[who]["edit_f1"]
        if "bound" in found:
            headline[f"{name}determined"] = found["bound"][place]["determined"]
    headline |= {f"depth_{row['depth']:.0f}_edit_f1": row["edit_f1"] for row in found["depth"]}
    headline["dreams_per_s"] = found["dreams_per_s"]
    return found, headline


async def train(stages: Stages, seed: int, row: str) -> tuple[dict[str, Any], dict[str, float]]:
    """One seed of one row."""
    if row == "experts_only":
        found = await asyncio.to_thread(stages.experts_only)
        return {"row": row, **found}, {"experts_only_accuracy": found["accuracy"]}
    found = gain([await asyncio.to_thread(stages.trained, seed, row)])
    return {"row": row, "seed": seed, **found}, {f"{row}_gain_points": found["gain_points"]}


async def imitate(stages: Stages) -> tuple[dict[str, Any], dict[str, float]]:
    """The policy that all training begins with."""
    model, marks = await asyncio.to_thread(stages.imitated)
    return {"model": str(model), "validation": marks}, {"imitation_validation": max(marks)}


async def report(stages: Stages) -> tuple[dict[str, Any], dict[str, float]]:
    """All that has been trained."""
    rows: dict[str, Any] = {}
    headline: dict[str, float] = {}
    finished = sorted(path.parent for path in (stages.folder / "runs").glob("*/summary.json"))
    for row in dict.fromkeys(run.name.rpartition("-")[0] for run in finished):
        rows[row] = gain([run for run in finished if run.name.rpartition("-")[0] == row])
        headline |= {f"{row}_{key}": rows[row][key] for key in ("gain_points", "episodes", "runs")}
        headline[f"{row}_interval_low"] = rows[row]["interval_points"][0]
    if not rows:
        raise RunError(
            f"nothing has been trained in {stages.folder} yet.",
            "Train a seed: -- --only train --seed 0 (an hour each).",
        )
    return rows, headline


PARTS: dict[str, Part] = {"episodes": episodes, "resets": resets, "kill": kill, "sites": sites}
STAGED = ("world", "imitate", "train", "report")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*PARTS, *STAGED],
        help="parts to run; by default those of minutes, and what is there",
    )
    parser.add_argument("--seed", type=int, default=0, help="of train")
    parser.add_argument("--row", default="dreams", help=f"of train: {ROW.pattern}")
    parser.add_argument("--minutes", type=float, default=58.0, help="after which world and train stop, to go on later")
    parser.add_argument("--folder", type=Path, default=data_dir() / "bench-dreams", help="of world, train and report")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of fitting and measuring models")
    parser.add_argument("--model", default=Sizes().model, help="that is fitted and trained")
    parser.add_argument("--quick", action="store_true", help="show in small that world, train and report run")
    given = parser.parse_args()
    if not ROW.fullmatch(given.row):
        parser.error(f"there is no row {given.row}")
    stages = Stages(
        given.folder / "quick" if given.quick else given.folder,
        replace(QUICK if given.quick else Sizes(), model=given.model),
        given.minutes,
        given.threads,
    )
    staged: dict[str, Part] = {
        "world": partial(world, stages),
        "imitate": partial(imitate, stages),
        "train": partial(train, stages, given.seed, given.row),
        "report": partial(report, stages),
    }
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    only = given.only or [*PARTS, *(name for name in ("world", "report") if stages.has(name))]
    if only != ["report"]:
        require_browser()

    async def run() -> None:
        for name in only:
            row, numbers = await (PARTS | staged)[name]()
            rows.append({"part": name, **row})
            headline.update(numbers)
            print(name, row, file=sys.stderr)
        await close_browser()

    asyncio.run(run())
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
