"""The sending side: a learner writes a version into a store, and a node serves its store to whoever may read it.

    write_snapshot (learner's process, blocking)      Publisher (the node that serves; asyncio)

Every serving node answers under its own id (`node/ID/chunk/HASH`, `node/ID/manifest/MODEL/VERSION`), so that a
fetcher chooses whom to ask; an announcement says only which version is new, and whoever hears it fetches.
Invariant: chunks go into the store before the manifest that names them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from shoal.broadcast.chain import CHUNK_BYTES, Published, build_manifest, sign_manifest
from shoal.broadcast.store import MODEL_NAME, Store
from shoal.broadcast.tensors import TensorView, chunks_of
from shoal.errors import RecordError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity, node_id_of
from shoal.fabric.service import Request, Service
from shoal.protocol.codec import encode
from shoal.protocol.snapshot import HASH_BYTES

LATEST = "latest"


class ChunkGone(RecordError):
    """A chunk that this node does not hold, or holds no longer."""


def write_snapshot(
    store: Store,
    identity: Identity,
    model: str,
    version: int,
    tensors: Mapping[str, TensorView],
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Published:
    """Put a whole version of `model`, signed by `identity`, into `store` as the successor of its newest version.

    Raises:
        RecordError: the version is not newer than the newest in the store, or `identity` is not the trusted signer.
        StorageError: the disk is full or cannot be written.
    """
    parent = store.latest(model)
    if parent is not None and parent.manifest.version >= version:
        raise RecordError(
            f"version {version} of {model!r} is not newer than version {parent.manifest.version}, which is published."
        )
    manifest = build_manifest(
        store.run, model, version, parent.hash if parent else b"", tensors, chunk_bytes=chunk_bytes
    )
    for entry in manifest.tensors:
        data = tensors[entry.name].data
        for digest, chunk in zip(entry.chunks, chunks_of(data, chunk_bytes), strict=True):
            store.put_chunk(chunk, digest)
    return store.put_manifest(sign_manifest(manifest, identity))


class Publisher:
    """Serves a store over a fabric until the fabric closes."""

    def __init__(self, fabric: Fabric, store: Store, *, allow: Callable[[bytes], bool] | None = None) -> None:
        self._fabric = fabric
        self._store = store
        self._allow = allow
        self._services: list[Service] = []
        self.chunk_bytes_served = 0

    async def start(self) -> None:
        """Begin to answer."""
        node = f"node/{self._fabric.identity.node_id}"
        serve = self._fabric.serve
        # A handler holds one chunk in memory; the backlog is small questions only.
        self._services = [
            await serve(f"{node}/chunk/*", self._chunk, max_bytes=0, concurrency=8, backlog=256, allow=self._allow),
            await serve(f"{node}/manifest/*/*", self._manifest, max_bytes=0, concurrency=8, allow=self._allow),
        ]

    async def close(self) -> None:
        """Stop answering."""
        await asyncio.gather(*(service.close() for service in self._services))

    async def announce(self, model: str, version: int) -> None:
        """Tell subscribers that `version` of `model` can be fetched here."""
        await self._fabric.publish(announcement_topic(self._fabric.identity.node_id, model), b"%d" % version)

    async def _chunk(self, request: Request) -> bytes:
        name = request.key.rpartition("/")[2]
        try:
            digest = bytes.fromhex(name)
        except ValueError:
            digest = b""
        data = await asyncio.to_thread(self._store.get_chunk, digest) if len(digest) == HASH_BYTES else None
        if data is None:
            raise ChunkGone(f"this node does not hold chunk {name[:16]}….")
        self.chunk_bytes_served += len(data)
        return data

    async def _manifest(self, request: Request) -> bytes:
        """The signed manifest; empty if there is none."""
        model, version = request.key.split("/")[-2:]
        if not MODEL_NAME.fullmatch(model):
            raise RecordError(f"{model!r} cannot name a model.")
        if version == LATEST:
            published = await asyncio.to_thread(self._store.latest, model)
        elif version.isascii() and version.isdigit() and len(version) <= 12:
            published = await asyncio.to_thread(self._store.manifest, model, int(version))
        else:
            raise RecordError(f"{version!r} is no version.")
        return b"" if published is None else encode(published.signed)


def announcement_topic(node_id: str, model: str) -> str:
    """Where the node with this id says what is new."""
    return f"node/{node_id}/announce/{model}"


@asynccontextmanager
async def announcements(fabric: Fabric, source: bytes, model: str) -> AsyncIterator[AsyncIterator[int]]:
    """Versions of `model` that the node with public key `source` announces, while inside the context."""

    def is_source(key: bytes) -> bool:
        return key == source

    async with fabric.subscribe(announcement_topic(node_id_of(source), model), 16, allow=is_source) as stream:

        async def versions() -> AsyncIterator[int]:
            async for message in stream:
                if message.body.isdigit() and len(message.body) <= 12:
                    yield int(message.body)

        yield versions()
