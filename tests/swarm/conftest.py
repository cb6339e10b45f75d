"""Swarms to test with: real fabrics on loopback, in this process and in others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from swarm_nodes import ROOT

from shoal.fabric.fabric import Fabric

Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
async def listener() -> AsyncIterator[Fabric]:
    """The root's fabric, to which the others connect."""
    async with await Fabric.listen(ROOT) as fabric:
        yield fabric


@pytest.fixture
async def cable(listener: Fabric) -> AsyncIterator[Cable]:
    """A way to the listener that can be cut."""
    port = int(listener.endpoints[0].rpartition(":")[2])
    made = Cable(port)
    await made.mend()
    yield made
    await made.cut()


class Cable:
    """A TCP relay to a port of this machine: cut, it breaks all connections and takes no new ones."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            there = await asyncio.open_connection("127.0.0.1", self._to)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(_pump(reader, there[1]))
                    tasks.create_task(_pump(there[0], writer))
            finally:
                there[1].transport.abort()
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    raise ConnectionResetError


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], Awaitable[None]]:
    """Waits until a condition holds; fails if it does not within twenty seconds."""

    async def wait(condition: Callable[[], object]) -> None:
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.02)
        pytest.fail("what should have happened did not")

    return wait


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts `swarm_peer.py` in a process; whatever is left at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("swarm_peer.py")), *args]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
async def stack(listener: Fabric) -> AsyncIterator[contextlib.AsyncExitStack]:
    """Where a test's nodes are opened; closed, last first, at its end and before the listener they need."""
    async with contextlib.AsyncExitStack() as opened:
        yield opened
