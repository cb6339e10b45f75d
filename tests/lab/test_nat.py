"""The NAT: a node's own traffic comes back unchanged, nobody else's comes in, checksums stay right."""

from __future__ import annotations

import random
import socket
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packets import ICMP, TCP, UDP, ends, is_sound, packet

from shoal.lab import nat as nat_module
from shoal.lab.nat import IDLE_S, MAX_SESSIONS, Nat

HOME, PUBLIC, ROUTER, OTHER = "192.168.1.2", "10.77.0.1", "10.77.0.2", "10.77.0.3"

Kind = Literal["cone", "symmetric"]
kinds = st.sampled_from(["cone", "symmetric"])
port = st.integers(1, 65535)


def made(kind: Kind = "cone") -> Nat:
    return Nat(socket.inet_aton(HOME), socket.inet_aton(PUBLIC), kind, random.Random(1))


@given(
    kinds,
    st.sampled_from([TCP, UDP]),
    st.tuples(port, port),
    st.binary(max_size=64),
    st.sampled_from([b"", b"\1\1\1\1"]),
    st.booleans(),
)
def test_round_trip(
    kind: Kind, protocol: int, ports: tuple[int, int], payload: bytes, options: bytes, udp_checksum: bool
) -> None:
    nat = made(kind)
    sent = packet(HOME, ROUTER, protocol, ports, payload, options=options, udp_checksum=udp_checksum)
    assert is_sound(sent)
    out = nat.outbound(sent, 0.0)
    assert out is not None and is_sound(out) and len(out) == len(sent)
    source, target, source_port, target_port = ends(out)
    assert (source, target, target_port) == (PUBLIC, ROUTER, ports[1])
    assert kind == "symmetric" or source_port == ports[0]
    answer = packet(ROUTER, PUBLIC, protocol, (target_port, source_port), payload, udp_checksum=udp_checksum)
    back = nat.inbound(answer, 1.0)
    assert back is not None and is_sound(back)
    assert back == packet(ROUTER, HOME, protocol, (ports[1], ports[0]), payload, udp_checksum=udp_checksum)


def test_ping_goes_out_and_its_answer_comes_back() -> None:
    nat = made()
    out = nat.outbound(packet(HOME, ROUTER, ICMP, (77, 0), b"data"), 0.0)
    assert out is not None and is_sound(out)
    back = nat.inbound(packet(ROUTER, PUBLIC, ICMP, (77, 0), b"data", echo_type=0), 0.1)
    assert back == packet(ROUTER, HOME, ICMP, (77, 0), b"data", echo_type=0)
    assert nat.inbound(packet(ROUTER, PUBLIC, ICMP, (77, 0)), 0.2) is None  # a ping to us


@given(kinds, st.sampled_from([TCP, UDP]), port, port, port)
def test_only_who_was_asked_may_answer(kind: Kind, protocol: int, mine: int, theirs: int, stranger: int) -> None:
    nat = made(kind)
    assert nat.inbound(packet(ROUTER, PUBLIC, protocol, (theirs, mine)), 0.0) is None
    out = nat.outbound(packet(HOME, ROUTER, protocol, (mine, theirs)), 0.0)
    assert out is not None
    public_port = ends(out)[2]
    assert nat.inbound(packet(OTHER, PUBLIC, protocol, (theirs, public_port)), 0.0) is None
    other_protocol = TCP + UDP - protocol
    assert nat.inbound(packet(ROUTER, PUBLIC, other_protocol, (theirs, public_port)), 0.0) is None
    let_in = nat.inbound(packet(ROUTER, PUBLIC, protocol, (stranger, public_port)), 0.0) is not None
    assert let_in == (stranger == theirs)
    assert nat.refused_packets == (3 if let_in else 4)


def test_mapping_by_kind() -> None:
    ports = {}
    for kind in ("cone", "symmetric"):
        nat = made(kind)  # type: ignore[arg-type]
        seen = [nat.outbound(packet(HOME, target, UDP, (5000, 80)), 0.0) for target in (ROUTER, OTHER)]
        ports[kind] = [ends(out)[2] for out in seen if out is not None]
    assert ports["cone"] == [5000, 5000]
    assert len(set(ports["symmetric"])) == 2


def test_sessions_end_by_idle_time_and_restart() -> None:
    nat = made()
    sent, answer = packet(HOME, ROUTER, UDP, (1, 2)), packet(ROUTER, PUBLIC, UDP, (2, 1))
    nat.outbound(sent, 0.0)
    assert nat.inbound(answer, IDLE_S[UDP] - 1) is not None  # which renews it
    assert nat.inbound(answer, 2 * IDLE_S[UDP] - 2) is not None
    assert nat.inbound(answer, 4 * IDLE_S[UDP]) is None
    assert nat.outbound(sent, 4 * IDLE_S[UDP]) is not None
    assert nat.inbound(answer, 4 * IDLE_S[UDP]) is not None
    nat.forget()
    assert nat.inbound(answer, 4 * IDLE_S[UDP]) is None


@given(kinds, st.lists(st.tuples(st.integers(1, 8), st.sampled_from([ROUTER, OTHER]), st.integers(1, 3)), max_size=60))
def test_tables_are_bounded_and_public_ports_unambiguous(kind: Kind, flows: list[tuple[int, str, int]]) -> None:
    nat = made(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nat_module, "MAX_SESSIONS", 6)
        for time, (private, target, remote_port) in enumerate(flows):
            out = nat.outbound(packet(HOME, target, UDP, (private, remote_port)), float(time))
            assert out is not None
            assert nat.num_sessions <= 6
            back = nat.inbound(packet(target, PUBLIC, UDP, (remote_port, ends(out)[2])), float(time))
            assert back is not None and ends(back)[3] == private
    assert MAX_SESSIONS > 6


def test_fragments_follow_their_first() -> None:
    nat = made()
    nat.outbound(packet(HOME, ROUTER, UDP, (1, 2), b"x" * 80, fragment=0x2000), 0.0)
    later = nat.outbound(packet(HOME, ROUTER, UDP, payload=b"y" * 80, fragment=11), 0.0)
    assert later == packet(PUBLIC, ROUTER, UDP, payload=b"y" * 80, fragment=11)
    stray = packet(ROUTER, PUBLIC, UDP, payload=b"z" * 80, fragment=11, ident=5)
    assert nat.inbound(stray, 0.0) is None
    assert nat.inbound(packet(ROUTER, PUBLIC, UDP, (2, 1), b"x" * 80, fragment=0x2000, ident=5), 0.0) is not None
    assert nat.inbound(stray, 0.0) == packet(ROUTER, HOME, UDP, payload=b"z" * 80, fragment=11, ident=5)


@given(st.binary(min_size=20, max_size=80))
def test_rubbish_is_survived(data: bytes) -> None:
    nat = made()
    header = bytes([0x45]) + data[1:12]
    nat.outbound(header + socket.inet_aton(HOME) + data[16:], 0.0)
    nat.inbound(header + data[12:16] + socket.inet_aton(PUBLIC) + data[20:], 0.0)


def test_forged_sources_do_not_leave() -> None:
    assert made().outbound(packet(OTHER, ROUTER, UDP), 0.0) is None
