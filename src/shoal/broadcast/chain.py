"""The chain of manifests: what a version is made of, who says so, and which version it follows.

Pure. Invariants: `open_manifest` returns a manifest only if the trusted key signed these very bytes for this run;
`follows` holds only for a later version of the same model whose parent hash is the hash of the parent's bytes, so
that a signer cannot quietly rewrite history that a node has seen; a `Route` leads from what a node holds, or from
whole bytes, to the version asked for over changes that follow each other without a gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from blake3 import blake3

from shoal.broadcast.tensors import TensorView, chunks_of
from shoal.errors import RecordError
from shoal.fabric.identity import Identity, verify
from shoal.protocol.codec import decode, encode
from shoal.protocol.snapshot import Body, Manifest, SignedManifest, TensorEntry

MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 16 * 2**10, 128 * 2**10
USUAL_CHUNKS = 512
"""A body has about as many, so that its parts can be passed on by many while others are still to come; at most 128 KiB
each (at 5 Mb/s one takes 0.2 s), at least 16 KiB, so that a chunk's hash and its request are nothing beside it."""

WHOLE_COSTS = 1.25
"""What a byte of a whole snapshot counts beside one of a change: a change comes from all who follow the chain, a whole
snapshot perhaps from the learner alone."""

DOMAIN = b"shoal manifest 1"


class Published(NamedTuple):
    """A manifest that was checked, with the bytes that were signed and their hash."""

    signed: SignedManifest
    manifest: Manifest
    hash: bytes


class Route(NamedTuple):
    """How to come to a version: from the whole bytes of `begin`, or else from a version that is held already, over
    the changes of each of `changes` in turn."""

    begin: Published | None
    changes: tuple[Published, ...]

    @property
    def versions(self) -> tuple[Published, ...]:
        """Those on the way, the one asked for last; none if it is held already."""
        return (*([] if self.begin is None else [self.begin]), *self.changes)

    @property
    def bodies(self) -> Iterator[tuple[Published, Body]]:
        """What must be fetched, in the order in which it is needed, and the version that it belongs to."""
        if self.begin is not None:
            assert self.begin.manifest.whole is not None
            yield self.begin, self.begin.manifest.whole
        for published in self.changes:
            assert published.manifest.change is not None
            yield published, published.manifest.change

    @property
    def num_bytes(self) -> int:
        return sum(body.num_bytes for _, body in self.bodies)


Holds = Callable[[str], bool]
"""Whether a node wants the tensor of this name."""


def chunks_for(manifest: Manifest, body: Body, holds: Holds | None) -> Iterator[tuple[bytes, int]]:
    """Hash and size of the chunks of one of a manifest's bodies that have bytes of wanted tensors, in order."""
    if holds is None:
        yield from body.chunk_sizes()
        return
    needed: set[int] = set()
    for entry, at, size in body_parts(manifest, body):
        if size and holds(entry.name):
            needed.update(range(at // body.chunk_bytes, (at + size - 1) // body.chunk_bytes + 1))
    for number, one in enumerate(body.chunk_sizes()):
        if number in needed:
            yield one


def body_parts(manifest: Manifest, body: Body) -> Iterator[tuple[TensorEntry, int, int]]:
    """Each tensor, and where in the body its part begins and how long it is."""
    at = 0
    for entry, size in zip(manifest.tensors, body.sizes, strict=True):
        yield entry, at, size
        at += size


def chunk_bytes_of(num_bytes: int) -> int:
    """The size of the chunks of a body of so many bytes: a power of two."""
    size = MIN_CHUNK_BYTES
    while size < MAX_CHUNK_BYTES and size * USUAL_CHUNKS < num_bytes:
        size *= 2
    return size


def entry_of(name: str, view: TensorView) -> TensorEntry:
    """What a manifest says of a tensor."""
    return TensorEntry(name=name, dtype=view.dtype, shape=view.shape, hash=blake3(view.data).digest())


def build_manifest(
    run: str,
    model: str,
    version: int,
    parent_hash: bytes,
    tensors: Mapping[str, TensorView],
    *,
    chunk_bytes: int | None = None,
) -> Manifest:
    """The manifest of a whole snapshot."""
    views = dict(sorted(tensors.items()))
    chunk_bytes = chunk_bytes or chunk_bytes_of(sum(view.num_bytes for view in views.values()))
    whole = Body(
        sizes=tuple(view.num_bytes for view in views.values()),
        chunk_bytes=chunk_bytes,
        chunks=tuple(
            blake3(chunk).digest() for chunk in chunks_of((view.data for view in views.values()), chunk_bytes)
        ),
    )
    entries = tuple(entry_of(name, view) for name, view in views.items())
    manifest = Manifest(run=run, model=model, version=version, parent=parent_hash, tensors=entries, whole=whole)
    manifest.check()
    return manifest


def sign_manifest(manifest: Manifest, identity: Identity) -> SignedManifest:
    """The manifest's bytes under the signature of `identity`."""
    data = encode(manifest)
    return SignedManifest(manifest=data, signer=identity.public_key, signature=identity.sign(DOMAIN + data))


def open_manifest(signed: SignedManifest, trusted_key: bytes, run: str) -> Published:
    """The manifest inside, if `trusted_key` signed it for `run`.

    Raises:
        RecordError: another signer, a signature that does not fit, another run, or no manifest.
    """
    if signed.signer != trusted_key:
        raise RecordError("a manifest is signed by another key than this run's learner.")
    if not verify(trusted_key, DOMAIN + signed.manifest, signed.signature):
        raise RecordError("a manifest's signature does not fit its bytes.")
    manifest = decode(signed.manifest, Manifest)
    if manifest.run != run:
        raise RecordError(f"a manifest is for run {manifest.run!r}, not {run!r}.")
    return Published(signed, manifest, manifest_hash(signed))


def manifest_hash(signed: SignedManifest) -> bytes:
    """What a child names as its parent: the BLAKE3 hash of the manifest's bytes."""
    return blake3(signed.manifest).digest()


def follows(parent: Published, child: Manifest) -> bool:
    """Whether `child` may come after `parent` on one chain."""
    return (
        child.run == parent.manifest.run
        and child.model == parent.manifest.model
        and child.version > parent.manifest.version
        and child.parent == parent.hash
    )


def check_chain(part: Sequence[Published]) -> None:
    """Refuse manifests, newest first, that do not each follow the next one.

    Raises:
        RecordError: as it says.
    """
    for child, parent in pairwise(part):
        if not follows(parent, child.manifest):
            raise RecordError(
                f"version {child.manifest.version} does not follow version {parent.manifest.version} on the chain."
            )


def find_route(part: Sequence[Published], held: Published | None) -> Route | None:
    """The cheapest way to the first of `part` (a chain, newest first) for a node that holds `held`.

    `None` if there is no way: the chain ends before it reaches whole bytes, or what is held.
    """
    routes: list[Route] = []
    changes: list[Published] = []
    for published in part:
        if held is not None and published.hash == held.hash:
            routes.append(Route(None, tuple(changes)))
        if published.manifest.whole is not None:
            routes.append(Route(published, tuple(changes)))
        if published.manifest.change is None:
            break
        changes.insert(0, published)
        if held is not None and published.manifest.parent == held.hash and _keeps_layout(held, published):
            routes.append(Route(None, tuple(changes)))
    return min((route for route in routes if _is_sound(route)), key=_cost, default=None)


def _cost(route: Route) -> float:
    return route.num_bytes * (1.0 if route.begin is None else WHOLE_COSTS)


def _is_sound(route: Route) -> bool:
    """Whether no change on the way begins from tensors of another layout."""
    return all(_keeps_layout(parent, child) for parent, child in pairwise(route.versions))


def _keeps_layout(parent: Published, child: Published) -> bool:
    return [t.layout for t in parent.manifest.tensors] == [t.layout for t in child.manifest.tensors]
