"""Web agents: reference episodes a second, resets, memory, and what is left of a browser that is killed.

    shoal bench dreams --json
    shoal bench dreams -- --only resets kill

`episodes`: reference policies on one-page tasks of MiniWoB++, four tabs at once: `reference_episodes_per_s`, with the
share that succeeded. `resets`: a thousand seeded resets in one process: milliseconds each, growth of the browser's
memory from the hundredth to the last, processes left when it is closed. `kill`: the browser killed with -9 in the
middle of an episode (which must become void) and the seconds until the next episode begins; then the process that owns
a browser killed with -9, and what is left of that browser. `sites`: reference policies on every template of our own
sites, four at once.
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
from pathlib import Path
from typing import Any

from shoal.envs.web.actions import Stop
from shoal.envs.web.browser import BrowserError, close_browser, require_browser
from shoal.envs.web.listed import listed
from shoal.envs.web.play import Play
from shoal.envs.web.sites.templates import TEMPLATES

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


PARTS: dict[str, Part] = {"episodes": episodes, "resets": resets, "kill": kill, "sites": sites}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; all by default")
    chosen = parser.parse_args().only
    require_browser()
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}

    async def run() -> None:
        for name in chosen:
            row, numbers = await PARTS[name]()
            rows.append({"part": name, **row})
            headline.update(numbers)
            print(name, row, file=sys.stderr)
        await close_browser()

    asyncio.run(run())
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
