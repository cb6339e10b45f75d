"""Manifests: what is signed is what was there, and nothing else opens."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from shoal.broadcast.chain import build_manifest, follows, manifest_hash, open_manifest, sign_manifest
from shoal.broadcast.tensors import TensorView, chunks_of, view_of
from shoal.errors import RecordError
from shoal.fabric.identity import Identity
from shoal.protocol.snapshot import Manifest, SignedManifest

LEARNER = Identity(b"learner".ljust(32))
buffers = st.dictionaries(st.text("abc.", min_size=1, max_size=5), st.binary(max_size=200), max_size=5)


def build(tensors: dict[str, bytes], version: int = 1, parent: bytes = b"", chunk_bytes: int = 64) -> Manifest:
    views = {name: view_of("U8", (len(data),), data) for name, data in tensors.items()}
    return build_manifest("a run", "policy", version, parent, views, chunk_bytes=chunk_bytes)


@given(buffers, st.integers(1, 80))
def test_hashes_cover_every_byte(tensors: dict[str, bytes], chunk_bytes: int) -> None:
    manifest = build(tensors, chunk_bytes=chunk_bytes)
    assert [entry.name for entry in manifest.tensors] == sorted(tensors)
    stream = b"".join(tensors[name] for name in sorted(tensors))
    pieces = list(chunks_of([tensors[name] for name in sorted(tensors)], chunk_bytes))
    assert b"".join(pieces) == stream and all(len(piece) == chunk_bytes for piece in pieces[:-1])
    assert manifest.whole is not None and manifest.is_anchor
    assert manifest.whole.chunks == tuple(blake3(piece).digest() for piece in pieces)
    assert [size for _, size in manifest.whole.chunk_sizes()] == [len(piece) for piece in pieces]
    for entry in manifest.tensors:
        assert entry.hash == blake3(tensors[entry.name]).digest() and entry.num_bytes == len(tensors[entry.name])


@given(buffers)
def test_sign_and_open(tensors: dict[str, bytes]) -> None:
    manifest = build(tensors)
    signed = sign_manifest(manifest, LEARNER)
    published = open_manifest(signed, LEARNER.public_key, "a run")
    assert published.manifest == manifest and published.hash == manifest_hash(signed)


@given(st.data())
def test_any_changed_bit_is_refused(data: st.DataObject) -> None:
    signed = sign_manifest(build({"a": b"x" * 100}), LEARNER)
    field = data.draw(st.sampled_from(["manifest", "signature", "signer"]))
    raw = bytearray(getattr(signed, field))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RecordError):
        open_manifest(msgspec.structs.replace(signed, **{field: bytes(raw)}), LEARNER.public_key, "a run")


def test_wrong_signer_run_and_content() -> None:
    manifest = build({"a": b"x"})
    with pytest.raises(RecordError, match="another key"):
        open_manifest(sign_manifest(manifest, Identity.generate()), LEARNER.public_key, "a run")
    with pytest.raises(RecordError, match="is for run 'a run'"):
        open_manifest(sign_manifest(manifest, LEARNER), LEARNER.public_key, "another run")
    other = Identity.generate()
    stolen = msgspec.structs.replace(sign_manifest(manifest, other), signer=LEARNER.public_key)
    with pytest.raises(RecordError, match="does not fit"):
        open_manifest(stolen, LEARNER.public_key, "a run")
    garbage = SignedManifest(
        manifest=b"\xc1", signer=LEARNER.public_key, signature=LEARNER.sign(b"shoal manifest 1\xc1")
    )
    with pytest.raises(RecordError, match="should be a Manifest"):
        open_manifest(garbage, LEARNER.public_key, "a run")


def test_follows() -> None:
    parent = open_manifest(sign_manifest(build({"a": b"x"}, version=3), LEARNER), LEARNER.public_key, "a run")
    assert follows(parent, build({}, version=7, parent=parent.hash))
    assert not follows(parent, build({}, version=7, parent=bytes(32)))
    assert not follows(parent, build({}, version=7))
    assert not follows(parent, build({}, version=3, parent=parent.hash))
    other = msgspec.structs.replace(build({}, version=7, parent=parent.hash), model="drafter")
    assert not follows(parent, other)


def test_view_must_fit_its_shape(make_tensors: Callable[[int], dict[str, TensorView]]) -> None:
    assert make_tensors(1)["a"].num_bytes == 60_600
    with pytest.raises(AssertionError, match="has 8 bytes, not 7"):
        view_of("F32", (2,), b"x" * 7)
