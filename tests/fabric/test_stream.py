"""Streams: every frame once and in order, no faster than they are read, and an error when an end is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from shoal.errors import CapacityError, NetworkError, RecordError
from shoal.fabric import stream as stream_module
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.stream import FRAME_HEADER, MAX_WINDOW, InStream, StreamBroken, stream_key

Eventually = Callable[[Callable[[], object]], Awaitable[None]]


class Reader:
    """Accepts streams and keeps what came; reads only while its gate is open."""

    def __init__(self) -> None:
        self.streams: list[list[bytes]] = []
        self.errors: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, incoming: InStream) -> None:
        frames: list[bytes] = []
        self.streams.append(frames)
        try:
            async for frame in incoming:
                await self.gate.wait()
                frames.append(frame)
        except StreamBroken as error:
            self.errors.append(error)
            raise


@pytest.fixture
async def reader(listener: Fabric) -> Reader:
    reader = Reader()
    await listener.accept_streams("acts", reader)
    return reader


async def test_frames_arrive_once_in_order(pair: tuple[Fabric, Fabric]) -> None:
    listener, node = pair
    reader = Reader()
    await listener.accept_streams("acts", reader)
    frames = [b"%d" % n * (n % 50) for n in range(200)]
    async with node.open_stream(listener.identity.public_key, "acts") as out:
        for frame in frames:
            await out.send(frame)
    assert reader.streams == [frames] and reader.errors == []


async def test_large_frames_and_several_streams(listener: Fabric, node: Fabric, reader: Reader) -> None:
    async def write(seed: int) -> list[bytes]:
        frames = [bytes([seed, n]) * 500_000 for n in range(6)]
        async with node.open_stream(listener.identity.public_key, "acts", window=3) as out:
            for frame in frames:
                await out.send(frame)
        return frames

    written = await asyncio.gather(*(write(seed) for seed in range(3)))
    assert sorted(reader.streams) == sorted(written)


async def write(node: Fabric, to: bytes, name: str, num_frames: int, pause_s: float = 0.0) -> None:
    async with node.open_stream(to, name) as out:
        for _ in range(num_frames):
            await out.send(b"x")
            await asyncio.sleep(pause_s)


async def test_reader_sets_the_pace(listener: Fabric, node: Fabric, reader: Reader, eventually: Eventually) -> None:
    reader.gate.clear()
    out = node.open_stream(listener.identity.public_key, "acts", window=4)
    sent = 0

    async def send_all() -> None:
        nonlocal sent
        for _ in range(20):
            await out.send(b"x")
            sent += 1

    sending = asyncio.create_task(send_all())
    await eventually(lambda: sent == 5)  # The window, and the one frame in the reader's hands.
    await asyncio.sleep(0.3)
    assert sent == 5
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    reader.gate.set()
    await out.send(b"last")
    await out.finish()
    assert reader.streams == [[b"x"] * sent + [b"last"]]


async def test_reader_that_gives_up_breaks_the_stream(listener: Fabric, node: Fabric) -> None:
    async def give_up(incoming: InStream) -> None:
        await anext(incoming)
        raise CapacityError("enough.")

    await listener.accept_streams("acts", give_up)
    with pytest.raises(StreamBroken, match="its reader ended"):
        await write(node, listener.identity.public_key, "acts", 100)
    assert listener.counters["stream_failed"] == 1


async def test_writer_that_gives_up_breaks_the_stream(
    listener: Fabric, node: Fabric, reader: Reader, eventually: Eventually
) -> None:
    async def fail() -> None:
        async with node.open_stream(listener.identity.public_key, "acts") as out:
            await out.send(b"x")
            await eventually(lambda: reader.streams == [[b"x"]])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    await eventually(lambda: reader.errors)
    assert "gave up" in str(reader.errors[0])


async def test_nobody_accepts(listener: Fabric, node: Fabric) -> None:
    with pytest.raises(StreamBroken, match="nobody answers"):
        await write(node, listener.identity.public_key, "acts", 1)


async def test_writer_gone_without_a_word(
    listener: Fabric, node: Fabric, reader: Reader, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "SILENCE_S", 0.5)
    out = node.open_stream(listener.identity.public_key, "acts")
    await out.send(b"x")
    await eventually(lambda: reader.streams == [[b"x"]])
    await out.close()
    await eventually(lambda: reader.errors)
    assert "silent" in str(reader.errors[0]) and reader.streams == [[b"x"]]


async def test_idle_writer_is_not_taken_for_gone(
    listener: Fabric, node: Fabric, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "SILENCE_S", 2.5)
    monkeypatch.setattr(stream_module, "PING_S", 0.1)
    async with node.open_stream(listener.identity.public_key, "acts") as out:
        await out.send(b"x")
        await asyncio.sleep(3.5)
        await out.send(b"y")
    assert reader.streams == [[b"x", b"y"]]


async def test_reader_node_gone(listener: Fabric, node: Fabric, reader: Reader) -> None:
    async with await Fabric.connect(Identity.generate(), listener.ticket("a run", b"s" * 16)) as third:
        await node.accept_streams("acts", Reader())
        out = third.open_stream(node.identity.public_key, "acts")
        await out.send(b"x")
        await node.close()
        with pytest.raises(StreamBroken):
            await asyncio.gather(*(out.send(b"x") for _ in range(100)))
        await out.close()


async def test_too_many_streams(listener: Fabric, node: Fabric, eventually: Eventually) -> None:
    reader = Reader()
    await listener.accept_streams("few", reader, max_streams=1)
    first = node.open_stream(listener.identity.public_key, "few")
    await first.send(b"x")
    await eventually(lambda: reader.streams == [[b"x"]])
    with pytest.raises(StreamBroken, match="1 streams open already"):
        await write(node, listener.identity.public_key, "few", 10, pause_s=0.05)
    await first.finish()
    assert reader.streams == [[b"x"]]


async def test_hostile_frames(listener: Fabric, node: Fabric, reader: Reader) -> None:
    key, to = stream_key(listener.identity.node_id, "acts"), listener.identity.public_key
    stream_id = bytes(16)
    for body in (
        b"short",
        FRAME_HEADER.pack(stream_id, 9, 0),
        FRAME_HEADER.pack(stream_id, 0, MAX_WINDOW),
        FRAME_HEADER.pack(stream_id, 0, 2**63),
    ):
        with pytest.raises(RemoteError) as caught:
            await node.request(key, body, 5.0, to=to)
        assert caught.value.kind == "refused"
    await node.request(key, FRAME_HEADER.pack(stream_id, 0, 0) + b"x", 5.0, to=to)
    for number in (0, MAX_WINDOW + 1):
        with pytest.raises(RemoteError, match="out of its window"):
            await node.request(key, FRAME_HEADER.pack(stream_id, 0, number), 5.0, to=to)
    assert reader.streams == [[b"x"]]


async def test_frames_out_of_order_are_put_in_order() -> None:
    incoming = InStream(bytes(32))
    order = [2, 0, 1, 4, 3]
    takes = [asyncio.create_task(incoming.take(0, number, b"%d" % number)) for number in order]
    end = asyncio.create_task(incoming.take(1, 5, b""))
    assert [frame async for frame in incoming] == [b"%d" % n for n in range(5)]
    await asyncio.gather(*takes, end)
    with pytest.raises(RecordError):
        await incoming.take(0, 6, b"after the end")


async def test_broken_stream_tells_everyone() -> None:
    incoming = InStream(bytes(32))
    waiting = asyncio.create_task(incoming.take(0, 1, b"x"))
    reading = asyncio.create_task(anext(incoming))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    incoming.fail("of a test.")
    for task in (waiting, reading):
        with pytest.raises(NetworkError, match="of a test"):
            await task
