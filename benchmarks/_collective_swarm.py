"""The processes of a collective: an issuer (`shoal agent host`), routers (`shoal router`), nodes, and a node in this
process that poses problems. Every one of them can be killed; none outlives the context."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from _collective_node import Question, Setup, accounts, enter, everybody
from shoal.agents.collective.node import CollectiveNode
from shoal.coordinator.processes import child_of_this
from shoal.errors import TaskError
from shoal.fabric.ticket import RouterAddress, Ticket

NODES = 16
LISTENS_S = 0.1
LEASE_S = 6.0
READY_S = 240.0
ANSWER_S = 120.0
LINE_BYTES = 2**20

Process = asyncio.subprocess.Process


class NodeProcess:
    """One node: answers questions, and can be killed."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._asked = 0
        self._reader: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Wait until it sees everybody."""
        assert self._process.stdout is not None
        if await self._process.stdout.readline() != b"ready\n":
            raise TaskError("a node of the collective ended at its start.")
        self._reader = asyncio.create_task(self._read(self._process.stdout))

    async def ask(self, within_s: float, **question: Any) -> dict[str, Any]:
        """Its answer; raises `TaskError` where none comes."""
        assert self._process.stdin is not None
        self._asked += 1
        number = self._asked
        done = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(msgspec.json.encode(Question(id=number, **question)) + b"\n")
        try:
            async with asyncio.timeout(within_s):
                return await done
        except TimeoutError:
            raise TaskError("a node of the collective does not answer.") from None
        finally:
            del self._waiting[number]

    async def _read(self, stdout: asyncio.StreamReader) -> None:
        while line := await stdout.readline():
            answer = json.loads(line)
            if (done := self._waiting.get(answer["id"])) is not None and not done.done():
                done.set_result(answer)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def kill(self) -> None:
        """As a power cut would."""
        kill(self._process)

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)


class Swarm:
    """What is running."""

    def __init__(self, poser: CollectiveNode, poser_accounts: Callable[[], dict[str, Any]]) -> None:
        self.poser = poser
        self.poser_accounts = poser_accounts
        self.nodes: list[NodeProcess] = []
        self.issuer: Process
        self.routers: list[Process] = []


def kill(process: Process) -> None:
    """End a process as a power cut would."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def setup_of(seed: bytes, ticket: str, step_s: float, accuracy: float, others: int) -> Setup:
    """What one node is told."""
    return Setup(
        seed=seed.hex(),
        ticket=ticket,
        step_s=step_s,
        accuracy=accuracy,
        others=others,
        listens_s=LISTENS_S,
        lease_s=LEASE_S,
    )


@asynccontextmanager
async def swarm(
    *,
    step_s: float,
    accuracy: float,
    seed: int,
    num_nodes: int = NODES,
    num_routers: int = 0,
    seen_from: Callable[[Ticket, int], Ticket] = lambda ticket, number: ticket,
    router_lines: Sequence[str] = (),
) -> AsyncIterator[Swarm]:
    """An issuer, routers, and nodes that all see each other.

    Args:
        num_routers: started here; with them nodes reach each other through routers alone.
        seen_from: the ticket as node `number` has it, -1: the poser in this process.
        router_lines: routers that run already, as the issuer sees them.
    """
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-collective-")))
        routers = [await start_router(stack, folder / f"router-{n}") for n in range(num_routers)]
        lines = [*router_lines, *(line for _, line, _ in routers)]
        issuer, told = await started(
            stack, "agent", "host", "bench", "--json", "--folder", str(folder / "bench"), *given("--routers", lines)
        )
        ticket = Ticket.decode(told["ticket"])
        own = setup_of(secrets.token_bytes(32), seen_from(ticket, -1).encode(), step_s, accuracy, num_nodes)
        processes = []
        for number in range(num_nodes):
            process = await _node(stack)
            key = Random(f"{seed} {number}").randbytes(32)
            text = seen_from(ticket, number).encode()
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(setup_of(key, text, step_s, accuracy, num_nodes)) + b"\n")
            processes.append(process)
        poser, expert = await enter(stack, own, "poser", asks_only=True)
        found = Swarm(poser, lambda: accounts(poser, expert))
        found.issuer, found.routers = issuer, [process for process, _, _ in routers]
        found.nodes = [NodeProcess(process) for process in processes]
        for node in found.nodes:
            stack.push_async_callback(node.close)
        try:
            async with asyncio.timeout(READY_S):
                await everybody(poser, num_nodes)
                for node in found.nodes:
                    await node.ready()
        except TimeoutError:
            raise TaskError(f"the nodes did not find each other within {READY_S:.0f} s.") from None
        yield found


async def start_router(stack: AsyncExitStack, folder: Path) -> tuple[Process, str, int]:
    """A router on loopback: its process, line and port."""
    process, told = await started(
        stack, "router", "--host", "127.0.0.1", "--port", "0", "--json", "--identity", str(folder)
    )
    return process, told["line"], told["port"]


async def started(stack: AsyncExitStack, *words: str) -> tuple[Process, dict[str, Any]]:
    """A `shoal` command that goes on, and the JSON object that it printed."""
    tied = [program, "--pdeathsig", "KILL", "--"] if (program := shutil.which("setpriv")) else []
    process = await asyncio.create_subprocess_exec(
        *tied,
        sys.executable,
        "-m",
        "shoal.cli",
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    stack.push_async_callback(_end, process)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(READY_S):
            line = await process.stdout.readline()
    except TimeoutError:
        line = b""
    if not line:
        raise TaskError(f"shoal {' '.join(words[:2])} did not start.")
    return process, json.loads(line)


def given(option: str, values: Sequence[str]) -> list[str]:
    """An option once for each value."""
    return [word for value in values for word in (option, value)]


def elsewhere(line: str, host: str, port: int) -> RouterAddress:
    """A router as somebody sees it to whom it is at another address."""
    return msgspec.structs.replace(RouterAddress.decode(line), hosts=(f"{host}:{port}",))


async def _node(stack: AsyncExitStack) -> Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import _collective_node; _collective_node.main()",
        cwd=Path(__file__).parent,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_BYTES,
        env={**os.environ, **child_of_this()},
    )
    stack.push_async_callback(_end, process)
    return process


async def _end(process: Process) -> None:
    """In order where it listens to its input, at once otherwise."""
    with contextlib.suppress(ProcessLookupError):
        if process.stdin is not None:
            process.stdin.close()
        else:
            process.terminate()
    try:
        async with asyncio.timeout(10.0):
            await process.wait()
    except TimeoutError:
        kill(process)
        await process.wait()
