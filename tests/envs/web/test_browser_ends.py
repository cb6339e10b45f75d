"""No process of the browser outlives the one that owns it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

OWNER = """
import asyncio
from shoal.envs.web.browser import borrowed_tab
async def main():
    async with borrowed_tab() as tab:
        print("up", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
LAST_S = 30.0


def descendants(pid: int) -> Iterator[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        children = [
            int(word) for task in tasks for word in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        ]
    except OSError:
        return
    for child in children:
        yield child
        yield from descendants(child)


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.usefixtures("chromium")
@pytest.mark.parametrize("who", ["owner", "interrupt", "driver", "guard", "browser"])
def test_nothing_is_left(who: str) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
    pids = list(descendants(owner.pid))
    named = {pid: command(pid) for pid in pids}
    guard = next(pid for pid, words in named.items() if "guard.py" in words)
    driver = next(pid for pid, words in named.items() if "playwright" in words and "guard.py" not in words)
    browser = next(pid for pid in descendants(guard) if "--headless" in named.get(pid, ""))
    below = [pid for pid in pids if pid != driver]
    assert len(below) > 3
    if who == "interrupt":
        owner.send_signal(signal.SIGINT)
    else:
        os.kill({"owner": owner.pid, "driver": driver, "guard": guard, "browser": browser}[who], signal.SIGKILL)
    end = time.monotonic() + LAST_S
    try:
        while left := [pid for pid in below if "Z" not in _state(pid)]:
            assert time.monotonic() < end, [named[pid][:80] for pid in left]
            time.sleep(0.05)
        if who == "owner":
            # Only a guard that was killed itself leaves a folder.
            scratch = next(word for word in named[guard].split() if "/shoal-web-" in word)
            assert not Path(scratch).exists()
    finally:
        owner.kill()
        owner.wait()


def _state(pid: int) -> str:
    """Z where the process has ended, or is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
