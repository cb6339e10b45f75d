"""Processes that stand beside a loop's stage: kept alive while it lasts, ended with it.

Invariants: whatever happens, every process has ended when the context closes; one that dies is started again a few
times, then left out, and the stage goes on; a process that does one thing and fails fails the stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from shoal.coordinator.processes import Child, Children
from shoal.errors import RunError

MAX_RESTARTS = 5
PAUSE_S = 2.0

GRACE_S = 15.0
"""A process that was told to end has so long."""


class Services:
    """`async with Services(logs, …) as services: services.keep("server", ["serve", …])`.

    Args:
        logs: a folder for `NAME.log`.
        restarted: told when one died and is started again.
    """

    def __init__(self, logs: Path, say: Callable[[str], None], restarted: Callable[[str], None]) -> None:
        self._children = Children(logs)
        self._logs = logs
        self._say = say
        self._restarted = restarted
        self._keepers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._keepers:
            task.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await self._children.end_all(GRACE_S)

    def keep(self, name: str, arguments: Sequence[str], *, nice: int = 0) -> None:
        """Start `shoal ARGUMENTS`, and again when it dies."""
        self._keepers.append(asyncio.create_task(self._keep(name, arguments, nice)))

    async def finish(self, name: str, arguments: Sequence[str], *, nice: int = 0) -> None:
        """Run `shoal ARGUMENTS` to its end.

        Raises:
            RunError: it failed.
        """
        child = await self._start(name, arguments, nice)
        code = await child.process.wait()
        self._children.all.remove(child)
        if code:
            said = child.tail.splitlines()[-1] if child.tail else "it printed nothing"
            raise RunError(f"process '{name}' ended with exit code {code}: {said}", f"Its log is {child.log}.")

    async def _keep(self, name: str, arguments: Sequence[str], nice: int) -> None:
        for number in range(MAX_RESTARTS + 1):
            child = await self._start(name, arguments, nice)
            code = await child.process.wait()
            self._children.all.remove(child)
            said = child.tail.splitlines()[-1] if child.tail else "it printed nothing"
            self._say(f"process '{name}' ended with exit code {code}: {said}")
            if number < MAX_RESTARTS:
                self._restarted(name)
                await asyncio.sleep(PAUSE_S)
        self._say(f"process '{name}' keeps ending and is left out from here on; its log is in {self._logs}")

    async def _start(self, name: str, arguments: Sequence[str], nice: int) -> Child:
        # A process that shares its cores with others is fastest with one thread.
        child = await self._children.start(name, arguments, {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
        if nice and sys.platform != "win32":
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, child.process.pid, os.getpriority(os.PRIO_PROCESS, 0) + nice)
        return child


def num_processes() -> int:
    """This process and its children, as the system counts them; 0 where it does not say."""
    own = os.getpid()
    try:
        return 1 + len(Path(f"/proc/{own}/task/{own}/children").read_text().split())
    except OSError:
        return 0
