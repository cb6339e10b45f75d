"""Envelopes: believed only when nothing about them was changed."""

from __future__ import annotations

import math

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from shoal.fabric.envelope import (
    DOMAIN,
    ENVELOPE_VERSION,
    Header,
    Refusal,
    ReplayGuard,
    check_envelope,
    read_header,
    write_envelope,
)
from shoal.fabric.errors import EnvelopeError
from shoal.fabric.identity import Identity

SENDER = Identity(b"sender".ljust(32))
NOW = 1.8e9


def refusal_of(attachment: bytes, body: bytes = b"body", key: str = "a/key") -> str | None:
    try:
        header = read_header(attachment)
        check_envelope(header, attachment, body, kinds=("request",), key=key)
    except EnvelopeError as error:
        return error.kind
    return None


def make(body: bytes = b"body", key: str = "a/key") -> bytes:
    return write_envelope(SENDER, "request", key, body, now=NOW, deadline_s=1.0).attachment


@given(st.binary(max_size=1000), st.text(max_size=100))
def test_what_is_signed_is_believed(body: bytes, key: str) -> None:
    header, attachment, wire = write_envelope(SENDER, "request", key, body, now=NOW, to=bytes(32), deadline_s=3.0)
    assert wire == body
    assert read_header(attachment) == header and header.node_id == SENDER.node_id
    check_envelope(header, attachment, body, kinds=("request",), key=key)


@given(st.data())
def test_any_changed_bit_is_refused(data: st.DataObject) -> None:
    attachment = bytearray(make())
    attachment[data.draw(st.integers(0, len(attachment) - 1))] ^= data.draw(st.integers(1, 255))
    assert refusal_of(bytes(attachment)) is not None


def test_other_body_key_kind() -> None:
    assert refusal_of(make()) is None
    assert refusal_of(make(), body=b"other") == "signature"
    assert refusal_of(make(), key="another/key") == "key"
    reply = write_envelope(SENDER, "reply", "a/key", b"body", now=NOW).attachment
    assert refusal_of(reply) == "key"


def test_another_senders_name_on_it() -> None:
    attachment = make()
    header = msgspec.structs.replace(read_header(attachment), sender=Identity.generate().public_key)
    assert refusal_of(msgspec.msgpack.encode(header) + attachment[-64:]) == "signature"


def test_other_version_is_named() -> None:
    encoded = msgspec.msgpack.encode([ENVELOPE_VERSION + 1, {"what": "ever"}])
    signature = SENDER.sign(DOMAIN + encoded + blake3(b"body").digest())
    assert refusal_of(encoded + signature) == "version"


@given(st.binary(max_size=3000))
def test_hostile_attachments(attachment: bytes) -> None:
    assert refusal_of(attachment) in ("malformed", "version")


@pytest.mark.parametrize(
    "change",
    [
        {"sender": b"x"},
        {"nonce": b"x"},
        {"to": b"x"},
        {"answers": b"x"},
        {"sent_at": math.nan},
        {"deadline_s": math.inf},
        {"deadline_s": -1.0},
        {"key": "k" * 600},
        {"sealed_by": bytes(32)},
        {"sealed_to": bytes(8)},
        {"sealed_by": bytes(31), "sealed_to": bytes(8)},
    ],
)
def test_fields_out_of_range(change: dict[str, object]) -> None:
    header = msgspec.structs.replace(read_header(make()), **change)
    assert refusal_of(msgspec.msgpack.encode(header) + bytes(64)) == "malformed"


def header_at(sent_at: float) -> Header:
    return write_envelope(SENDER, "request", "k", b"", now=sent_at).header


def test_guard_admits_once_and_only_the_young() -> None:
    guard = ReplayGuard(window_s=100)
    header = header_at(NOW)
    guard.admit(header, NOW)
    with pytest.raises(EnvelopeError, match="second time") as caught:
        guard.admit(header, NOW + 99)
    assert caught.value.kind == "replay"
    for skew, word in ((-101, "behind"), (101, "ahead")):
        with pytest.raises(EnvelopeError, match=word) as caught:
            guard.admit(header_at(NOW + skew), NOW)
        assert caught.value.kind == "clock"


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(-100, 100), st.booleans()), max_size=60))
def test_no_envelope_passes_twice(steps: list[tuple[float, float, bool]]) -> None:
    """Whatever the order and times: what passed once never passes again."""
    guard, now, passed = ReplayGuard(window_s=100), NOW, list[Header]()
    for wait_s, skew_s, replay in steps:
        now += wait_s
        if replay:
            for header in passed:
                with pytest.raises(EnvelopeError):
                    guard.admit(header, now)
        else:
            passed.append(header_at(now + skew_s))
            guard.admit(passed[-1], now)
    assert guard.num_forgotten == 0


def test_guard_is_bounded_and_forgets_in_time() -> None:
    guard = ReplayGuard(window_s=100, capacity=10)
    for _ in range(15):
        guard.admit(header_at(NOW), NOW)
    assert guard.num_forgotten == 5 and len(guard._until) == 10
    guard.admit(header_at(NOW + 500), NOW + 500)
    assert len(guard._until) == 1


@given(st.binary(max_size=200))
def test_hostile_refusals(body: bytes) -> None:
    assert str(Refusal.to_error(body))


def test_refusal_round_trip() -> None:
    error = Refusal.to_error(Refusal.of("busy", "x" * 10_000, "Wait.").encode())
    assert (error.kind, len(error.problem), error.remedy) == ("busy", 4096, "Wait.")
    assert Refusal.to_error(Refusal("invented", "no").encode()).kind == "refused"
