"""The tensors of one version in memory, turned into the next one in place.

    nothing ─ whole bytes ─▶ version 1 ─ change ─▶ version 2 ─ change ─▶ …

Invariants: what is held is a whole version (of the tensors that are wanted) or nothing, also where a chunk turns out to
be missing halfway; tensors are handed out only if each one's hash is what its signed manifest says. Blocking; memory:
the tensors, and one change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from blake3 import blake3

from shoal.broadcast.chain import Holds, Published, Route, body_parts, find_route
from shoal.broadcast.delta import apply_change
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView, view_of
from shoal.errors import RecordError, StorageError
from shoal.protocol.snapshot import DTYPE_BYTES, Body, Manifest, TensorEntry


class Image:
    """Holds one version.

    Args:
        chunk: gives the chunk with a hash, verified, or `None` where it is not to be had.
        holds: which tensors are wanted; by default all.
    """

    def __init__(self, chunk: Callable[[bytes], bytes | None], holds: Holds | None = None) -> None:
        self._chunk = chunk
        self._holds = holds
        self._tensors: dict[str, bytearray] = {}
        self._verified = False
        self.published: Published | None = None
        """The version that is held."""

    def become(self, target: Published, route: Route) -> dict[str, TensorView] | None:
        """The tensors of `target`, which `route` leads to; `None` if a chunk is missing (what is held may then be a
        version on the way). They are valid until the next call.

        Raises:
            RecordError: the signed manifests contradict their own chunks.
        """
        if route.begin is not None and not self._read_whole(route.begin):
            return None
        for published in route.changes:
            assert published.manifest.change is not None
            parts = self._parts(published.manifest, published.manifest.change)
            changes = {entry.name: bytearray(size) for entry, _, size in parts}
            if not self._read(published.manifest.change, [(at, changes[entry.name]) for entry, at, _ in parts]):
                return None
            self._apply(published, changes)
        assert self.published is not None and self.published.hash == target.hash
        if not self._verified:
            self.published = None
            self._verify(target)
            self.published, self._verified = target, True
        return {
            entry.name: view_of(entry.dtype, entry.shape, self._tensors[entry.name])
            for entry in target.manifest.tensors
            if entry.name in self._tensors
        }

    def _parts(self, manifest: Manifest, body: Body) -> list[tuple[TensorEntry, int, int]]:
        """Of the tensors that are wanted."""
        holds = self._holds
        return [part for part in body_parts(manifest, body) if holds is None or holds(part[0].name)]

    def _read_whole(self, published: Published) -> bool:
        manifest = published.manifest
        assert manifest.whole is not None
        self.published, self._verified = None, False
        parts = self._parts(manifest, manifest.whole)
        self._tensors = {entry.name: bytearray(size) for entry, _, size in parts}
        if not self._read(manifest.whole, [(at, self._tensors[entry.name]) for entry, at, _ in parts]):
            return False
        self.published = published
        return True

    def _apply(self, published: Published, changes: Mapping[str, bytearray]) -> None:
        """Turn what is held into its child."""
        assert self.published is not None
        self.published, self._verified = None, False  # If this fails halfway, the tensors are of no version.
        for entry in published.manifest.tensors:
            if entry.name in changes:
                change, tensor = memoryview(changes[entry.name]), memoryview(self._tensors[entry.name])
                apply_change(change, tensor, DTYPE_BYTES[entry.dtype])
        self.published = published

    def _verify(self, published: Published) -> None:
        for entry in published.manifest.tensors:
            if entry.name in self._tensors and blake3(self._tensors[entry.name]).digest() != entry.hash:
                # Every chunk was right, so the signed manifest contradicts itself.
                raise RecordError(f"tensor {entry.name!r} does not have the hash that its manifest gives.")

    def _read(self, body: Body, parts: Iterable[tuple[int, bytearray]]) -> bool:
        """Fill buffers from where they begin in a body's stream; whether all chunks of them were to be had."""
        number, chunk = -1, memoryview(b"")
        for begin, buffer in parts:
            at, target = 0, memoryview(buffer)
            while at < len(target):
                wanted, skipped = divmod(begin + at, body.chunk_bytes)
                if wanted != number:
                    data = self._chunk(body.chunks[wanted])
                    if data is None:
                        return False
                    number, chunk = wanted, memoryview(data)
                count = min(len(chunk) - skipped, len(target) - at)
                if count <= 0:
                    raise RecordError("a snapshot's chunks do not cover its bytes.")
                target[at : at + count] = chunk[skipped : skipped + count]
                at += count
        return True


def read_version(store: Store, model: str, version: int) -> dict[str, TensorView]:
    """The tensors of a version that a store holds, verified.

    Raises:
        StorageError: it is not there, or damaged.
    """
    part = store.chain(model, version)
    route = find_route(part, None) if part else None
    tensors = Image(store.get_chunk).become(part[0], route) if route is not None else None
    if tensors is None:
        raise StorageError(f"version {version} of {model!r} is not whole in {store.directory}.", "Fetch it again.")
    return tensors
