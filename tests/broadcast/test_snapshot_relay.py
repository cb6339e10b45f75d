"""Chunks from node to node over direct links: fast, past the dead, the silent and the lying."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from blake3 import blake3
from tensors_made import eventually, next_chunk

from shoal.broadcast.gather import Gathering, Peers
from shoal.broadcast.link import Address, Kind, Link, dial, digests_of, welcome
from shoal.broadcast.pool import LinkPool
from shoal.broadcast.relay import MAX_LINKS_PER_KEY, MAX_SENDING, Relay
from shoal.broadcast.store import Store
from shoal.errors import NetworkError
from shoal.fabric.identity import Identity
from shoal.planning.dissemination import SOURCE, Plan, Receiver

MakeStore = Callable[[str], Store]
CHUNKS = [random.Random(i).randbytes(3000 + i) for i in range(60)]
SIZES = {blake3(chunk).digest(): len(chunk) for chunk in CHUNKS}


def hasty(store: Store) -> Store:
    """The same store, which does not wait for the disk."""
    return Store(store.directory, run=store.run, trusted_key=store.trusted_key, durable=False)


class Node:
    """A store, a relay and what it counted."""

    def __init__(self, name: str, store: Store) -> None:
        self.name, self.store = name, store
        self.identity = Identity.generate()
        self.relay = Relay(self.identity, store)
        self.links = LinkPool(self.identity)
        self.address: Address
        self.blame: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.order: list[bytes] = []
        self._came = asyncio.Condition()

    async def has(self, count: int) -> None:
        """Wait until so many chunks are here."""
        async with self._came:
            await self._came.wait_for(lambda: len(self.order) >= count)

    async def _tell(self) -> None:
        async with self._came:
            self._came.notify_all()

    async def gather(self, peers: Peers) -> None:
        """Fetch all chunks, passing them on as they come."""

        def on_chunk(digest: bytes, data: bytes) -> None:
            assert SIZES[digest] == len(data)
            self.order.append(digest)
            self.relay.arrived(digest, data)
            telling.append(asyncio.create_task(self._tell()))

        telling: list[asyncio.Task[None]] = []
        await Gathering(self.links, self.store, SIZES, peers, on_chunk, blame=self.blame, received=self.received).run()
        await asyncio.gather(*telling)

    def is_whole(self) -> bool:
        return all(self.store.get_chunk(digest) for digest in SIZES)


class Fleet:
    """A source that has all chunks, and nodes that have none."""

    def __init__(self, source: Node, nodes: list[Node]) -> None:
        self.source, self.nodes = source, nodes

    def peers(self, node: Node) -> Peers:
        plan = Plan(1e6, tuple(Receiver(n.name, 1e6) for n in self.nodes), len(SIZES))
        addresses = {number: self.node(plan.receivers[number].name).address for number in range(len(self.nodes))}
        return Peers(plan, node.name, {**addresses, SOURCE: self.source.address})

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    async def gather(self, *left_out: Node) -> None:
        """All but some fetch at once."""
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for node in self.nodes:
                if node not in left_out:
                    group.create_task(node.gather(self.peers(node)))


@pytest.fixture
async def make_fleet(make_store: MakeStore) -> AsyncIterator[Callable[..., object]]:
    async with AsyncExitStack() as stack:

        async def make(count: int, host: str = "127.0.0.1") -> Fleet:
            nodes = [Node(f"n{i}", hasty(make_store(f"n{i}"))) for i in range(count)]
            source = Node("source", hasty(make_store("source")))
            for chunk in CHUNKS:
                source.store.put_chunk(chunk)
            for node in (source, *nodes):
                node.address = await node.relay.start(host)
                stack.push_async_callback(node.relay.close)
            return Fleet(source, nodes)

        yield make


async def test_each_chunk_leaves_the_source_once(make_fleet: Callable[..., object]) -> None:
    fleet = await make_fleet(5)  # type: ignore[misc]
    await fleet.gather()
    total = sum(SIZES.values())
    assert all(node.is_whole() for node in fleet.nodes)
    sent = fleet.source.relay.bytes_sent.total()
    assert sent == total, "and the nodes passed it on to each other"
    assert sum(node.relay.bytes_sent.total() for node in fleet.nodes) == 4 * total
    for node in fleet.nodes:
        assert node.received.total() == total and not node.blame


async def test_a_chunk_goes_on_before_the_rest_is_there(make_fleet: Callable[..., object]) -> None:
    """Cut-through: the source holds the last chunk back, and everybody has all the others."""
    fleet = await make_fleet(3)  # type: ignore[misc]
    last = blake3(CHUNKS[-1]).digest()
    held_back = fleet.source.store.directory / "chunks" / last.hex()[:2] / last.hex()
    held_back.rename(held_back.with_suffix(".aside"))
    gathering = asyncio.create_task(fleet.gather())
    async with asyncio.timeout(20):
        await asyncio.gather(*(node.has(len(SIZES) - 1) for node in fleet.nodes))
    assert not gathering.done()
    held_back.with_suffix(".aside").rename(held_back)
    fleet.source.relay.arrived(last, CHUNKS[-1])
    await gathering
    assert all(node.is_whole() for node in fleet.nodes)


@pytest.mark.parametrize("when", ["never there", "at once", "halfway"])
async def test_a_relay_that_dies_costs_its_stripe_only(make_fleet: Callable[..., object], when: str) -> None:
    fleet = await make_fleet(4)  # type: ignore[misc]
    dead, others = fleet.nodes[1], [node for node in fleet.nodes if node is not fleet.nodes[1]]
    if when == "never there":
        await dead.relay.close()
        await fleet.gather(dead)
    else:
        gathering = asyncio.create_task(fleet.gather(dead))
        own = asyncio.create_task(dead.gather(fleet.peers(dead)))
        async with asyncio.timeout(20):
            await dead.has(1 if when == "at once" else 30)
        own.cancel()
        await dead.relay.close()
        await gathering
    assert all(node.is_whole() for node in others)
    assert fleet.source.relay.bytes_sent.total() < 2 * sum(SIZES.values()), "nobody began again"


@asynccontextmanager
async def pretender(identity: Identity, serve: Callable[[Link], object]) -> AsyncIterator[Address]:
    """A node that proves its key and then does as it likes."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            link = await welcome(identity, reader, writer, None)
            await serve(link)  # type: ignore[misc]
        except NetworkError:
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1], identity.public_key)
    finally:
        server.close()


@pytest.mark.parametrize("lie", ["corrupt", "foreign", "swapped", "short", "garbage", "huge"])
async def test_a_liar_is_named_and_avoided(make_fleet: Callable[..., object], lie: str) -> None:
    fleet = await make_fleet(3)  # type: ignore[misc]
    liar = fleet.nodes[0]

    async def serve(link: Link) -> None:
        while True:
            kind, frame = await link.receive()
            if kind is not Kind.WANT:
                continue
            asked = digests_of(frame)
            data = {blake3(chunk).digest(): chunk for chunk in CHUNKS}
            for digest in asked:
                chunk = data[digest]
                match lie:
                    case "corrupt":
                        await link.send(Kind.CHUNK, digest, chunk[:-1] + bytes([chunk[-1] ^ 1]))
                    case "foreign":
                        await link.send(Kind.CHUNK, blake3(b"foreign").digest(), b"foreign")
                    case "swapped":
                        await link.send(Kind.CHUNK, digest, CHUNKS[0] if chunk is not CHUNKS[0] else CHUNKS[1])
                    case "short":
                        await link.send(Kind.CHUNK, digest[:5])
                    case "garbage":
                        await link.send(Kind.WANT, digest)
                    case "huge":
                        link._writer.write(b"\x03\xff\xff\xff\xff")
                        await asyncio.sleep(1)

    async with pretender(liar.identity, serve) as liar.address:
        await fleet.gather(liar)
    for node in fleet.nodes[1:]:
        assert node.is_whole() and node.store.num_damaged == 0
        assert len(list((node.store.directory / "chunks").glob("??/*"))) == len(SIZES), "nothing else was kept"
        named = node.blame[liar.identity.node_id]
        assert named == (1 if lie in ("corrupt", "foreign", "swapped", "short") else 0)
        assert node.received[liar.identity.node_id] == 0


@pytest.mark.parametrize("silence", ["total", "alive"])
async def test_a_peer_that_stands_still_is_passed_by(make_fleet: Callable[..., object], silence: str) -> None:
    """Stopped altogether, or alive and sending nothing: its chunks come from others."""
    fleet = await make_fleet(3)  # type: ignore[misc]
    still = fleet.nodes[2]

    async def serve(link: Link) -> None:
        while True:
            await asyncio.sleep(0.3)
            if silence == "alive":
                await link.send(Kind.ALIVE)

    async with pretender(still.identity, serve) as still.address:
        started = time.monotonic()
        await fleet.gather(still)
        assert time.monotonic() - started < 45
    assert all(node.is_whole() for node in fleet.nodes[:2])


@pytest.mark.slow
async def test_the_source_comes_back(make_fleet: Callable[..., object]) -> None:
    fleet = await make_fleet(2)  # type: ignore[misc]
    port = fleet.source.address.port
    await fleet.source.relay.close()
    gathering = asyncio.create_task(fleet.gather())
    await asyncio.sleep(1.5)
    fleet.source.relay = Relay(fleet.source.identity, fleet.source.store)
    await fleet.source.relay.start(port=port)
    await gathering
    await fleet.source.relay.close()
    assert all(node.is_whole() for node in fleet.nodes)


async def test_strangers_and_too_many_links_are_turned_away(make_store: MakeStore) -> None:
    friend, stranger = Identity.generate(), Identity.generate()
    store = make_store("s")
    digest = store.put_chunk(b"a chunk")
    relay = Relay(Identity.generate(), store, allow=lambda key: key == friend.public_key)
    address = await relay.start()
    try:
        links = []
        for _ in range(MAX_LINKS_PER_KEY):
            links.append(await dial(friend, address))
            await links[-1].send_digests(Kind.WANT, [digest])
            assert await next_chunk(links[-1]) == digest + b"a chunk"
        for who in (friend, stranger):
            refused = await dial(who, address)
            with pytest.raises(NetworkError):
                await refused.receive()
        reader, writer = await asyncio.open_connection(address.host, address.port)
        await reader.readexactly(32)
        writer.write(friend.public_key + stranger.sign(b"anything"))
        with pytest.raises(NetworkError):  # a dialler that shows another's key
            await Link(reader, writer, b"").receive()
        assert relay.refused == 3
        for link in links:
            link.close()
    finally:
        await relay.close()


async def test_a_chunk_that_is_wanted_again_and_again_counts_each_time(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be sent is bounded, not only the kinds of it."""
    monkeypatch.setattr("shoal.broadcast.relay.MAX_WANTED", 100)
    store = hasty(make_store("s"))
    digest = store.put_chunk(bytes(2**20))
    relay = Relay(Identity.generate(), store)
    link = await dial(Identity.generate(), await relay.start())
    try:
        await link.send_digests(Kind.WANT, [digest] * 101)
        with pytest.raises(NetworkError):
            await link.receive()
    finally:
        link.close()
        await relay.close()


async def test_links_that_take_nothing_hold_up_nobody(make_store: MakeStore) -> None:
    """More of them than may send at once; each loses its turn."""
    store = hasty(make_store("s"))
    chunks = [store.put_chunk(bytes([i]) * 2**20) for i in range(24)]
    relay = Relay(Identity.generate(), store)
    address = await relay.start()
    links = []
    try:
        for _ in range(MAX_SENDING + 2):
            links.append(await dial(Identity.generate(), address))
            await links[-1].send_digests(Kind.WANT, chunks)
        await eventually(lambda: relay.turns.all_taken)
        links.append(await dial(Identity.generate(), address))
        await links[-1].send_digests(Kind.WANT, chunks)
        async with asyncio.timeout(60):
            for _ in chunks:
                await next_chunk(links[-1])
        assert relay.bytes_sent.total() < (MAX_SENDING + 2) * 24 * 2**20, "the others have not taken theirs"
    finally:
        for link in links:
            link.close()
        await relay.close()


async def test_tls_beyond_loopback(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listener proves its key; another key in its place is refused by the dialler."""
    from shoal.broadcast import link as links
    from shoal.broadcast import relay as relays

    monkeypatch.setattr(links, "is_loopback", lambda host: False)
    monkeypatch.setattr(relays, "is_loopback", lambda host: False)
    store = make_store("s")
    digest = store.put_chunk(b"a chunk")
    relay = Relay(Identity.generate(), store)
    address = await relay.start()
    try:
        link = await dial(Identity.generate(), address)
        await link.send_digests(Kind.WANT, [digest])
        assert await link.receive() == (Kind.CHUNK, digest + b"a chunk")
        link.close()
        with pytest.raises(NetworkError, match="cannot be reached"):
            await dial(Identity.generate(), address._replace(public_key=Identity.generate().public_key))
    finally:
        await relay.close()
    assert not list(Path(store.directory).glob("**/*.pem"))
