"""How soon a swarm agrees again after a partition, and what keeping its roster costs.

Light nodes (all but the model) connected to one listener on loopback: half of them in this process, half in another
and over a relay that is cut: connections break, new ones are refused. While they are apart every node changes its
record, so that each side has news for the other. Time runs from the mend until all rosters hold the same records of
all nodes; `links_s` is the part of it that passes until every node sees every other's sign of life, before which
nobody can be asked.

All nodes share this machine's cores and two interpreters, so the figures are upper bounds for nodes that have a
machine each; bytes are of TCP payload at the relay, both ways, divided by its nodes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from msgspec.structs import replace

from shoal import PROTOCOL_VERSION
from shoal.errors import TaskError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.swarm.grants import GrantBook, issue
from shoal.swarm.member import Member, profile

RUN = "converge"
CUT_S = 6.0
"""Long enough for every node to miss the other side (2 s lease) and for the dialling to slow down."""

PATIENCE_S = 60.0
IDLE_S = 20.0


class Relay:
    """A TCP relay on loopback that can be cut and counts bytes."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.num_bytes = 0

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._pump(reader, far_writer))
                    tasks.create_task(self._pump(far_reader, writer))
            finally:
                far_writer.transport.abort()
        except (OSError, ExceptionGroup):
            pass  # one side has ended; so does the other
        finally:
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.num_bytes += len(data)
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


class Near:
    """The nodes of this process."""

    def __init__(self, members: list[Member], size: int) -> None:
        self._members = list(members)
        self._size = size

    async def update(self, number: int) -> None:
        """Every node changes its record."""
        for member in self._members:
            member.update(soon=True, region=str(number))

    async def linked(self) -> bool:
        """Whether every node here sees every other's sign of life."""
        return all(len(member.gossip.present) == self._size - 1 for member in self._members)

    async def agree(self, number: int) -> bool:
        """Whether every node here holds all nodes' records of this round."""
        for at, member in enumerate(self._members):
            seen = member.nodes()
            if len(seen) < self._size or any(node.record.region != str(number) for node in seen):
                # Asked first next time: the asking costs the very time that is measured.
                self._members.insert(0, self._members.pop(at))
                return False
        return True


class Far:
    """The nodes of another process, asked line by line: `["agree", 3]` is answered by `true`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    async def ask(self, *question: Any) -> Any:
        self._stdin.write(json.dumps(question).encode() + b"\n")
        async with asyncio.timeout(PATIENCE_S):
            answer = await self._stdout.readline()
        if not answer:
            raise TaskError("the process of the far nodes has ended.", "Try again on a less busy machine.")
        return json.loads(answer)

    async def update(self, number: int) -> None:
        await self.ask("update", number)

    async def linked(self) -> bool:
        return bool(await self.ask("linked"))

    async def agree(self, number: int) -> bool:
        return bool(await self.ask("agree", number))


@asynccontextmanager
async def _far(ticket: Ticket, seed: bytes, nodes: int, size: int) -> AsyncIterator[Far]:
    command = [sys.executable, __file__, "--far", ticket.encode(), str(nodes), str(size)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    far = Far(process)
    try:
        await far.ask(seed.hex())
        yield far
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _be_far(ticket: Ticket, nodes: int, size: int) -> None:
    """The other process: as many nodes as asked for, until its input ends."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    root = Identity(bytes.fromhex(json.loads(await lines.readline())[0]))
    async with AsyncExitStack() as stack:
        members = [await _enter(stack, ticket, Identity.generate(), root) for _ in range(nodes)]
        near = Near(members, size)
        verbs: dict[str, Callable[..., Awaitable[Any]]] = {
            "update": near.update,
            "linked": near.linked,
            "agree": near.agree,
        }
        print("true", flush=True)
        while line := await lines.readline():
            verb, *arguments = json.loads(line)
            print(json.dumps(await verbs[verb](*arguments)), flush=True)


async def measure(nodes: int = 64, *, rounds: int = 3) -> dict[str, Any]:
    """Seconds to converge after `rounds` partitions, and traffic at rest.

    Raises:
        TaskError: the swarm did not agree within a minute.
    """
    async with AsyncExitStack() as stack:
        seed = secrets.token_bytes(32)
        root = Identity(seed)
        listener = await stack.enter_async_context(await Fabric.listen(root))
        relay = Relay(int(listener.endpoints[0].rpartition(":")[2]))
        await relay.mend()
        stack.push_async_callback(relay.cut)
        ticket = listener.ticket(RUN, b"0123456789abcdef")
        over_relay = replace(ticket, endpoints=(f"tcp/127.0.0.1:{relay.port}",))
        started = time.monotonic()
        members = [await _enter(stack, listener, root, root)]
        far = await stack.enter_async_context(_far(over_relay, seed, nodes // 2, nodes))
        for _ in range(nodes - 1 - nodes // 2):
            members.append(await _enter(stack, ticket, Identity.generate(), root))
        sides = (Near(members, nodes), far)
        await _until(lambda: _all(side.agree(0) for side in sides))
        join_s = time.monotonic() - started
        before, cpu_before = relay.num_bytes, time.process_time()
        await asyncio.sleep(IDLE_S)
        rate = (relay.num_bytes - before) / IDLE_S / (nodes // 2)
        cpu = (time.process_time() - cpu_before) / IDLE_S / len(members)
        healed = [await _partition(sides, relay, number) for number in range(1, rounds + 1)]
    return {
        "nodes": nodes,
        "join_s": round(join_s, 2),
        "converge_s": round(max(total for _, total in healed), 2),
        "converge_median_s": round(statistics.median(total for _, total in healed), 2),
        "links_s": round(statistics.median(links for links, _ in healed), 2),
        "roster_bytes_per_s": round(rate),
        "roster_cpu_share": round(cpu, 5),
        "protocol": PROTOCOL_VERSION,
    }


async def _enter(stack: AsyncExitStack, where: Fabric | Ticket, identity: Identity, root: Identity) -> Member:
    fabric = where
    if isinstance(fabric, Ticket):
        fabric = await stack.enter_async_context(await Fabric.connect(identity, fabric, PATIENCE_S))
    now, grants = time.time(), GrantBook(RUN, root.public_key)
    if identity is not root:
        grants.merge_grant(issue(root, RUN, identity.public_key, ["worker"], now, 3600.0), now)
    record = profile(fabric, RUN, () if identity is root else ("worker",), name="light", region="0")
    return await stack.enter_async_context(Member(fabric, RUN, root.public_key, record, grants=grants))


async def _partition(sides: tuple[Near, Far], relay: Relay, number: int) -> tuple[float, float]:
    """Seconds from the mend until all see all, and until all hold the same."""
    await relay.cut()
    await asyncio.sleep(CUT_S / 2)
    for side in sides:
        await side.update(number)
    await asyncio.sleep(CUT_S / 2)
    await relay.mend()
    mended = time.monotonic()
    await _until(lambda: _all(side.linked() for side in sides))
    links_s = time.monotonic() - mended
    await _until(lambda: _all(side.agree(number) for side in sides))
    return links_s, time.monotonic() - mended


async def _all(conditions: Iterable[Awaitable[bool]]) -> bool:
    return all(await asyncio.gather(*conditions))


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await condition():
        if time.monotonic() > deadline:
            raise TaskError("the swarm did not agree within a minute.", "Try again on a less busy machine.")
        await asyncio.sleep(0.02)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--far", nargs=3, metavar=("TICKET", "NODES", "SIZE"), help="be the other process")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        if options.far:
            asyncio.run(_be_far(Ticket.decode(options.far[0]), int(options.far[1]), int(options.far[2])))
        else:
            print(json.dumps(asyncio.run(measure(options.nodes))))
