"""The chain of manifests: what a version is made of, who says so, and which version it follows.

Pure. Invariants: `open_manifest` returns a manifest only if the trusted key signed these very bytes for this run;
`follows` holds only for a later version of the same model whose parent hash is the hash of the parent's bytes, so
that a signer cannot quietly rewrite history that a node has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from blake3 import blake3

from shoal.broadcast.tensors import TensorView, chunks_of
from shoal.errors import RecordError
from shoal.fabric.identity import Identity, verify
from shoal.protocol.codec import decode, encode
from shoal.protocol.snapshot import Manifest, SignedManifest, TensorEntry

CHUNK_BYTES = 4 * 2**20
"""Large enough that a request's cost vanishes, small enough that a lost one is cheap to repeat."""

DOMAIN = b"shoal manifest 1"


class Published(NamedTuple):
    """A manifest that was checked, with the bytes that were signed and their hash."""

    signed: SignedManifest
    manifest: Manifest
    hash: bytes


def build_manifest(
    run: str,
    model: str,
    version: int,
    parent_hash: bytes,
    tensors: Mapping[str, TensorView],
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Manifest:
    """The manifest of a whole snapshot; reads every byte twice (per chunk and per tensor)."""
    entries = tuple(
        TensorEntry(
            name=name,
            dtype=view.dtype,
            shape=view.shape,
            chunk_bytes=chunk_bytes,
            chunks=tuple(blake3(chunk).digest() for chunk in chunks_of(view.data, chunk_bytes)),
            hash=blake3(view.data).digest(),
        )
        for name, view in sorted(tensors.items())
    )
    manifest = Manifest(run=run, model=model, version=version, kind="anchor", parent=parent_hash, tensors=entries)
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
