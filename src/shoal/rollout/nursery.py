"""Agent programs, started for one episode each: the host's side of `nursery_main`.

Invariants: `run` returns when the program and all that it started have ended; a program that is not waited for any more
is stopped; a nursery that has died fails those who wait and is started again for the next; `close` leaves no process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError, TaskError

log = logging.getLogger("shoal.rollout")

PROGRAM = Path(__file__).with_name("nursery_main.py")

START_TIMEOUT_S = 120.0
"""Importing what is to be preloaded may take this long on a busy machine."""

END_TIMEOUT_S = 10.0

LATE_S = 10.0
"""Beyond a program's deadline: then the nursery itself is stuck."""

MAX_LINE_BYTES = 16 * 2**20
"""Of an answer: the output of one program, escaped."""


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    exit_code: int
    """Negative: the signal that killed it."""
    why: str
    """Why it was killed: `deadline`, `output`, `stopped`; empty where it ended by itself."""
    stdout: str
    stderr: str
    """The end of it."""

    @property
    def complaint(self) -> str:
        """The last line that it wrote to standard error."""
        lines = self.stderr.strip().splitlines()
        return lines[-1][-300:] if lines else "it said nothing"


class Nursery:
    """Runs one environment's program.

    Args:
        command: the program and its arguments.
        preload: modules for a Python program; see `nursery_main`.
        folder: where programs run; empty is here.
    """

    def __init__(self, command: Sequence[str], *, preload: Sequence[str] = (), folder: str = "") -> None:
        self._command = list(command)
        self._preload = list(preload)
        self._folder = folder
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[Ended]] = {}
        self._starting = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None

    async def run(self, environment: Mapping[str, str], task: str, *, deadline_s: float, output_bytes: int) -> Ended:
        """Run the program once.

        Args:
            environment: all of its variables.
            task: its standard input.

        Raises:
            TaskError: no program can be started.
            ShoalError: the process that it was started from has died.
        """
        process = await self._started()
        number = next(self._ids)
        job = {
            "id": number,
            "argv": self._command,
            "env": dict(environment),
            "cwd": self._folder,
            "stdin": task,
            "deadline_s": deadline_s,
            "output_bytes": output_bytes,
        }
        ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._waiting[number] = ended
        try:
            await self._tell(process, job)
            async with asyncio.timeout(deadline_s + LATE_S):
                return await ended
        except TimeoutError:
            raise ShoalError("the process that starts agent programs does not answer.") from None
        finally:
            self._waiting.pop(number, None)
            if not ended.done() or ended.cancelled():
                with contextlib.suppress(ShoalError):
                    await self._tell(process, {"stop": number})

    async def close(self) -> None:
        """End it and everything it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _started(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is not None and self._process.returncode is None:
                return self._process
            interpreter = self._command[0] if self._preload else sys.executable
            try:
                process = await asyncio.create_subprocess_exec(
                    interpreter,
                    str(PROGRAM),
                    json.dumps(self._preload),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=MAX_LINE_BYTES,
                    start_new_session=True,
                    cwd=self._folder or None,
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )
                assert process.stdout is not None
                async with asyncio.timeout(START_TIMEOUT_S):
                    said = await process.stdout.readline()
            except OSError as error:
                raise TaskError(f"'{interpreter}' cannot be started: {error.strerror}.", "Check command.") from None
            except TimeoutError:
                process.kill()
                raise TaskError(f"the modules to preload were not imported in {START_TIMEOUT_S:.0f} s.") from None
            if not said:
                await process.wait()
                names = ", ".join(self._preload) or "nothing"
                raise TaskError(f"'{interpreter}' could not import {names}.", "See the worker's log; check preload.")
            self._process = process
            self._reading = asyncio.create_task(self._read(process))
            return process

    async def _tell(self, process: asyncio.subprocess.Process, message: dict[str, Any]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            await process.stdin.drain()
        except (ConnectionError, RuntimeError):
            raise ShoalError("the process that starts agent programs has died.") from None

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            told = json.loads(line)
            ended = self._waiting.get(told["id"])
            if ended is not None and not ended.done():
                ended.set_result(Ended(told["exit"], told["why"], told["stdout"], told["stderr"]))
        await process.wait()
        if self._process is process:
            log.warning("the process that starts agent programs ended with %s", process.returncode)
            for ended in self._waiting.values():
                if not ended.done():
                    ended.set_exception(ShoalError("the process that starts agent programs has died."))
