"""The proxy lab: relays that give TCP connections between local processes the rates and delays of a network.

It needs neither root nor Linux, and is only as true as relays can be: 1. streams, not packets, so no loss, no
duplication, no reordering, no UDP. 2. Only connections made through `relay` are shaped; nothing stops a process from
going past it. 3. A relay accepts at once; what is sent through it waits for the handshake's round trip and for cuts
to heal, so a cut looks like silence, as it does under TCP, but a connection attempt during a cut succeeds at first.
4. Behind a NAT nobody is reached, and that is all of it.

Rates are shared by all flows of a node, here too; they count the bytes of the streams.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from shoal.errors import ConfigError
from shoal.lab.impairment import Shaper, Way
from shoal.lab.lab import Lab
from shoal.lab.network import BYTES_PER_MEGABIT, Event, Impairment, Network, Node
from shoal.lab.statistics import NodeStatistics, Statistics
from shoal.lab.switch import link_statistics, way_statistics

HOST = "127.0.0.1"

CHUNK_S = 0.002
"""A chunk is what the slower link carries in this time..."""

MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 1448, 65536
"""...within these bounds."""

MAX_CATCH_UP_S = 0.02
"""After a stalled reader a link catches up by this much at most."""

MAX_CHUNKS = 256
"""Chunks under way on a connection without a rate."""

CONNECT_WAIT_S = 10.0


@asynccontextmanager
async def proxy_lab(network: Network) -> AsyncIterator[ProxyLab]:
    """A running proxy lab."""
    async with ProxyLab(network) as lab:
        yield lab


@dataclass
class Lane:
    """One direction between two nodes: its links, its way, and a gate that cuts close."""

    up: Shaper
    down: Shaper
    way: Way
    open: asyncio.Event
    cut_chunks: int = 0
    chunk_bytes: int = field(init=False)
    max_chunks: int = field(init=False)

    def __post_init__(self) -> None:
        rates = [link.rate_mbps * BYTES_PER_MEGABIT for link in (self.up, self.down) if link.rate_mbps is not None]
        rate = min(rates, default=0.0)
        fitting = int(rate * CHUNK_S) if rates else MAX_CHUNK_BYTES
        self.chunk_bytes = min(max(fitting, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
        under_way = self.up.queue_bytes + self.down.queue_bytes + rate * self.way.impairment.delay_s
        self.max_chunks = int(under_way / self.chunk_bytes) + 16 if rates else MAX_CHUNKS

    async def pass_gate(self) -> None:
        if not self.open.is_set():
            self.cut_chunks += 1
            await self.open.wait()


class ProxyLab(Lab):
    """See the module."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self._up = {node.name: _link(network, node, node.up_mbps) for node in network.nodes}
        self._down = {node.name: _link(network, node, node.down_mbps) for node in network.nodes}
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._relays: dict[tuple[str, str, str, int], asyncio.Server] = {}
        self._connections: set[asyncio.Task[None]] = set()

    def address(self, node: str) -> str:
        """Always the loopback address: nodes differ by their ports."""
        self.network.index(node)
        return HOST

    async def relay(self, source: str, target: str, port: int, host: str = HOST) -> tuple[str, int]:
        """Where processes of `source` find what listens at `port` of `target`; the same for the same question.

        Raises:
            ConfigError: there is no such node, or `target` is behind a NAT.
        """
        self.network.index(source)
        if self.network.nodes[self.network.index(target)].nat != "none":
            raise ConfigError(f"{target} is behind a NAT: nobody can connect to it.", "Let it connect outwards.")
        key = (source, target, host, port)
        if key not in self._relays:
            there, back = self._lane(source, target), self._lane(target, source)

            def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = asyncio.create_task(_carry(reader, writer, (host, port), there, back), name="lab relay")
                self._connections.add(task)
                task.add_done_callback(self._connections.discard)

            self._relays[key] = await asyncio.start_server(serve, HOST, 0, limit=there.chunk_bytes)
        bound: tuple[str, int] = self._relays[key].sockets[0].getsockname()[:2]
        return bound

    async def statistics(self) -> Statistics:
        """What was counted so far; packets are chunks."""
        nodes = {
            name: NodeStatistics(up=link_statistics(up), down=link_statistics(self._down[name]))
            for name, up in self._up.items()
        }
        ways = [way_statistics(*key, lane.way, lane.cut_chunks) for key, lane in self._lanes.items()]
        return Statistics(nodes=nodes, ways=ways)

    def _lane(self, source: str, target: str) -> Lane:
        key = (source, target)
        if key not in self._lanes:
            met = self.network.impairment(source, target)
            only = Impairment(delay_s=met.delay_s, jitter_s=met.jitter_s)
            way = Way(only, 0.0, self.network.seed, f"{source}>{target}")
            self._lanes[key] = Lane(self._up[source], self._down[target], way, asyncio.Event())
            self._set_gate(key)
        return self._lanes[key]

    def _set_gate(self, key: tuple[str, str]) -> None:
        gate = self._lanes[key].open
        if key in self._cuts.blocked:
            gate.clear()
        else:
            gate.set()

    def _command(self, node: str, argv: Sequence[str]) -> list[str]:
        # Without namespaces nobody else would end them if we were killed.
        tied = [program, "--pdeathsig", "KILL", "--"] if (program := shutil.which("setpriv")) else []
        return [*tied, *argv]

    async def _enforce(self, event: Event) -> None:
        for key in self._lanes:
            self._set_gate(key)

    async def _open(self) -> None:
        pass

    async def _close(self) -> None:
        for server in self._relays.values():
            server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


def _link(network: Network, node: Node, rate_mbps: float | None) -> Shaper:
    """A shaper whose queue takes at least the largest chunk: here a full queue means to wait, never to drop."""
    return Shaper(rate_mbps, max(network.queue_bytes(node, rate_mbps), MAX_CHUNK_BYTES))


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: tuple[str, int], there: Lane, back: Lane
) -> None:
    """One accepted connection, until both sides have ended or one has failed."""
    ends = [writer]
    try:
        await there.pass_gate()
        await back.pass_gate()
        # The handshake: what the client sends leaves one round trip after it asked for the connection.
        await asyncio.sleep(there.way.impairment.delay_s + back.way.impairment.delay_s)
        async with asyncio.timeout(CONNECT_WAIT_S):
            far_reader, far_writer = await asyncio.open_connection(*address, limit=back.chunk_bytes)
        ends.append(far_writer)
        async with asyncio.TaskGroup() as pumps:
            pumps.create_task(_pump(reader, far_writer, there))
            pumps.create_task(_pump(far_reader, writer, back))
    except* (OSError, TimeoutError):
        for end in ends:
            end.transport.abort()  # the other side sees a reset, as it would without us
    finally:
        for end in ends:
            end.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lane: Lane) -> None:
    """One direction of a connection."""
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(lane.max_chunks)
    async with asyncio.TaskGroup() as halves:
        halves.create_task(_take(reader, lane, under_way))
        halves.create_task(_give(writer, lane, under_way))


async def _take(reader: asyncio.StreamReader, lane: Lane, under_way: asyncio.Queue[tuple[float, bytes]]) -> None:
    """The sender's end: read no faster than the uplink's queue empties."""
    while True:
        data = await reader.read(lane.chunk_bytes)
        await lane.pass_gate()
        departure_s = await _offer(lane.up, len(data), None)
        (arrival_s,) = lane.way.send(departure_s)
        await under_way.put((arrival_s, data))
        if not data:
            return


async def _give(writer: asyncio.StreamWriter, lane: Lane, under_way: asyncio.Queue[tuple[float, bytes]]) -> None:
    """The receiver's end: hand on what has arrived, when the downlink has carried it."""
    while True:
        arrival_s, data = await under_way.get()
        await _sleep_until(arrival_s)
        await lane.pass_gate()
        # The link's clock runs by arrivals, not by when a sleep happened to end: oversleeping costs no rate.
        await _sleep_until(await _offer(lane.down, len(data), arrival_s))
        if not data:
            if writer.can_write_eof():
                writer.write_eof()
            return
        writer.write(data)
        await writer.drain()


async def _offer(link: Shaper, size: int, arrival_s: float | None) -> float:
    """Wait for room in a link's queue, then when the link has carried `size` bytes."""
    while True:
        now_s = time.monotonic()
        at_s = now_s if arrival_s is None else max(arrival_s, now_s - MAX_CATCH_UP_S)
        if link.has_room(size, at_s):
            done_s = link.offer(size, at_s)
            assert done_s is not None
            return done_s
        await asyncio.sleep(CHUNK_S)


async def _sleep_until(time_s: float) -> None:
    wait_s = time_s - time.monotonic()
    if wait_s > 0:
        await asyncio.sleep(wait_s)
