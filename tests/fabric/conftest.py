"""Nodes to test with: real ones, in this process and in others."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket

SECRET = b"0123456789abcdef"
Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts `peer.py` in a process; whatever is left at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        import shoal

        env = os.environ | {"PYTHONPATH": str(Path(shoal.__file__).parents[1])}
        command = [*prefix, sys.executable, str(Path(__file__).with_name("peer.py")), *args]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(params=["tcp", "tls"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Fabric, Fabric]]:
    """A listener and a node connected to it, over plain TCP and over TLS."""
    async with (
        await Fabric.listen(Identity.generate(), tls=request.param == "tls") as listener,
        await Fabric.connect(Identity.generate(), listener.ticket("a run", SECRET)) as node,
    ):
        yield listener, node


@pytest.fixture
async def listener() -> AsyncIterator[Fabric]:
    """A listener on loopback."""
    async with await Fabric.listen(Identity.generate()) as fabric:
        yield fabric


@pytest.fixture
async def node(listener: Fabric) -> AsyncIterator[Fabric]:
    """A node connected to `listener`."""
    async with await Fabric.connect(Identity.generate(), listener.ticket("a run", SECRET)) as fabric:
        yield fabric


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], Awaitable[None]]:
    """Waits until a condition holds; fails if it does not within ten seconds."""

    async def wait(condition: Callable[[], object]) -> None:
        for _ in range(500):
            if condition():
                return
            await asyncio.sleep(0.02)
        pytest.fail("what should have happened did not")

    return wait


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line that a peer prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def remote(spawn: Spawn) -> tuple[subprocess.Popen[str], Ticket]:
    """A listener in another process, and its ticket."""
    process = spawn("listen")
    return process, Ticket.decode(read_line(process))
