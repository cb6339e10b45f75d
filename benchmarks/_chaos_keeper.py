"""Keeps one process going as a service manager would: what ends, of itself or killed, is started again.

Invariant: `end` returns with the process reaped, and nothing is started after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable

from _chaos_checks import Ended
from shoal.errors import RunError

RESTART_S = 1.0
"""What ended by itself is started again after so long."""

MAX_STARTS = 25
"""Of one part in one run; a part that needs more does not recover."""

END_S = 45.0
"""A process that is told to end has ended by then."""

Launch = Callable[[], Awaitable[Process]]
"""Starts a process."""


class Keeper:
    """Keeps one part going, from `start` until it is told to end.

    Args:
        launch: starts its process.
        max_starts: it is given up after so many.
    """

    def __init__(self, name: str, launch: Launch, max_starts: int = MAX_STARTS) -> None:
        self.name = name
        self.process: Process | None = None
        self.starts_s: list[float] = []
        self.exits: list[tuple[float, int]] = []
        """When it ended, and how, each time that nobody had told it to."""
        self.may_run = asyncio.Event()
        self.may_run.set()
        self._launch, self._max_starts = launch, max_starts
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep(), name=self.name)

    async def _keep(self) -> None:
        while True:
            await self.may_run.wait()
            if len(self.starts_s) == self._max_starts:
                raise RunError(f"{self.name} was started {self._max_starts} times.")
            self.process = await self._launch()
            self.starts_s.append(time.monotonic())
            code = await self.process.wait()
            self.exits.append((time.monotonic(), code))
            await asyncio.sleep(RESTART_S if self.may_run.is_set() else 0.0)

    @property
    def problem(self) -> str:
        """Why it is not kept going any more; empty if it is."""
        task = self._task
        if task is None or not task.done() or task.cancelled():
            return ""
        return f"{self.name} is not started again: {task.exception()}"

    @property
    def pid(self) -> int | None:
        """Of the process, while it lives."""
        return self.process.pid if self.process is not None and self.process.returncode is None else None

    def send(self, number: signal.Signals) -> None:
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def stop(self) -> None:
        """Start it no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def end(self) -> Ended:
        """Start it no more, tell it to end, and see it end."""
        await self.stop()
        began_s = time.monotonic()
        if self.process is None or self.process.returncode is not None:
            return Ended(self.name, 0.0, 0)
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        try:
            code: int | None = await asyncio.wait_for(self.process.wait(), END_S)
        except TimeoutError:
            code = None
            self.send(signal.SIGKILL)
            await self.process.wait()
        return Ended(self.name, time.monotonic() - began_s, code)
