"""The only way out: names and ports that were given, joined to a target each."""

# Programs inside texts keep their long lines.
# ruff: noqa: E501

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from shoal.sandbox import Job, Limits, Program, Relay, Sandbox, Setup, WorkerPool

ASK = """
import socket, sys
for line in sys.stdin:
    name, port = line.split()
    try:
        with socket.create_connection((name, int(port)), timeout=5) as s:
            s.sendall(b'x' * 200_000)
            s.shutdown(socket.SHUT_WR)
            data = b''
            while piece := s.recv(65536): data += piece
            print(data[:200_000].count(b'x'), data[200_000:].decode())
    except OSError as error:
        print(type(error).__name__)
"""


async def _echo(tag: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.read() + tag)
    writer.write_eof()
    writer.close()


async def test_connections_reach_their_target_and_nothing_else(sandbox: Sandbox, tmp_path: Path) -> None:
    tcp = await asyncio.start_server(lambda r, w: _echo(b"tcp", r, w), "127.0.0.1", 0)
    unix = await asyncio.start_unix_server(lambda r, w: _echo(b"unix", r, w), str(tmp_path / "s"))
    closed = await asyncio.start_server(lambda r, w: _echo(b"", r, w), "127.0.0.1", 0)
    unused = closed.sockets[0].getsockname()[1]
    closed.close()
    relays = (
        Relay("chain.test", 8545, ("127.0.0.1", tcp.sockets[0].getsockname()[1])),
        Relay("other.test", 8545, tmp_path / "s"),
        Relay("127.0.0.1", 9000, tmp_path / "s"),
        Relay("gone.test", 8545, ("127.0.0.1", unused)),
    )
    stdin = b"chain.test 8545\nother.test 8545\n127.0.0.1 9000\nlocalhost 9000\ngone.test 8545\nchain.test 8546\n127.0.0.1 8545\n"
    async with tcp, unix:
        result = await sandbox.run(Program(Job(source=ASK, stdin=stdin), Setup(relays=relays)), Limits(wall_s=30))
    got = result.stdout.decode().splitlines()
    assert got[:4] == ["200000 tcp", "200000 unix", "200000 unix", "200000 unix"], result
    assert got[4] in ("ConnectionResetError", "BrokenPipeError", "OSError", "0 "), "the target is not there"
    assert got[5:] == ["ConnectionRefusedError", "ConnectionRefusedError"]


async def test_a_worker_keeps_its_relays_and_drops_a_jobs_connections(sandbox: Sandbox) -> None:
    open_now: set[asyncio.StreamWriter] = set()
    ended = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_now.add(writer)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        open_now.discard(writer)
        ended.set()
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    setup = Setup(relays=(Relay("chain.test", 8545, ("127.0.0.1", server.sockets[0].getsockname()[1])),))
    job = Job(
        source="import socket, time\ns = socket.create_connection(('chain.test', 8545))\ns.send(b'x')\ntime.sleep(.2)"
    )
    async with server, WorkerPool(setup, Limits(wall_s=30), size=1) as pool:
        for _ in range(3):
            ended.clear()
            assert (await pool.run(job)).reason == "ok"
            async with asyncio.timeout(20):
                await ended.wait()
        assert not open_now and pool.started == 1


async def test_a_flood_of_connections_is_bounded(sandbox: Sandbox) -> None:
    most = now = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        now -= 1
        writer.close()

    server = await asyncio.start_server(count, "127.0.0.1", 0)
    setup = Setup(relays=(Relay("chain.test", 8545, ("127.0.0.1", server.sockets[0].getsockname()[1])),))
    source = "import socket, time\nall = []\nfor _ in range(200): all.append(socket.create_connection(('chain.test', 8545)))\ntime.sleep(.5)\nprint(len(all))"
    async with server:
        result = await sandbox.run(Program(Job(source=source), setup), Limits(wall_s=30))
    assert result.stdout == b"200\n", result
    assert 1 <= most <= 64
