"""The proxy lab on loopback: rates, delays, sharing, cuts, resets; nothing left running."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from shoal.errors import ConfigError
from shoal.lab import namespaces
from shoal.lab.network import Network, Node
from shoal.lab.proxy import ProxyLab, proxy_lab

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[int]:
    """A TCP server on loopback; yields its port."""
    listening = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(65536):
        continue
    writer.write(b"got it")
    writer.close()


async def connect(
    lab: ProxyLab, source: str, target: str, port: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*await lab.relay(source, target, port))


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> float:
    """Send and get back; returns the seconds it took."""
    begun = time.monotonic()
    writer.write(data)
    assert await asyncio.wait_for(reader.readexactly(len(data)), 30) == data
    return time.monotonic() - begun


async def test_bytes_come_through_whole_and_delayed() -> None:
    network = Network(nodes=(Node(name="a", delay_ms=20, up_mbps=500), Node(name="b", delay_ms=10)))
    async with server(echo) as port, proxy_lab(network) as lab:
        reader, writer = await connect(lab, "a", "b", port)
        await exchange(reader, writer, b"opened")
        took = [await exchange(reader, writer, b"x") for _ in range(5)]
        assert min(took) >= 0.060
        assert min(took) < 0.060 * 1.5
        await exchange(reader, writer, os.urandom(3_000_000))
        writer.close()
        assert await lab.relay("a", "b", port) == await lab.relay("a", "b", port)


async def test_half_closed_connections_get_their_answer() -> None:
    async with server(swallow) as port, proxy_lab(Network(nodes=(Node(name="a"), Node(name="b")))) as lab:
        reader, writer = await connect(lab, "a", "b", port)
        writer.write(bytes(100_000))
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 20) == b"got it"
        writer.close()


async def upload(lab: ProxyLab, target: str, port: int, num_bytes: int) -> None:
    reader, writer = await connect(lab, "a", target, port)
    writer.write(bytes(num_bytes))
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 30) == b"got it"
    writer.close()


async def test_flows_share_the_uplink_and_fill_it() -> None:
    network = Network(nodes=(Node(name="a", up_mbps=40, delay_ms=5), Node(name="b"), Node(name="c", down_mbps=1000)))
    async with server(swallow) as port, proxy_lab(network) as lab:
        least = 0.0
        for _ in range(3):
            begun = time.monotonic()
            await asyncio.gather(*(upload(lab, target, port, 1_250_000) for target in "bc"))
            took = time.monotonic() - begun
            assert took >= 0.5 * 0.95
            least = min(least or took, took)
            if took < 0.5 * 1.3:
                break
        assert least < 0.5 * 1.3
        counted = await lab.statistics()
        assert counted.nodes["a"].up.bytes >= 2_500_000
        assert counted.nodes["b"].down.bytes >= 1_250_000


async def test_a_slow_downlink_holds_its_rate() -> None:
    network = Network(nodes=(Node(name="a"), Node(name="b", down_mbps=8, queue_bytes=20_000)))
    async with server(swallow) as port, proxy_lab(network) as lab:
        begun = time.monotonic()
        await upload(lab, "b", port, 600_000)
        assert time.monotonic() - begun >= 0.6 * 0.95


async def test_cuts_are_silence_and_heal() -> None:
    network = Network(nodes=(Node(name="a"), Node(name="b")))
    async with server(echo) as port, proxy_lab(network) as lab:
        reader, writer = await connect(lab, "a", "b", port)
        await exchange(reader, writer, b"before")
        await lab.cut("b", "a", one_way=True)
        writer.write(b"during")
        late_reader, late_writer = await connect(lab, "a", "b", port)
        late_writer.write(b"late")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.3)
        await lab.heal()
        assert await asyncio.wait_for(reader.readexactly(6), 20) == b"during"
        assert await asyncio.wait_for(late_reader.readexactly(4), 20) == b"late"
        writer.close()
        late_writer.close()


async def test_nobody_listening_is_a_closed_connection() -> None:
    async with server(echo) as port:
        pass
    async with proxy_lab(Network(nodes=(Node(name="a"), Node(name="b")))) as lab:
        reader, writer = await connect(lab, "a", "b", port)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 20)
        writer.close()


async def test_a_failing_server_fails_its_client_and_no_other() -> None:
    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.transport.abort()

    network = Network(nodes=(Node(name="a"), Node(name="b")))
    async with server(fail) as bad, server(echo) as good, proxy_lab(network) as lab:
        reader, writer = await connect(lab, "a", "b", bad)
        other = await connect(lab, "a", "b", good)
        writer.write(b"x")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 20)
        await exchange(*other, b"fine")
        for end in (writer, other[1]):
            end.close()


async def test_nobody_connects_to_a_node_behind_a_nat() -> None:
    async with proxy_lab(Network(nodes=(Node(name="a"), Node(name="b", nat="cone")))) as lab:
        with pytest.raises(ConfigError, match="behind a NAT"):
            await lab.relay("a", "b", 1)
        with pytest.raises(ConfigError, match="no node 'z'"):
            await lab.relay("a", "z", 1)


async def test_leaving_ends_processes_and_connections() -> None:
    network = Network(nodes=(Node(name="a"), Node(name="b")))
    async with server(echo) as port:
        async with proxy_lab(network) as lab:
            code = "import signal,time;signal.signal(15,signal.SIG_IGN);print(1,flush=True);time.sleep(1000)"
            process = await lab.run("a", [sys.executable, "-c", code], stdout=asyncio.subprocess.PIPE)
            assert process.stdout is not None
            await process.stdout.readline()
            reader, writer = await connect(lab, "a", "b", port)
            await exchange(reader, writer, b"open")
        assert process.returncode == -signal.SIGKILL
        with suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(1), 20) == b""
        writer.close()


HOLDER = """
import asyncio
from shoal.lab.network import Network, Node
from shoal.lab.proxy import proxy_lab

async def main():
    async with proxy_lab(Network(nodes=(Node(name="a"),))) as lab:
        process = await lab.run("a", ["sleep", "1000"])
        print(process.pid, flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose kernel can end a child with its parent")
def test_a_killed_lab_takes_its_processes_along() -> None:
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLDER)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        assert namespaces.start_ticks(pid) is not None
        holder.kill()
    deadline = time.monotonic() + 20
    while namespaces.start_ticks(pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
