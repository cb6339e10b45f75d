"""The sending side: a learner writes versions into a store, and a node serves its store to whoever may read it.

    SnapshotWriter (learner's process, blocking)      Publisher (the node that serves; asyncio)

The writer remembers the tensors of the version it wrote last, and publishes what changed since. It adds the whole
bytes (an anchor) to the first version of its life, when the layout changed, and when the changes since the last
anchor together outweigh it, so that a late joiner never fetches more than twice the model.

Every serving node answers under its own id (`node/ID/chunk/HASH`, `node/ID/chain/MODEL/VERSION/SINCE`), so that a
fetcher chooses whom to ask; an announcement says only which version is new, and whoever hears it fetches.
Invariant: chunks go into the store before the manifest that names them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple

from shoal.broadcast.chain import Published, chunk_bytes_of, entry_of, sign_manifest
from shoal.broadcast.delta import Change, encode_change
from shoal.broadcast.peers import PeerBook
from shoal.broadcast.relay import Relay
from shoal.broadcast.store import MODEL_NAME, Store
from shoal.broadcast.tensors import TensorView, chunks_of
from shoal.errors import RecordError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity, node_id_of
from shoal.fabric.service import Request, Service
from shoal.protocol.codec import decode, encode
from shoal.protocol.snapshot import (
    DTYPE_BYTES,
    HASH_BYTES,
    Body,
    ChainPart,
    Manifest,
    Peer,
    PeerList,
    PeerRecord,
    SignedManifest,
    TensorEntry,
)

LATEST = "latest"

MAX_CHANGES = 100
"""An anchor is due after so many changes, however small: a late joiner applies them one after the other."""

MAX_CHAIN_BYTES = 48 * 2**20
"""Manifests given in one answer; older ones are left out."""


MAX_PEER_BYTES = 1024


class ChunkGone(RecordError):
    """A chunk that this node does not hold, or holds no longer."""


class Size(NamedTuple):
    """What a version weighs."""

    num_values: int
    num_changed: int
    """Values whose bits differ from the parent's; all of them where there is no change to tell."""
    whole_bytes: int
    change_bytes: int
    """What a node fetches that holds the parent; the whole where there is no change."""
    is_anchor: bool


class SnapshotWriter:
    """Writes versions of one model into a store, each the successor of the newest one there. One call at a time.

    Args:
        identity: signs the manifests; its key must be the one that the store trusts.
        chunk_bytes: by default what suits a body's size.
    """

    def __init__(self, store: Store, identity: Identity, model: str, *, chunk_bytes: int | None = None) -> None:
        self._store = store
        self._identity = identity
        self._model = model
        self._chunk_bytes = chunk_bytes
        self._written: Published | None = None
        self._image: dict[str, bytearray] = {}
        """The tensors of `_written`."""
        self._since_anchor: list[int] = []
        """Bytes of each change since the last anchor."""
        self.size: Size | None = None
        """Of the version written last."""

    def write(self, version: int, tensors: Mapping[str, TensorView]) -> Published:
        """Publish `tensors` as `version`.

        Raises:
            RecordError: the version is not newer than the newest in the store, or the store trusts another signer.
            StorageError: the disk is full or cannot be written.
        """
        store, model = self._store, self._model
        parent = store.latest(model)
        if parent is not None and parent.manifest.version >= version:
            raise RecordError(
                f"version {version} of {model!r} is not newer than version {parent.manifest.version}, "
                "which is published."
            )
        views = dict(sorted(tensors.items()))
        held, self._written = self._written, None  # If this fails halfway, the image is of no version.
        change: Body | None = None
        entries: tuple[TensorEntry, ...]
        num_changed = 0
        num_values = sum(view.num_bytes // DTYPE_BYTES[view.dtype] for view in views.values())
        if held is not None and parent is not None and held.hash == parent.hash and _same_layout(held, views):
            changes = [self._advance(name, view) for name, view in views.items()]
            entries = tuple(
                old if not new.data else entry_of(old.name, views[old.name])
                for old, new in zip(held.manifest.tensors, changes, strict=True)
            )
            num_changed = sum(new.num_changed for new in changes)
            change = self._put_body([new.data for new in changes])
        else:
            entries = tuple(entry_of(name, view) for name, view in views.items())
            self._image = {name: bytearray(view.data) for name, view in views.items()}
        whole_bytes = sum(view.num_bytes for view in views.values())
        whole = None
        if change is None or self._is_anchor_due(change.num_bytes, whole_bytes):
            whole = self._put_body([view.data for view in views.values()])
            self._since_anchor.clear()
        else:
            self._since_anchor.append(change.num_bytes)
        manifest = Manifest(
            run=store.run,
            model=model,
            version=version,
            parent=parent.hash if parent else b"",
            tensors=entries,
            whole=whole,
            change=change,
        )
        manifest.check()
        self._written = store.put_manifest(sign_manifest(manifest, self._identity))
        self.size = Size(
            num_values,
            num_values if change is None else num_changed,
            whole_bytes,
            whole_bytes if change is None else change.num_bytes,
            whole is not None,
        )
        return self._written

    def _advance(self, name: str, view: TensorView) -> Change:
        """The change of a tensor; the image then holds the new one."""
        image = memoryview(self._image[name])
        change = encode_change(image, view.data, DTYPE_BYTES[view.dtype])
        if change.data:
            image[:] = view.data
        return change

    def _is_anchor_due(self, change_bytes: int, whole_bytes: int) -> bool:
        return sum(self._since_anchor) + change_bytes > whole_bytes or len(self._since_anchor) + 1 >= MAX_CHANGES

    def _put_body(self, parts: list[bytes] | list[memoryview]) -> Body:
        sizes = tuple(len(part) for part in parts)
        chunk_bytes = self._chunk_bytes or chunk_bytes_of(sum(sizes))
        digests = tuple(self._store.put_chunk(chunk) for chunk in chunks_of(parts, chunk_bytes))
        return Body(sizes=sizes, chunk_bytes=chunk_bytes, chunks=digests)


def _same_layout(held: Published, views: Mapping[str, TensorView]) -> bool:
    return [t.layout for t in held.manifest.tensors] == [(name, *view.layout) for name, view in views.items()]


def write_snapshot(
    store: Store,
    identity: Identity,
    model: str,
    version: int,
    tensors: Mapping[str, TensorView],
    *,
    chunk_bytes: int | None = None,
) -> Published:
    """Publish one version whole; see `SnapshotWriter.write`, which publishes changes."""
    return SnapshotWriter(store, identity, model, chunk_bytes=chunk_bytes).write(version, tensors)


class Publisher:
    """Serves a store over a fabric until the fabric closes.

    Args:
        allow: takes the asker's public key; those it rejects get nothing.
    """

    def __init__(
        self,
        fabric: Fabric,
        store: Store,
        *,
        allow: Callable[[bytes], bool] | None = None,
    ) -> None:
        self._fabric = fabric
        self._store = store
        self.allow = allow
        self._links: tuple[Relay, PeerRecord] | None = None
        self._book = PeerBook()
        self._services: list[Service] = []
        self.chunk_bytes_served = 0

    async def start(self) -> None:
        """Begin to answer."""
        node = f"node/{self._fabric.identity.node_id}"
        serve = self._fabric.serve
        # A handler holds one chunk in memory; the backlog is small questions only.
        self._services = [
            await serve(f"{node}/chunk/*", self._chunk, max_bytes=0, concurrency=8, backlog=1024, allow=self.allow),
            await serve(f"{node}/chain/*/*/*", self._chain, max_bytes=0, concurrency=8, allow=self.allow),
            await serve(f"{node}/peers/*/*", self._peers, max_bytes=MAX_PEER_BYTES, allow=self.allow),
        ]

    async def close(self) -> None:
        """Stop answering."""
        await asyncio.gather(*(service.close() for service in self._services))

    def offer_links(self, relay: Relay, record: PeerRecord) -> None:
        """From now on tell nodes of this node's relay, which listens where `record` says, and of each other, so that
        they pass chunks on."""
        self._links = relay, record

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

    async def _peers(self, request: Request) -> bytes:
        """Note the asker and tell it with whom it shares a version; nothing where chunks are not passed on."""
        if self._links is None:
            return b""
        model, version = request.key.split("/")[-2:]
        if not MODEL_NAME.fullmatch(model):
            raise RecordError(f"{model!r} cannot name a model.")
        now = asyncio.get_running_loop().time()
        self._book.note(request.sender_key, decode(request.body, PeerRecord, max_bytes=MAX_PEER_BYTES), now)
        relay, record = self._links
        own = Peer(public_key=self._fabric.identity.public_key, record=relay.describe(record))
        if version == NOTHING:
            return encode(PeerList(source=own, peers=()))
        return encode(self._book.peers(model, _version_of(version), own, now))

    async def _chain(self, request: Request) -> bytes:
        """The signed manifests from a version back; none if it is not here."""
        model, version, since = request.key.split("/")[-3:]
        if not MODEL_NAME.fullmatch(model):
            raise RecordError(f"{model!r} cannot name a model.")
        held = -1 if since == NOTHING else _version_of(since)
        if version == LATEST:
            newest = await asyncio.to_thread(self._store.latest, model)
            wanted = newest.manifest.version if newest is not None else -1
        else:
            wanted = _version_of(version)
        part = await asyncio.to_thread(self._store.chain, model, wanted, since=held) if wanted >= 0 else []
        return encode(ChainPart(manifests=tuple(_within(MAX_CHAIN_BYTES, (p.signed for p in part)))))


NOTHING = "none"
"""In place of a version: the asker holds none."""


def _version_of(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise RecordError(f"{text!r} is no version.")
    return int(text)


def _within(max_bytes: int, manifests: Iterable[SignedManifest]) -> Iterable[SignedManifest]:
    for signed in manifests:
        max_bytes -= len(signed.manifest)
        if max_bytes < 0:
            return
        yield signed


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
