"""The way in: ask whether sandboxes work here, and run a program in one.

Invariant: a call to `run` returns a result within the program's time, a sandbox's start and the wait for a free
place, whatever the program does; a program's misdeed is its result's reason, and only what the user can act on is
an error.
"""

from __future__ import annotations

import asyncio
import os

from shoal.errors import ShoalError
from shoal.sandbox.availability import Availability, Missing, missing_programs
from shoal.sandbox.cell import Cell
from shoal.sandbox.errors import SandboxError
from shoal.sandbox.job import Job, Limits, Program, Result, Setup

DEFAULT_MAX_JOBS = max(4, 2 * (os.cpu_count() or 1))
QUEUE_TIMEOUT_S = 600.0


class Sandbox:
    """Runs programs, each in a fresh sandbox of its own.

    Args:
        max_jobs: how many may run at once; others wait their turn, for `queue_timeout_s` at most.
    """

    def __init__(self, max_jobs: int = DEFAULT_MAX_JOBS, *, queue_timeout_s: float = QUEUE_TIMEOUT_S) -> None:
        self._places = asyncio.Semaphore(max_jobs)
        self._queue_timeout_s = queue_timeout_s

    @staticmethod
    async def available() -> Availability:
        """What works here, found out by running an empty program."""
        missing = dict(await asyncio.to_thread(missing_programs))
        works = "bwrap" not in missing and "processor" not in missing
        if works:
            try:
                result = await Sandbox().run(Program(Job(source="")), Limits(wall_s=30.0))
                if result.reason != "ok":
                    words = result.stderr.decode("utf-8", "replace").strip()
                    raise SandboxError(f"An empty program ended with {result.reason}: {words}.")
            except ShoalError as error:
                works = False
                missing["trial"] = Missing(error.problem, error.remedy)
        return Availability(python=works, deno=works and "deno" not in missing, missing=tuple(missing.values()))

    async def run(self, program: Program, limits: Limits | None = None) -> Result:
        """Builds a sandbox, runs the program, tears it down.

        Raises:
            SandboxUnavailable: the machine lacks what is needed.
            SandboxError: something of the setup is missing, or no place became free in time.
        """
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await self._places.acquire()
        except TimeoutError:
            raise SandboxError(
                f"No sandbox became free within {self._queue_timeout_s:.0f} s.", "Allow more jobs at once."
            ) from None
        try:
            return await run_once(program.setup, program.job, limits or Limits())
        finally:
            self._places.release()


async def run_once(setup: Setup, job: Job, limits: Limits) -> Result:
    """One job in a sandbox of its own, without a bound on how many there are."""
    cell = await Cell.start(setup, limits)
    try:
        return await cell.run(job)
    finally:
        await cell.close()
