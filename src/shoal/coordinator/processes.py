"""Child processes: started, watched, ended; none outlives its parent.

Each child runs in a session of its own, so that Ctrl-C reaches the parent alone, which ends the children in order. A
child asks the kernel to be killed when its parent dies (`die_with_parent`), so a parent killed with -9 leaves no
orphan. Invariants: `end_all` returns with every child reaped; a child's output goes to its own log file.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PARENT_VARIABLE = "SHOAL_PARENT_PID"
"""Tells a child whom to die with."""

PR_SET_PDEATHSIG = 1

TERM_GRACE_S = 20.0
"""A child that was asked to end and has not by then is killed."""

LOG_TAIL_BYTES = 2000

MAX_LOG_BYTES = 16 * 2**20
"""A log that is longer when its process is started again is put aside as `NAME.log.1`, in place of an older one."""


def die_with_parent() -> None:
    """To be called first thing in a child: when the parent ends, however, this process is killed."""
    parent = os.environ.pop(PARENT_VARIABLE, None)  # for this process alone, not for those it starts
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        os._exit(1)  # the parent died before the line above took effect


def child_of_this() -> dict[str, str]:
    """What a child's environment needs for `die_with_parent`."""
    return {PARENT_VARIABLE: str(os.getpid())}


@dataclass
class Child:
    """One running child."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    @property
    def tail(self) -> str:
        """The end of what it printed."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip()
        return ""


class Children:
    """The children of this process."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self.all: list[Child] = []

    async def start(self, name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Child:
        """Run `python -m shoal ARGUMENTS`, its output appended to `NAME.log`."""
        path = self._logs / f"{name}.log"
        if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        with path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "shoal.cli",
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {}), **child_of_this()},
                start_new_session=True,
            )
        child = Child(name, process, path)
        self.all.append(child)
        return child

    async def end_all(self, grace_s: float = TERM_GRACE_S) -> None:
        """Ask all to end, wait, kill what is left, reap."""
        for child in self.all:
            if child.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.terminate()
        await self.wait_all(grace_s)

    async def wait_all(self, grace_s: float) -> None:
        """Wait until all have ended by themselves; kill what has not after `grace_s`."""
        waits = [asyncio.create_task(child.process.wait()) for child in self.all]
        if waits:
            _, late = await asyncio.wait(waits, timeout=grace_s)
            for child in self.all:
                if child.process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        child.process.kill()
            if late:
                await asyncio.wait(late, timeout=5.0)
