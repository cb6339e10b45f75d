"""Links kept between two versions: used again, and never in the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from tensors_made import eventually, next_chunk

from shoal.broadcast import pool
from shoal.broadcast.link import Address, Kind
from shoal.broadcast.pool import LinkPool
from shoal.broadcast.relay import Relay
from shoal.broadcast.store import Store
from shoal.errors import NetworkError
from shoal.fabric.identity import Identity


@pytest.fixture
async def relay(make_store: Callable[[str], Store]) -> AsyncIterator[tuple[Relay, Address, bytes]]:
    """A relay that serves one chunk."""
    store = make_store("s")
    digest = store.put_chunk(b"a chunk")
    serving = Relay(Identity.generate(), store)
    address = await serving.start()
    yield serving, address, digest
    await serving.close()


async def test_a_link_is_used_again(relay: tuple[Relay, Address, bytes]) -> None:
    _, address, digest = relay
    links = LinkPool(Identity.generate())
    first, is_new = await links.take(address)
    assert is_new
    for _ in range(3):
        await first.send_digests(Kind.WANT, [digest])
        assert await next_chunk(first) == digest + b"a chunk"
        links.put(address, first)
        again, is_new = await links.take(address)
        assert again is first and not is_new
    second, is_new = await links.take(address)
    assert is_new and second is not first, "one that is lent is not lent again"
    links.put(address, first)
    links.put(address, second)
    assert second.is_closing
    links.close()
    assert first.is_closing


async def test_an_idle_link_is_silent(relay: tuple[Relay, Address, bytes]) -> None:
    """So nothing heaps up in one that nobody reads; one that waits for a chunk hears that the other end lives."""
    _, address, digest = relay
    links = LinkPool(Identity.generate())
    link, _ = await links.take(address)
    await link.send_digests(Kind.WANT, [digest])
    await next_chunk(link)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.5):
            await link.receive()
    await link.send_digests(Kind.WANT, [bytes(32)])
    async with asyncio.timeout(10):
        assert await link.receive() == (Kind.ALIVE, b"")
    link.close()


async def test_dead_and_old_links_are_not_lent(
    relay: tuple[Relay, Address, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, address, _ = relay
    links = LinkPool(Identity.generate())
    link, _ = await links.take(address)
    links.put(address, link)
    monkeypatch.setattr(pool, "KEPT_S", -1.0)
    fresh, is_new = await links.take(address)
    assert is_new and link.is_closing
    monkeypatch.setattr(pool, "KEPT_S", 60.0)
    links.put(address, fresh)
    await serving.close()
    await eventually(lambda: fresh.is_closing)
    with pytest.raises(NetworkError, match="cannot be reached"):
        await links.take(address)


async def test_bounded(make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MAX_KEPT", 2)
    links, relays, opened = LinkPool(Identity.generate()), [], []
    for _ in range(3):
        serving = Relay(Identity.generate(), make_store("s"))
        relays.append(serving)
        opened.append((address := await serving.start(), (await links.take(address))[0]))
    for address, link in opened:
        links.put(address, link)
    assert [link.is_closing for _, link in opened] == [True, False, False]
    links.close()
    for serving in relays:
        await serving.close()
