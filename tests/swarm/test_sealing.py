"""Sealing: only the recipient opens, only for the purpose, and nothing that was touched."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.swarm.sealing import OVERHEAD_BYTES, SealError, SealingKey, seal

KEY, OTHER = SealingKey.generate(), SealingKey.generate()


@given(st.binary(max_size=2000), st.binary(max_size=50))
def test_round_trip(plaintext: bytes, context: bytes) -> None:
    sealed = seal(KEY.public_key, plaintext, context)
    assert KEY.open(sealed, context) == plaintext
    assert len(sealed) == len(plaintext) + OVERHEAD_BYTES
    assert sealed != seal(KEY.public_key, plaintext, context)


def test_others_and_other_purposes() -> None:
    sealed = seal(KEY.public_key, b"a prompt", b"lease 1")
    with pytest.raises(SealError):
        OTHER.open(sealed, b"lease 1")
    with pytest.raises(SealError):
        KEY.open(sealed, b"lease 2")
    assert b"a prompt" not in sealed


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_changed(where: int, change: int) -> None:
    sealed = bytearray(seal(KEY.public_key, b"twenty bytes or more", b"context"))
    sealed[where % len(sealed)] ^= change
    if where % len(sealed) == 31 and change == 0x80:
        # X25519 ignores this bit of a public key, but the key is derived from all of it.
        pass
    with pytest.raises(SealError):
        KEY.open(bytes(sealed), b"context")


@given(st.binary(max_size=100))
def test_hostile(data: bytes) -> None:
    with pytest.raises(SealError):
        KEY.open(data, b"")


def test_useless_keys() -> None:
    for key in (bytes(32), b"short"):
        with pytest.raises(SealError):
            seal(key, b"x", b"")
    with pytest.raises(SealError):
        KEY.open(bytes(32) + b"x" * 40, b"")
    assert KEY.public_key.hex()[:16] in repr(KEY)
