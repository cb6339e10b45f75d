"""Warm workers: sandboxes that have started and imported before a job arrives.

A Python worker does each job in a fresh fork of its warmed-up interpreter, and everything that the job started or
wrote is gone before the next one. A Deno worker does one job and is replaced in the background. Either way a job
finds nothing of an earlier one.

Invariants: there are never more than `size` workers; a worker has one job at a time; one that did not come back
clean is replaced; closing the pool ends them all, those that are just being started included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any

from shoal.errors import ShoalError
from shoal.sandbox.cell import Cell
from shoal.sandbox.errors import SandboxError
from shoal.sandbox.job import Job, Limits, Result, Setup

JOBS_PER_WORKER = 500
"""A Python worker is replaced after as many jobs, so that nothing can pile up in it."""

WAIT_TIMEOUT_S = 300.0


class WorkerPool:
    """Warm sandboxes of one setup; `async with WorkerPool(...) as pool: await pool.run(job)`.

    Args:
        size: how many workers; each holds a preloaded interpreter.
        wait_timeout_s: how long a job waits for a free worker.
    """

    def __init__(
        self,
        setup: Setup,
        limits: Limits | None = None,
        *,
        size: int = 2,
        jobs_per_worker: int = JOBS_PER_WORKER,
        wait_timeout_s: float = WAIT_TIMEOUT_S,
    ) -> None:
        self.setup = setup
        self.limits = limits or Limits()
        self.size = size
        self.started = 0
        """Workers started so far, the replaced ones included."""
        self._jobs_per_worker = jobs_per_worker
        self._wait_timeout_s = wait_timeout_s
        self._free: asyncio.Queue[tuple[Cell, int] | ShoalError] = asyncio.Queue(maxsize=size)
        self._tasks: set[asyncio.Task[None]] = set()
        self._cells: set[Cell] = set()
        self._closed = False

    async def __aenter__(self) -> WorkerPool:
        """Starts the workers one after another, so that the first failure is told at once.

        Raises:
            SandboxUnavailable, SandboxError: as `Sandbox.run`.
        """
        try:
            for _ in range(self.size):
                self._free.put_nowait((await self._start(), 0))
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _start(self) -> Cell:
        cell = await Cell.start(self.setup, self.limits, reusable=True)
        self.started += 1
        self._cells.add(cell)
        return cell

    async def _end(self, cell: Cell) -> None:
        await cell.close()
        self._cells.discard(cell)

    async def run(self, job: Job) -> Result:
        """Does the job on the next free worker.

        Raises:
            SandboxError: no worker became free in time, or the pool is closed.
            SandboxUnavailable: a worker could not be replaced.
        """
        if self._closed:
            raise SandboxError("The pool of sandboxes is closed.", "Open a new one.")
        try:
            async with asyncio.timeout(self._wait_timeout_s):
                free = await self._free.get()
        except TimeoutError:
            raise SandboxError(
                f"No warm sandbox became free within {self._wait_timeout_s:.0f} s.",
                f"Start more than {self.size}, or send fewer jobs at once.",
            ) from None
        if isinstance(free, ShoalError):
            self._own(self._replace())  # Whoever comes next may be luckier.
            raise free
        cell, num_done = free
        try:
            result = await cell.run(job)
        except BaseException:
            self._own(self._give_back(cell, None))
            raise
        self._own(self._give_back(cell, num_done + 1))
        return result

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _give_back(self, cell: Cell, num_done: int | None) -> None:
        """Behind the job, so that its caller need not wait for the cleaning or for a new start."""
        clean = False
        try:
            if num_done is not None and num_done < self._jobs_per_worker:
                clean = await cell.idle()
        finally:
            if clean and not self._closed:
                self._free.put_nowait((cell, num_done or 0))
            else:
                await self._end(cell)
        if not clean and not self._closed:
            await self._replace()

    async def _replace(self) -> None:
        try:
            cell = await self._start()
        except ShoalError as error:
            self._free.put_nowait(error)
            return
        if self._closed:
            await self._end(cell)
        else:
            self._free.put_nowait((cell, 0))

    async def close(self) -> None:
        """Ends all workers; a job that is still running ends with the reason `killed`."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for cell in list(self._cells):
            await self._end(cell)
