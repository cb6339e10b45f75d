"""The tensors of one version in memory, turned into the next one in place.

    nothing ─ whole bytes ─▶ version 1 ─ change ─▶ version 2 ─ change ─▶ …

Invariants: what is held is a whole version or nothing, also where a chunk turns out to be missing halfway; tensors are
handed out only if each one's hash is what its signed manifest says. Blocking; memory: the tensors, and one change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from blake3 import blake3

from shoal.broadcast.chain import Published, Route, find_route
from shoal.broadcast.delta import apply_change
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView, view_of
from shoal.errors import RecordError, StorageError
from shoal.protocol.snapshot import DTYPE_BYTES, Body


class Image:
    """Holds one version.

    Args:
        chunk: gives the chunk with a hash, verified, or `None` where it is not to be had.
    """

    def __init__(self, chunk: Callable[[bytes], bytes | None]) -> None:
        self._chunk = chunk
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
            change = bytearray(published.manifest.change.num_bytes)
            if not self._read(published.manifest.change, [memoryview(change)]):
                return None
            self._apply(published, memoryview(change))
        assert self.published is not None and self.published.hash == target.hash
        if not self._verified:
            self.published = None
            self._verify(target)
            self.published, self._verified = target, True
        return {
            entry.name: view_of(entry.dtype, entry.shape, self._tensors[entry.name])
            for entry in target.manifest.tensors
        }

    def _read_whole(self, published: Published) -> bool:
        assert published.manifest.whole is not None
        self.published, self._verified = None, False
        self._tensors = {entry.name: bytearray(entry.num_bytes) for entry in published.manifest.tensors}
        if not self._read(published.manifest.whole, map(memoryview, self._tensors.values())):
            return False
        self.published = published
        return True

    def _apply(self, published: Published, change: memoryview) -> None:
        """Turn what is held into its child."""
        assert self.published is not None and published.manifest.change is not None
        self.published, self._verified = None, False  # If this fails halfway, the tensors are of no version.
        at = 0
        for entry, size in zip(published.manifest.tensors, published.manifest.change.sizes, strict=True):
            apply_change(change[at : at + size], memoryview(self._tensors[entry.name]), DTYPE_BYTES[entry.dtype])
            at += size
        self.published = published

    def _verify(self, published: Published) -> None:
        for entry in published.manifest.tensors:
            if blake3(self._tensors[entry.name]).digest() != entry.hash:
                # Every chunk was right, so the signed manifest contradicts itself.
                raise RecordError(f"tensor {entry.name!r} does not have the hash that its manifest gives.")

    def _read(self, body: Body, buffers: Iterable[memoryview]) -> bool:
        """Fill the buffers with a body's stream; whether all its chunks were to be had."""
        chunk, digests = memoryview(b""), iter(body.chunks)
        for buffer in buffers:
            at = 0
            while at < len(buffer):
                if not chunk:
                    digest = next(digests, None)
                    data = b"" if digest is None else self._chunk(digest)
                    if data is None:
                        return False
                    if not data:
                        raise RecordError("a snapshot's chunks do not cover its bytes.")
                    chunk = memoryview(data)
                count = min(len(chunk), len(buffer) - at)
                buffer[at : at + count] = chunk[:count]
                chunk, at = chunk[count:], at + count
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
