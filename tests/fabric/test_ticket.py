"""Tickets: round trip, and every way to spoil one."""

from __future__ import annotations

import base64
import string

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from shoal import PROTOCOL_VERSION
from shoal.errors import TicketError
from shoal.fabric.endpoint import Endpoint
from shoal.fabric.ticket import TICKET as LINE
from shoal.fabric.ticket import RouterAddress, Ticket

PREFIX = LINE.prefix
hosts = st.sampled_from(["127.0.0.1", "[::1]", "192.0.2.7", "[2001:db8::7]", "node-1.example.org"])
ports = st.integers(1, 65535)
tls_endpoints = st.builds(lambda host, port: f"tls/{host}:{port}", hosts, ports)
tcp_endpoints = st.builds(lambda port: f"tcp/127.0.0.1:{port}", ports)
routers = st.builds(
    RouterAddress,
    protocol_version=st.just(PROTOCOL_VERSION),
    key=st.binary(min_size=32, max_size=32),
    hosts=st.lists(st.builds("{}:{}".format, hosts, ports), min_size=1, max_size=3).map(tuple),
)
tickets = st.builds(
    Ticket,
    protocol_version=st.just(PROTOCOL_VERSION),
    run=st.text(min_size=1, max_size=60),
    endpoints=st.lists(tls_endpoints | tcp_endpoints, min_size=1, max_size=8).map(tuple),
    coordinator_key=st.binary(min_size=32, max_size=32),
    secret=st.binary(min_size=16, max_size=32),
    routers=st.lists(routers, max_size=4).map(tuple),
)
TICKET = Ticket(PROTOCOL_VERSION, "a run", ("tls/192.0.2.1:7447",), bytes(32), b"s" * 16)


def encode_payload(payload: bytes) -> str:
    data = payload + blake3(b"shoal ticket" + payload).digest(4)
    return PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")


@given(tickets)
def test_round_trip(ticket: Ticket) -> None:
    text = ticket.encode()
    assert Ticket.decode(text) == ticket
    assert Ticket.decode(f"  '{text[:20]}\n  {text[20:]}'\n") == ticket
    assert set(text) <= set(string.ascii_letters + string.digits + "-_")


def test_is_short() -> None:
    assert len(TICKET.encode()) < 140


@given(tickets, st.data())
def test_every_single_typo_is_noticed(ticket: Ticket, data: st.DataObject) -> None:
    text = ticket.encode()
    position = data.draw(st.integers(len(PREFIX), len(text) - 2))
    typed = data.draw(
        st.sampled_from(string.ascii_letters + string.digits + "-_!é").filter(lambda c: c != text[position])
    )
    with pytest.raises(TicketError, match="cut off or mistyped"):
        Ticket.decode(text[:position] + typed + text[position + 1 :])


@given(tickets, st.data())
def test_every_truncation_is_noticed(ticket: Ticket, data: st.DataObject) -> None:
    text = ticket.encode()
    length = data.draw(st.integers(len(PREFIX), len(text) - 2))
    with pytest.raises(TicketError, match="cut off or mistyped"):
        Ticket.decode(text[:length])


@given(st.text(max_size=300))
def test_anything_else_is_no_ticket(text: str) -> None:
    with pytest.raises(TicketError):
        Ticket.decode(text)


@given(st.binary(max_size=300))
def test_hostile_payloads_with_good_checksums(payload: bytes) -> None:
    with pytest.raises(TicketError):
        Ticket.decode(encode_payload(payload))


def test_words_for_each_mistake() -> None:
    with pytest.raises(TicketError, match="not a join ticket"):
        Ticket.decode("https://example.org")
    with pytest.raises(TicketError, match="another version of Shoal"):
        Ticket.decode("shoal2" + TICKET.encode()[6:])
    newer = msgspec.msgpack.encode([PROTOCOL_VERSION + 1, {"of": "another"}, "shape"])
    with pytest.raises(TicketError, match=f"version {PROTOCOL_VERSION + 1}"):
        Ticket.decode(encode_payload(newer))


@pytest.mark.parametrize(
    "change",
    [
        {"endpoints": ()},
        {"endpoints": ("tcp/192.0.2.1:7447",)},
        {"endpoints": ("udp/127.0.0.1:7447",)},
        {"endpoints": ("tls/127.0.0.1",)},
        {"endpoints": ("tls/:1",)},
        {"endpoints": ("tls/a b:1",)},
        {"endpoints": ("tls/127.0.0.1:0",)},
        {"endpoints": ("tls/[nope]:1",)},
        {"endpoints": ("tls/192.0.2.1:1#so_rcvbuf=1",)},
        {"coordinator_key": b"short"},
        {"secret": b"short"},
        {"run": ""},
        {"secret": bytes(65)},
        {"endpoints": ("tls/192.0.2.1:7447",) * 9},
        {"routers": (RouterAddress(PROTOCOL_VERSION, bytes(32), ("192.0.2.1:7447",)),) * 5},
        {"routers": (RouterAddress(PROTOCOL_VERSION, b"short", ("192.0.2.1:7447",)),)},
        {"routers": (RouterAddress(PROTOCOL_VERSION, bytes(32), ("tcp/192.0.2.1:7447",)),)},
        {"routers": (RouterAddress(PROTOCOL_VERSION, bytes(32), ()),)},
        {"routers": (RouterAddress(PROTOCOL_VERSION + 1, bytes(32), ("192.0.2.1:7447",)),)},
    ],
)
def test_unusable_fields(change: dict[str, object]) -> None:
    with pytest.raises(TicketError, match="cannot be used"):
        Ticket.decode(msgspec.structs.replace(TICKET, **change).encode())


def test_for_other_machines_loopback_is_left_out() -> None:
    router = RouterAddress(PROTOCOL_VERSION, bytes(32), ("192.0.2.9:7447",))
    here = msgspec.structs.replace(TICKET, endpoints=("tls/192.0.2.1:7447", "tls/127.0.0.1:7447"))
    assert here.elsewhere() == here, "without routers it is all there is"
    routed = msgspec.structs.replace(here, routers=(router,))
    assert routed.elsewhere().endpoints == ("tls/192.0.2.1:7447",) and routed.elsewhere().routers == (router,)


def test_secret_is_not_printed() -> None:
    assert "ssss" not in repr(TICKET) and "ssss" not in str(TICKET)


@given(tls_endpoints | tcp_endpoints)
def test_endpoint_round_trip(text: str) -> None:
    assert str(Endpoint.parse(text)) == text
