"""Publications: heard by whoever listens, bounded for whoever is slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from shoal.fabric.core import namespace_of
from shoal.fabric.endpoint import Endpoint
from shoal.fabric.envelope import write_envelope
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.session import open_connector
from shoal.fabric.topic import Message, Subscription

Eventually = Callable[[Callable[[], object]], Awaitable[None]]
SECRET = b"0123456789abcdef"


async def hear(stream: Subscription) -> Message:
    async with asyncio.timeout(10):
        return await anext(stream)


async def synchronise(stream: Subscription, speaker: Fabric, topic: str) -> None:
    """Speak until heard: a new subscription takes a moment to be known everywhere."""
    for _ in range(100):
        await speaker.publish(topic, b"sync", wait=True)
        try:
            async with asyncio.timeout(0.1):
                assert (await anext(stream)).body == b"sync"
        except TimeoutError:
            continue
        await asyncio.sleep(0.05)
        while stream._samples:
            await anext(stream)
        return
    pytest.fail("never heard anything")


async def test_everyone_who_subscribes_hears(pair: tuple[Fabric, Fabric]) -> None:
    listener, node = pair
    async with (
        await Fabric.connect(Identity.generate(), listener.ticket("a run", SECRET)) as third,
        listener.subscribe("news/*") as first,
        third.subscribe("news/today") as second,
        third.subscribe("**") as all_of_it,
    ):
        for stream in (first, second, all_of_it):
            await synchronise(stream, node, "news/today")
        await node.publish("news/today", b"rain", wait=True)
        for stream in (first, second, all_of_it):
            message = await hear(stream)
            while message.body == b"sync":
                message = await hear(stream)
            assert (message.sender_key, message.topic, message.body) == (
                node.identity.public_key,
                "news/today",
                b"rain",
            )
            assert abs(message.sent_at - time.time()) < 60


async def test_slow_reader_gets_the_newest_and_knows_what_it_missed(
    listener: Fabric, node: Fabric, eventually: Eventually
) -> None:
    async with listener.subscribe("ticks", capacity=5) as stream:
        await synchronise(stream, node, "ticks")
        stream.dropped = 0
        for number in range(50):
            await node.publish("ticks", b"%d" % number, wait=True)
        await eventually(lambda: stream.dropped == 45)
        assert [(await hear(stream)).body for _ in range(5)] == [b"%d" % n for n in range(45, 50)]


async def test_oversized_and_strange_messages_are_not_delivered(
    listener: Fabric, node: Fabric, eventually: Eventually
) -> None:
    async with (
        listener.subscribe("a", max_bytes=10) as small,
        listener.subscribe("b", allow=lambda key: key == bytes(32)) as closed,
    ):
        await synchronise(small, node, "a")
        await node.publish("a", b"x" * 11, wait=True)
        await node.publish("a", b"y", wait=True)
        assert (await hear(small)).body == b"y" and small.dropped == 1
        await node.publish("b", b"x", wait=True)
        reader = asyncio.create_task(anext(closed))  # type: ignore[arg-type]
        await eventually(lambda: listener.counters["publication_refused.stranger"] == 1)
        assert not reader.done()
        reader.cancel()


async def test_forgeries_and_replays_are_not_delivered(listener: Fabric, eventually: Eventually) -> None:
    session = await asyncio.to_thread(
        open_connector,
        listener.identity.public_key,
        Endpoint.parse(listener.endpoints[0]),
        5.0,
        2.0,
    )
    victim = Identity.generate()
    good = write_envelope(victim, "publication", "news", b"x", now=time.time()).attachment
    old = write_envelope(victim, "publication", "news", b"x", now=time.time() - 1000).attachment
    async with listener.subscribe("news") as stream:
        await asyncio.sleep(0.3)

        news = namespace_of(listener.identity.public_key) + "news"

        def attack() -> None:
            session.put(news, b"y", attachment=good)
            session.put(news, b"x", attachment=old)
            session.put(news, b"x")
            session.put(news, b"x", attachment=good)
            session.put(news, b"x", attachment=good)

        await asyncio.to_thread(attack)
        assert (await hear(stream)).sender_key == victim.public_key
        reader = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await eventually(lambda: listener.counters["publication_refused.replay"] == 1)
        reader.cancel()
    assert listener.counters == {
        f"publication_refused.{kind}": 1 for kind in ("signature", "clock", "malformed", "replay")
    }
    await asyncio.to_thread(session.close)


async def test_reader_ends_when_the_fabric_closes(listener: Fabric) -> None:
    node = await Fabric.connect(Identity.generate(), listener.ticket("a run", SECRET))

    async def read() -> int:
        async with node.subscribe("news") as stream:
            return len([message async for message in stream])

    reader = asyncio.create_task(read())
    await asyncio.sleep(0.1)
    await node.close()
    async with asyncio.timeout(5):
        assert await reader == 0
