"""What both kinds of lab offer: processes at nodes, cuts, the script, statistics.

A lab is an asynchronous context; leaving it ends every process started through it. Cuts take effect before the call
returns. Times of the script count from `play`, so that what is to be cut can be set up first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from abc import ABC, abstractmethod
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from shoal.errors import NetworkError
from shoal.lab.cuts import Cuts
from shoal.lab.network import Cut, Event, Heal, Isolate, Network, Partition
from shoal.lab.statistics import Statistics

GRACE_S = 3.0
"""A process that is asked to end has this long before it is killed."""

STREAM_LIMIT_BYTES = 16 * 2**20
"""Longest line of a process's output that can be read by `readline`."""


class Lab(ABC):
    """A running network.

    Args:
        network: its description.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.history: list[tuple[float, Event]] = []
        """Every event so far with its time on `time.monotonic`."""
        self._cuts = Cuts(network)
        self._processes: list[Process] = []
        self._script: asyncio.Task[None] | None = None

    @abstractmethod
    def address(self, node: str) -> str:
        """Where the node's own processes can bind."""

    @abstractmethod
    async def statistics(self) -> Statistics:
        """What was counted so far."""

    @abstractmethod
    def _command(self, node: str, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` at the node."""

    @abstractmethod
    async def _enforce(self, event: Event) -> None:
        """Make `self._cuts` true."""

    @abstractmethod
    async def _open(self) -> None:
        """Build the network."""

    @abstractmethod
    async def _close(self) -> None:
        """Take it down; called once, also after a failed `_open`."""

    async def run(
        self,
        node: str,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int | None = asyncio.subprocess.DEVNULL,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> Process:
        """Start a process at a node, in a session of its own; it ends with the lab at the latest.

        Args:
            env: its whole environment; by default ours.
            stdin, stdout, stderr: as for `asyncio.create_subprocess_exec`.

        Raises:
            ConfigError: there is no such node.
        """
        self.network.index(node)
        command = self._command(node, [str(part) for part in argv])
        process = await asyncio.create_subprocess_exec(
            *command,
            env=env,
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            limit=STREAM_LIMIT_BYTES,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    async def apply(self, event: Event) -> None:
        """Let an event happen now; its `at_s` is not looked at.

        Raises:
            ConfigError: it names a node that is not there.
        """
        self._cuts.apply(event)
        await self._enforce(event)
        self.history.append((time.monotonic(), event))

    async def cut(self, source: str, target: str, *, one_way: bool = False) -> None:
        """`source` no longer reaches `target`, nor the other way round unless `one_way`."""
        await self.apply(Cut(source=source, target=target, one_way=one_way))

    async def partition(self, *groups: Sequence[str]) -> None:
        """Nodes of different groups no longer reach each other."""
        await self.apply(Partition(groups=tuple(tuple(group) for group in groups)))

    async def isolate(self, node: str) -> None:
        """No packet in or out of the node, and its NAT forgets."""
        await self.apply(Isolate(node=node))

    async def heal(self) -> None:
        """Undo every cut."""
        await self.apply(Heal())

    def play(self) -> asyncio.Task[None]:
        """Start the network's script; the task ends after its last event."""
        assert self._script is None, "the script plays once"
        self._script = asyncio.create_task(self._play(), name="lab script")
        return self._script

    async def _play(self) -> None:
        start_s = time.monotonic()
        for event in sorted(self.network.events, key=lambda event: event.at_s):
            await asyncio.sleep(start_s + event.at_s - time.monotonic())
            await self.apply(event)

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._script is not None:
                self._script.cancel()
                with contextlib.suppress(asyncio.CancelledError, NetworkError):
                    await self._script
            await asyncio.gather(*(_end(process) for process in self._processes))
        finally:
            await self._close()


async def _end(process: Process) -> None:
    """End a process and those of its session, gently first.

    A process that ended by itself is left alone: its number may by now be somebody else's.
    """
    if process.returncode is not None:
        return
    _signal_session(process, signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), GRACE_S)
    except TimeoutError:
        _signal_session(process, signal.SIGKILL)
        await process.wait()
    _signal_session(process, signal.SIGKILL)  # those of its session that would not go


def _signal_session(process: Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
