"""Direct connections between nodes, over which chunks and a pipeline's steps go: frames, who is there, encryption.

    dialler ──▶ listener      the listener proves its key by TLS (on loopback there is none, as in `fabric`),
                              the dialler by signing the listener's nonce and key

Bulk bytes do not go through the fabric, whose nodes reach each other over the one that listens: here every pair has
its own TCP connection, whose flow control is the only queue.

Invariants: a frame longer than its kind allows ends the connection unread; nothing is read or written for a dialler
before it proved a key that `allow` accepts; every read of a handshake has a deadline.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
import socket
import ssl
import struct
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from shoal.broadcast.uplink import SendCounts
from shoal.errors import NetworkError
from shoal.fabric.endpoint import is_loopback
from shoal.fabric.identity import Identity, verify
from shoal.fabric.tls import listener_config, probe_context
from shoal.protocol.snapshot import HASH_BYTES, MAX_CHUNK_BYTES

HEADER = struct.Struct(">BI")
"""Kind and length of the frame that follows."""

NONCE_BYTES = 32
DOMAIN = b"shoal link 1"
HELLO_BYTES = 32 + 64
"""Public key and signature."""

HANDSHAKE_S = 4.0
WRITE_BUFFER_BYTES = 64 * 2**10
"""What may wait in the process before a writer waits; little, so that the next chunk is chosen late."""

UNSENT_BYTES = 128 * 2**10
"""What may wait in the kernel without being under way, where the system can bound it."""

CONGESTION = b"cubic"
"""Where there is a choice. Of many flows over one slow access link, BBR's sent a tenth of all bytes twice."""

READ_BUFFER_BYTES = 256 * 2**10
"""What has come and is not read yet: above it, the sender is held up."""

PIECE_BYTES = 32 * 2**10
"""A frame is read in such pieces, so that a slow link is told from a dead one."""

TURN_S = 1.0
"""A link that takes nothing for so long loses its turn."""

NEARLY_BYTES = 4 * 2**10
FIRST_LOOK_S, LAST_LOOK_S = 0.002, 0.05
"""How soon, and how rarely at most, it is looked whether a frame has left."""

TCP_INFO_BYTES = 148
ACKNOWLEDGED, UNSENT = struct.Struct("=Q"), struct.Struct("=I")
"""`tcpi_bytes_acked` and `tcpi_notsent_bytes` of Linux's `struct tcp_info`, at bytes 120 and 144."""

MAX_DIGESTS = 4096
"""In one frame."""


class Kind(IntEnum):
    """What a frame is."""

    WANT = 1
    """Hashes of chunks: send each as soon as it is there."""
    DROP = 2
    """Hashes of chunks that are wanted no longer."""
    CHUNK = 3
    """A chunk's hash and bytes."""
    ALIVE = 4
    """Here, whatever else may come when."""
    PIECE = 5
    """A frame of a pipeline's step (`protocol.stage`)."""


MAX_BYTES = {
    Kind.WANT: MAX_DIGESTS * HASH_BYTES,
    Kind.DROP: MAX_DIGESTS * HASH_BYTES,
    Kind.CHUNK: HASH_BYTES + MAX_CHUNK_BYTES,
    Kind.ALIVE: 0,
    Kind.PIECE: PIECE_BYTES,
}


class Address(NamedTuple):
    """Where a node listens for links, and the key it proves there."""

    host: str
    port: int
    public_key: bytes


class Link:
    """One open connection; `peer` is the other end's public key."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: bytes) -> None:
        self._reader = reader
        self._writer = writer
        self.peer = peer
        self.heard_at = asyncio.get_running_loop().time()
        """When bytes came last."""
        self.data_at = self.heard_at
        """When bytes came last that were more than a sign of life."""
        self.is_between_frames = True
        """Whether everything that came was read to the end of a frame."""

    async def receive(self) -> tuple[Kind, bytes]:
        """The next frame.

        Raises:
            NetworkError: the connection ended, or what came is no frame.
        """
        try:
            number, length = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            self.is_between_frames = False
            kind = Kind(number)
            if length > MAX_BYTES[kind]:
                raise NetworkError(f"a peer sends a frame of {length} bytes.")
            frame = await self._read(length)
            self.is_between_frames = True
            return kind, frame
        except (OSError, asyncio.IncompleteReadError, ssl.SSLError) as error:
            raise NetworkError(f"a link ended: {error}.") from error
        except ValueError:
            raise NetworkError("a peer sends frames of an unknown kind.") from None

    async def _read(self, length: int) -> bytes:
        data, loop = bytearray(), asyncio.get_running_loop()
        self.heard_at = loop.time()
        while len(data) < length:
            piece = await self._reader.read(min(PIECE_BYTES, length - len(data)))
            if not piece:
                raise asyncio.IncompleteReadError(bytes(data), length)
            data += piece
            self.heard_at = self.data_at = loop.time()
        return bytes(data)

    async def send(self, kind: Kind, *parts: bytes) -> None:
        """Send a frame, waiting while the link takes nothing.

        Raises:
            NetworkError: the connection ended.
        """
        self._put(kind, *parts)
        await self._drain()

    async def send_in_turn(self, turn: AbstractAsyncContextManager[None], kind: Kind, *parts: bytes) -> None:
        """Send a frame, inside `turn` until nearly all of it is under way, for `TURN_S` where the link takes nothing.

        Raises:
            NetworkError: the connection ended.
        """
        loop = asyncio.get_running_loop()
        async with turn:
            self._put(kind, *parts)
            until, pause_s = loop.time() + TURN_S, FIRST_LOOK_S
            while (counts := self.counts()) is not None and counts.waiting > NEARLY_BYTES and loop.time() < until:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LAST_LOOK_S)
        await self._drain()

    def show_life(self) -> None:
        """Send an `ALIVE`, unless bytes wait that show as much.

        Raises:
            NetworkError: the connection ended.
        """
        if self._writer.transport.get_write_buffer_size() == 0:
            self._put(Kind.ALIVE)

    def _put(self, kind: Kind, *parts: bytes) -> None:
        try:
            self._writer.write(HEADER.pack(kind, sum(map(len, parts))))
            for part in parts:
                self._writer.write(part)
        except (OSError, ssl.SSLError) as error:
            raise NetworkError(f"a link ended: {error}.") from error

    async def _drain(self) -> None:
        try:
            await self._writer.drain()
        except (OSError, ssl.SSLError) as error:
            raise NetworkError(f"a link ended: {error}.") from error

    async def send_digests(self, kind: Kind, digests: list[bytes]) -> None:
        """`WANT` or `DROP` for any number of chunks."""
        for start in range(0, len(digests), MAX_DIGESTS):
            await self.send(kind, b"".join(digests[start : start + MAX_DIGESTS]))

    @property
    def is_closing(self) -> bool:
        """Whether this end knows that it is over."""
        return self._writer.is_closing() or self._reader.at_eof()

    def counts(self) -> SendCounts | None:
        """What the other end has acknowledged, and what waits here; `None` where the system does not say."""
        plain = self._writer.get_extra_info("socket")
        if sys.platform != "linux" or plain is None:
            return None
        try:
            told = plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        except OSError:  # it has just ended
            return None
        if len(told) < TCP_INFO_BYTES:  # an old kernel
            return None
        acknowledged, waiting = ACKNOWLEDGED.unpack_from(told, 120)[0], UNSENT.unpack_from(told, 144)[0]
        return SendCounts(acknowledged, waiting + self._writer.transport.get_write_buffer_size())

    def close(self) -> None:
        """End the connection at once; whoever reads or writes gets a `NetworkError`."""
        self._writer.transport.abort()


def digests_of(frame: bytes) -> list[bytes]:
    """The hashes in a `WANT` or `DROP` frame.

    Raises:
        NetworkError: it holds no whole number of them.
    """
    if len(frame) % HASH_BYTES:
        raise NetworkError("a peer sends half a hash.")
    return [frame[at : at + HASH_BYTES] for at in range(0, len(frame), HASH_BYTES)]


async def dial(identity: Identity, address: Address) -> Link:
    """Connect to the node that listens at `address`.

    Raises:
        NetworkError: it is not there, or is another.
    """
    context = None if is_loopback(address.host) else probe_context(address.public_key)
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            reader, writer = await asyncio.open_connection(
                address.host, address.port, ssl=context, limit=READ_BUFFER_BYTES
            )
            _tune(writer)
            nonce = await reader.readexactly(NONCE_BYTES)
            writer.write(identity.public_key + identity.sign(DOMAIN + nonce + address.public_key))
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise NetworkError(f"{address.host}:{address.port} cannot be reached: {error or 'no answer'}.") from error
    return Link(reader, writer, address.public_key)


async def welcome(
    identity: Identity,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    allow: Callable[[bytes], bool] | None,
) -> Link:
    """The link to a dialler that has proved its key.

    Raises:
        NetworkError: it did not, or is not allowed.
    """
    _tune(writer)
    nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            writer.write(nonce)
            hello = await reader.readexactly(HELLO_BYTES)
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise NetworkError(f"a dialler did not introduce itself: {error or 'no answer'}.") from error
    key, signature = hello[:32], hello[32:]
    if not verify(key, DOMAIN + nonce + identity.public_key, signature):
        raise NetworkError("a dialler does not own the key that it shows.")
    if allow is not None and not allow(key):
        raise NetworkError("a dialler has not been admitted.")
    return Link(reader, writer, key)


def listener_context(identity: Identity) -> ssl.SSLContext:
    """TLS settings with which a listener proves that it owns `identity`, as the fabric's listeners do."""
    settings = listener_config(identity)
    names = [f"transport/link/tls/listen_{part}_base64" for part in ("private_key", "certificate")]
    pem = b"".join(base64.b64decode(settings[name]) for name in names)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Python's ssl takes certificates from files only.
    with tempfile.TemporaryDirectory(prefix="shoal-link-") as scratch:
        file = Path(scratch) / "pair.pem"
        file.touch(mode=0o600)
        file.write_bytes(pem)
        context.load_cert_chain(file)
    return context


def _tune(writer: asyncio.StreamWriter) -> None:
    writer.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
    plain = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION)
