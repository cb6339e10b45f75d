"""Two nodes come to hold the same memories, whatever each did and however long apart; nothing forged enters."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from memory_makers import make_entry, make_trial
from msgspec.structs import replace

from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.memory.events import Added, Event
from shoal.memory.keeper import Keeper
from shoal.memory.sharing import Page, Sharing, events_key
from shoal.memory.signing import ForgedEvent, SignedEvent, sign_event, verified
from shoal.protocol.codec import decode, encode

SECRET = b"0123456789abcdef"
PROCESS = Path(__file__).with_name("memory_process.py")


class Cable:
    """A line to a port that can be cut and mended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_cut = False
        self.port = 0

    async def __aenter__(self) -> Cable:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        self._server.close()
        await self._server.wait_closed()

    def cut(self) -> None:
        self.is_cut = True
        for writer in list(self._writers):
            writer.transport.abort()

    def mend(self) -> None:
        self.is_cut = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.transport.abort()
            return
        there = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {writer, there[1]}
        await asyncio.gather(self._carry(reader, there[1]), self._carry(there[0], writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()


@asynccontextmanager
async def node(folder: Path, seed: int, *ticket: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(PROCESS),
        str(folder),
        str(seed),
        *ticket,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def told(process: asyncio.subprocess.Process, words: str = "") -> str:
    assert process.stdin is not None and process.stdout is not None
    if words:
        process.stdin.write(f"{words}\n".encode())
        await process.stdin.drain()
        if words.startswith(("peer", "end")):
            return ""
    return (await process.stdout.readline()).decode().strip()


@pytest.mark.slow
async def test_processes_that_were_cut_off_from_each_other_end_with_one_store(tmp_path: Path) -> None:
    async with asyncio.timeout(110), node(tmp_path / "a", 1) as first:
        key, _, written = (await told(first)).partition(" ")
        ticket = Ticket.decode(written)
        async with Cable(int(ticket.endpoints[0].rpartition(":")[2])) as cable:
            by_cable = Ticket(
                ticket.protocol_version, ticket.run, (f"tcp/127.0.0.1:{cable.port}",), ticket.coordinator_key, SECRET
            )
            async with node(tmp_path / "b", 2, by_cable.encode()) as second:
                await told(second, f"peer {key}")
                await told(first, f"peer {await told(second)}")
                await asyncio.gather(told(first, "work 40"), told(second, "work 40"))
                cable.cut()
                await asyncio.gather(told(first, "work 60"), told(second, "work 60"))
                apart = await asyncio.gather(told(first, "state"), told(second, "state"))
                assert apart[0] != apart[1]
                cable.mend()
                await asyncio.gather(told(first, "work 20"), told(second, "work 20"))
                while True:
                    here, there = await asyncio.gather(told(first, "state"), told(second, "state"))
                    if here == there:
                        break
                    await asyncio.sleep(0.2)
                num_memories, num_events = map(int, here.split()[2:])
                assert num_memories > 5 and num_events > 100
                await told(first, "end")
                await told(second, "end")
                assert await first.wait() == 0 and await second.wait() == 0


def test_a_signature_is_of_one_event_and_of_its_node() -> None:
    own, other = Identity.generate(), Identity.generate()
    event = Event(at_us=1, node=own.node_id, body=Added(entry=make_entry("Carry the one.")))
    signed = sign_event(own, event)
    assert verified(decode(encode(signed), SignedEvent)) == event
    for wrong in (
        sign_event(other, event),
        replace(signed, event=replace(event, at_us=2)),
        replace(signed, signature=bytes(64)),
        replace(signed, signer=other.public_key),
    ):
        with pytest.raises(ForgedEvent):
            verified(wrong)


async def test_what_is_a_users_or_unsigned_stays_and_strangers_events_do_not_enter(tmp_path: Path) -> None:
    here, there, stranger = (Identity.generate() for _ in range(3))
    with Keeper(tmp_path / "a", here) as keeper, Keeper(tmp_path / "b", there) as other:
        shared = keeper.add(make_entry("Carry the one to the next column."))
        keeper.report(shared.id, [make_trial(n, 0.0, 1.0) for n in range(40)])
        keeper.add(make_entry("Ann adds from the left to the right.", user="ann"))
        keeper.store.append([Event(at_us=1, node="nobody", body=Added(entry=make_entry("Nobody signed this one.")))])
        keeper.store.append(
            [
                sign_event(
                    stranger,
                    Event(at_us=1, node=stranger.node_id, body=Added(entry=make_entry("A stranger signed this."))),
                )
            ]
        )
        async with (
            await Fabric.listen(here) as listener,
            await Fabric.connect(there, listener.ticket("run", SECRET)) as fabric,
        ):
            admits = lambda key: key != stranger.public_key  # noqa: E731
            giving = Sharing(listener, keeper, list, admits)
            taking = Sharing(fabric, other, lambda: [here.public_key], admits)
            await giving.start()
            assert await taking.ask(here.public_key) > 40
            assert await taking.ask(here.public_key) == 0
            assert [m.entry.text for m in other.store.memories()] == [shared.entry.text, *twins(other)]
            assert taking.counters["not_admitted"] == 1

            keeper.used([shared.id], 1.0)
            assert await taking.ask(here.public_key) == 1
            assert other.memory(shared.id) == keeper.memory(shared.id)


def twins(keeper: Keeper) -> list[str]:
    return [m.entry.text for m in keeper.store.memories() if m.entry.provenance.rule == "abstract"]


async def test_a_peer_that_forges_is_left(tmp_path: Path) -> None:
    honest, liar = Identity.generate(), Identity.generate()
    forged = replace(
        sign_event(liar, Event(at_us=1, node=liar.node_id, body=Added(entry=make_entry("Made up from nothing.")))),
        signature=bytes(64),
    )

    async def lie(request: object) -> bytes:
        return encode(Page(store="s", events=(forged,), position=1, complete=True))

    with Keeper(tmp_path / "a", honest) as keeper:
        async with (
            await Fabric.listen(liar) as listener,
            await Fabric.connect(honest, listener.ticket("run", SECRET)) as fabric,
        ):
            await listener.serve(events_key(liar.node_id), lie)
            sharing = Sharing(fabric, keeper, list, lambda key: True)
            assert await sharing.ask(liar.public_key) == 0
            assert sharing.counters["refused"] == 1 and not list(keeper.store.memories())
