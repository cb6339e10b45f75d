"""Sealing: only the recipient opens, only for the purpose, and nothing that was touched."""

from __future__ import annotations

import secrets

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.fabric import sealing
from shoal.fabric.envelope import (
    SIGNATURE_BYTES,
    Envelope,
    Header,
    Seal,
    check_envelope,
    open_body,
    read_header,
    write_envelope,
)
from shoal.fabric.errors import EnvelopeError
from shoal.fabric.hello import KnownKeys
from shoal.fabric.identity import Identity
from shoal.fabric.sealing import OVERHEAD_BYTES, SealError, SealingKey, key_print

OURS, THEIRS, OTHER = SealingKey.generate(), SealingKey.generate(), SealingKey.generate()
SENDER, READER = Identity(b"sender".ljust(32)), Identity(b"reader".ljust(32))
NOW = 1.8e9


@given(st.binary(max_size=2000), st.binary(min_size=16, max_size=16), st.binary(max_size=50))
def test_round_trip(plaintext: bytes, nonce: bytes, header: bytes) -> None:
    sealed = OURS.pair(THEIRS.public_key).seal(plaintext, nonce, header)
    assert THEIRS.pair(OURS.public_key).open(sealed, nonce, header) == plaintext
    assert len(sealed) == len(plaintext) + OVERHEAD_BYTES
    assert len(plaintext) < 8 or plaintext not in sealed


def test_others_and_other_purposes() -> None:
    nonce = secrets.token_bytes(16)
    sealed = OURS.pair(THEIRS.public_key).seal(b"a prompt", nonce, b"lease 1")
    theirs = THEIRS.pair(OURS.public_key)
    assert theirs.open(sealed, nonce, b"lease 1") == b"a prompt"
    for pair, number, header in (
        (OTHER.pair(OURS.public_key), nonce, b"lease 1"),
        (THEIRS.pair(OTHER.public_key), nonce, b"lease 1"),
        (OURS.pair(THEIRS.public_key), nonce, b"lease 1"),  # its own words, played back to it
        (theirs, nonce, b"lease 2"),
        (theirs, bytes(16), b"lease 1"),
    ):
        with pytest.raises(SealError):
            pair.open(sealed, number, header)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_changed(where: int, change: int) -> None:
    sealed = bytearray(OURS.pair(THEIRS.public_key).seal(b"twenty bytes or more", bytes(16), b""))
    sealed[where % len(sealed)] ^= change
    with pytest.raises(SealError):
        THEIRS.pair(OURS.public_key).open(bytes(sealed), bytes(16), b"")


@given(st.binary(max_size=100))
def test_hostile(data: bytes) -> None:
    with pytest.raises(SealError):
        OURS.pair(THEIRS.public_key).open(data, bytes(16), b"")


@pytest.mark.parametrize("key", [bytes(32), b"short", b""])
def test_useless_keys(key: bytes) -> None:
    with pytest.raises(SealError, match="cannot be used"):
        OURS.pair(key)


def test_known_pairs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "MAX_PAIRS", 3)
    ours, others = SealingKey.generate(), [SealingKey.generate().public_key for _ in range(5)]
    first = ours.pair(others[0])
    for other in others:
        ours.pair(other)
    assert len(ours._pairs) == 3 and ours.pair(others[0]) == first


def test_known_keys_are_bounded_and_forgotten() -> None:
    known = KnownKeys(capacity=2)
    for node in (b"a", b"b"):
        known.learn(node, b"key of " + node)
    assert known.get(b"a") == b"key of a"
    known.learn(b"c", b"key of c")
    assert (known.get(b"a"), known.get(b"b"), known.get(b"c")) == (b"key of a", None, b"key of c")
    known.forget(b"a", b"an older key")
    assert known.get(b"a") == b"key of a"
    known.forget(b"a", b"key of a")
    assert known.get(b"a") is None


def write(body: bytes = b"a prompt", sender: Identity = SENDER, own: SealingKey = OURS) -> Envelope:
    return write_envelope(
        sender,
        "request",
        "a/key",
        body,
        now=NOW,
        to=READER.public_key,
        deadline_s=1.0,
        seal=Seal(own, THEIRS.public_key),
    )


def read(envelope: Envelope, own: SealingKey = THEIRS) -> bytes:
    header = read_header(envelope.attachment)
    check_envelope(header, envelope.attachment, envelope.body, kinds=("request",), key="a/key")
    return open_body(header, envelope.attachment, envelope.body, own)


@given(st.binary(max_size=1000))
def test_envelope_round_trip(body: bytes) -> None:
    envelope = write(body)
    assert read(envelope) == body and len(envelope.body) == len(body) + OVERHEAD_BYTES
    assert envelope.header.sealed_to == key_print(THEIRS.public_key) == THEIRS.print


def test_same_words_never_look_the_same() -> None:
    assert len({write().body for _ in range(50)}) == 50


def test_key_of_an_earlier_life() -> None:
    with pytest.raises(EnvelopeError, match="another key") as caught:
        read(write(), SealingKey.generate())
    assert caught.value.kind == "seal"


def resigned(envelope: Envelope, sender: Identity, **changes: object) -> Envelope:
    """The same sealed body under a header that somebody else wrote and signed."""
    header = msgspec.structs.replace(envelope.header, sender=sender.public_key, **changes)
    again = write_envelope(sender, "request", "a/key", envelope.body, now=NOW)
    encoded = msgspec.msgpack.encode(header)
    from blake3 import blake3

    from shoal.fabric.envelope import DOMAIN

    signature = sender.sign(DOMAIN + encoded + blake3(envelope.body).digest())
    assert len(again.attachment) > SIGNATURE_BYTES == len(signature)
    return Envelope(header, encoded + signature, envelope.body)


def test_sealed_words_cannot_be_passed_off_as_ones_own() -> None:
    thief = Identity.generate()
    assert read(resigned(write(), SENDER)) == b"a prompt"
    for stolen in (
        resigned(write(), thief),
        resigned(write(), thief, sealed_by=OTHER.public_key),
        resigned(write(), SENDER, to=thief.public_key),
        resigned(write(), SENDER, answers=bytes(16)),
        resigned(write(), SENDER, nonce=bytes(16)),
        resigned(write(), SENDER, deadline_s=9.0),
    ):
        with pytest.raises(EnvelopeError) as caught:
            read(stolen)
        assert caught.value.kind == "seal"


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=60))
def test_hostile_sealing_keys_and_bodies(sealed_by: bytes, body: bytes) -> None:
    header = Header(1, "request", "a/key", SENDER.public_key, bytes(16), NOW, sealed_by=sealed_by, sealed_to=OURS.print)
    with pytest.raises(EnvelopeError) as caught:
        open_body(header, msgspec.msgpack.encode(header) + bytes(64), body, OURS)
    assert caught.value.kind == "seal"
