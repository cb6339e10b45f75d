"""The owner's commands: `[capacity] acquire` and `release` get machines and give them back; `on_activate` and `on_park`
tell which priced machines have work, so that one billed by use can be paused while it has none.

Each is a program with its arguments, run without a shell; what it needs to know is in its environment. Invariants: one
of each kind runs at a time; one that takes longer than `hook_timeout_s` is killed with all that it started; a command
that fails is an event and ends nothing; none outlives the run; that a machine is activated and that it is parked
are told in turn, the first of them activated.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence

from shoal.config import Config
from shoal.coordinator.rundir import RunDir

TAIL_CHARS = 500
"""Of what a command that failed has printed."""

MAX_OUTPUT_BYTES = 64 * 2**10
"""Read of what it prints."""


class Hooks:
    """Runs the commands, if there are any."""

    def __init__(self, config: Config, run: RunDir) -> None:
        self._settings = config.capacity
        self._run = run
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._acquired_at = -self._settings.acquire_every_s
        self._released: set[str] = set()
        self._works: set[str] = set()
        """Machines that were told to be active, and not yet to be parked."""
        self._environment = {"SHOAL_RUN": run.name, "SHOAL_TICKET_FILE": str((run.path / "ticket.txt").resolve())}

    def acquire(self, rate: float, missing_rate: float, now: float) -> None:
        """Ask for a machine, unless that was done lately; rates are in rollouts a second."""
        if not self._settings.acquire or now < self._acquired_at + self._settings.acquire_every_s:
            return
        facts = {"SHOAL_RATE": f"{rate:.6g}", "SHOAL_NEEDED_RATE": f"{rate + missing_rate:.6g}"}
        if self._start("acquire", self._settings.acquire, facts):
            self._acquired_at = now

    def release(self, node_id: str, name: str) -> None:
        """Give one back; asked once for each time that it is here."""
        if not self._settings.release or node_id in self._released:
            return
        if self._start("release", self._settings.release, {"SHOAL_NODE": node_id, "SHOAL_NODE_NAME": name}):
            self._released.add(node_id)

    def settle(self, working: Mapping[str, bool], names: Callable[[str], str]) -> None:
        """Tell who has work now and who has not; what cannot be told yet is told when it is asked next.

        Args:
            working: of the machines that are here, whether each is given work.
        """
        for node_id, works in working.items():
            if works == (node_id in self._works):
                continue
            kind = "activate" if works else "park"
            command = self._settings.on_activate if works else self._settings.on_park
            facts = {"SHOAL_NODE": node_id, "SHOAL_NODE_NAME": names(node_id)}
            if not command or self._start(kind, command, facts):
                (self._works.add if works else self._works.discard)(node_id)

    def gone(self, node_id: str) -> None:
        """A machine has left: should it come back, all of it may be told anew."""
        self._released.discard(node_id)
        self._works.discard(node_id)

    async def close(self) -> None:
        """End what still runs."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _start(self, kind: str, command: Sequence[str], facts: Mapping[str, str]) -> bool:
        running = self._tasks.get(kind)
        if running is not None and not running.done():
            return False
        self._tasks[kind] = asyncio.create_task(self._execute(kind, command, facts))
        return True

    async def _execute(self, kind: str, command: Sequence[str], facts: Mapping[str, str]) -> None:
        started = time.monotonic()
        said = b""
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **self._environment, **facts},
                start_new_session=True,
            )
        except OSError as error:
            self._run.event(f"machine.{kind}", ok=False, why=f"{command[0]}: {error.strerror}", **facts)
            return
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._settings.hook_timeout_s):
                while part := await process.stdout.read(4096):
                    said = (said + part)[-MAX_OUTPUT_BYTES:]
                code = await process.wait()
            why = "" if code == 0 else f"exit code {code}: {said.decode(errors='replace').strip()[-TAIL_CHARS:]}"
        except TimeoutError:
            why = f"it took longer than {self._settings.hook_timeout_s:g} s and was killed"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        self._run.event(f"machine.{kind}", ok=not why, why=why, seconds=time.monotonic() - started, **facts)
