"""Join requests: each thing that can be wrong has its own refusal."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import PROTOCOL_VERSION
from shoal.errors import RecordError
from shoal.fabric.identity import Identity
from shoal.fabric.join import JOIN_WINDOW_S, REASONS, check_join_request, make_join_request, read_join_request
from shoal.fabric.ticket import Ticket
from shoal.protocol.codec import encode
from shoal.protocol.node import JoinRequest

RUN, SECRET, NOW = "a run", b"0123456789abcdef", 1.8e9
TICKET = Ticket(PROTOCOL_VERSION, RUN, ("tls/192.0.2.1:7447",), bytes(32), SECRET)
ASKER = Identity.generate()


def make(**kw: object) -> JoinRequest:
    return make_join_request(ASKER, TICKET, "worker", "a name", now=NOW, **kw)  # type: ignore[arg-type]


def check(request: JoinRequest, **kw: object) -> str | None:
    expected = {"run": RUN, "secret": SECRET, "now": NOW, "seen_nonces": frozenset()} | kw
    return check_join_request(request, **expected)  # type: ignore[arg-type]


@given(st.floats(-JOIN_WINDOW_S, JOIN_WINDOW_S), st.text(max_size=30), st.integers(0, 1024))
def test_good_request_is_admitted(skew_s: float, device: str, threads: int) -> None:
    request = make(device=device, threads=threads)
    assert read_join_request(encode(request)) == request
    assert check(request, now=NOW + skew_s) is None
    assert check(request, sender_key=ASKER.public_key) is None


def test_each_fault_has_its_own_refusal() -> None:
    good = make()
    assert check(good, secret=b"another secret!!") == "secret"
    assert check(good, run="another run") == "run"
    assert check(good, now=NOW + JOIN_WINDOW_S + 1) == "clock"
    assert check(good, now=NOW - JOIN_WINDOW_S - 1) == "clock"
    assert check(good, seen_nonces={good.nonce}) == "replay"
    assert check(good, sender_key=Identity.generate().public_key) == "signature"
    assert check(msgspec.structs.replace(good, signature=bytes(64))) == "signature"
    assert check(msgspec.structs.replace(good, protocol_version=PROTOCOL_VERSION + 1)) == "version"


def test_clock_that_is_no_number() -> None:
    request = make_join_request(ASKER, TICKET, "worker", "a name", now=math.nan)
    assert check(request) == "clock"


@given(st.data())
def test_no_field_can_be_changed(data: st.DataObject) -> None:
    good = make()
    change = data.draw(
        st.sampled_from(
            [
                {"role": "learner"},
                {"name": "other"},
                {"device": "cuda"},
                {"threads": 2},
                {"sent_at": NOW + 1},
                {"nonce": bytes(16)},
                {"public_key": Identity(bytes(32)).public_key},
                {"proof": bytes(32)},
                {"signature": bytes(64)},
            ]
        )
    )
    assert check(msgspec.structs.replace(good, **change)) in ("secret", "signature")


def test_who_knows_the_secret_cannot_speak_for_another_key() -> None:
    theirs = make_join_request(Identity.generate(), TICKET, "worker", "a name", now=NOW)
    assert check(msgspec.structs.replace(theirs, public_key=ASKER.public_key)) in ("secret", "signature")


def test_other_version_is_answered_in_words_whatever_its_shape() -> None:
    newer = msgspec.msgpack.encode({"protocol_version": PROTOCOL_VERSION + 1, "unheard": ["of"], "run": 7})
    assert read_join_request(newer) == "version"
    assert "install the same one" in REASONS["version"]


@given(st.binary(max_size=400))
def test_hostile_bytes(data: bytes) -> None:
    with pytest.raises(RecordError):
        read_join_request(data)


def test_oversized_request() -> None:
    with pytest.raises(RecordError, match="exceeds"):
        read_join_request(bytes(5000))
