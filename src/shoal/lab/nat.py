"""A masquerading NAT before one node: rewrites addresses and ports of IPv4 packets, lets in only what was asked for.

Deviations from RFC 4787 and 5382: 1. An ICMP error to a node behind a NAT is dropped, its embedded packet is not
translated. 2. TCP states are not followed: a TCP session ends by its idle time alone. 3. Nothing is hairpinned.

Mapping is endpoint-independent and keeps the private port where it is free (`cone`), or is a new random port for
every destination (`symmetric`). Filtering is by address and port: only who was written to may answer.

Invariants, property-tested: what goes out and is answered comes back as if there were no NAT; both checksums of a
rewritten packet are right if they were; two live sessions never share a public port, protocol and remote; the tables
are bounded.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

ICMP, TCP, UDP = 1, 6, 17

IDLE_S = {ICMP: 60.0, TCP: 7440.0, UDP: 120.0}
"""A session unused for this long is forgotten (RFC 5508, 5382; for UDP a common router's setting)."""

MAX_SESSIONS = 4096
"""Sessions of one NAT; a new one takes the place of the longest unused."""

MAX_FRAGMENTS = 256
"""Fragmented packets whose later fragments are let in at a time."""

FIRST_DYNAMIC_PORT = 49152

ECHO_REQUEST, ECHO_REPLY = 8, 0

CHECKSUM_OFFSET = {ICMP: 2, TCP: 16, UDP: 6}
PORTLESS = b"\0\0"


@dataclass(slots=True)
class Session:
    """One private port that talks to one remote address and port."""

    protocol: int
    private_port: bytes
    public_port: bytes
    remote: bytes
    """Address and port; an ICMP echo has port 0 there, and its identifier as the private port."""
    last_s: float


@dataclass
class Nat:
    """The box before one node.

    Args:
        private: 4 bytes, the node's own address.
        public: 4 bytes, what others see.
        random: picks ports.
    """

    private: bytes
    public: bytes
    kind: Literal["cone", "symmetric"]
    random: random.Random
    refused_packets: int = 0
    """Inbound packets that belong to no session."""
    _out: dict[bytes, Session] = field(default_factory=dict)
    _in: dict[bytes, Session] = field(default_factory=dict)
    _fragments: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    @property
    def num_sessions(self) -> int:
        return len(self._out)

    def forget(self) -> None:
        """Restart the box: every session is lost."""
        self._out.clear()
        self._in.clear()
        self._fragments.clear()

    def outbound(self, packet: bytes, now_s: float) -> bytes | None:
        """The packet as the world sees it, or `None` if it cannot be translated."""
        if packet[12:16] != self.private:
            return None
        header = (packet[0] & 15) * 4
        if _later_fragment(packet):
            return _rewrite(packet, 12, self.public, None, b"", b"")
        parts = _parts(packet, header)
        if parts is None:
            return None
        protocol, port_at, source_port, remote_port = parts
        if protocol == ICMP and packet[header] != ECHO_REQUEST:
            return None
        remote = packet[16:20] + remote_port
        key = packet[9:10] + source_port + remote
        session = self._out.get(key)
        if session is None or now_s - session.last_s > IDLE_S[protocol]:
            session = self._open(protocol, source_port, remote, now_s)
        session.last_s = now_s
        return _rewrite(packet, 12, self.public, port_at, session.private_port, session.public_port)

    def inbound(self, packet: bytes, now_s: float) -> bytes | None:
        """The packet as the node sees it, or `None` if the node did not ask for it."""
        header = (packet[0] & 15) * 4
        fragment = packet[12:16] + packet[4:6] + packet[9:10]
        if _later_fragment(packet):
            if fragment in self._fragments:
                return _rewrite(packet, 16, self.private, None, b"", b"")
            self.refused_packets += 1
            return None
        parts = _parts(packet, header)
        if parts is not None:
            protocol, port_at, first, second = parts
            remote_port, public_port = (second, first) if protocol == ICMP else (first, second)
            session = self._in.get(packet[9:10] + public_port + packet[12:16] + remote_port)
            wanted = protocol != ICMP or packet[header] == ECHO_REPLY
            if session is not None and wanted and now_s - session.last_s <= IDLE_S[protocol]:
                session.last_s = now_s
                if packet[6] & 0x20:
                    self._fragments[fragment] = None
                    if len(self._fragments) > MAX_FRAGMENTS:
                        self._fragments.popitem(last=False)
                at = port_at if protocol == ICMP else port_at + 2
                return _rewrite(packet, 16, self.private, at, session.public_port, session.private_port)
        self.refused_packets += 1
        return None

    def _open(self, protocol: int, private_port: bytes, remote: bytes, now_s: float) -> Session:
        tag = bytes((protocol,))
        if (expired := self._out.get(tag + private_port + remote)) is not None:
            self._close(expired)
        if len(self._out) >= MAX_SESSIONS:
            self._close(min(self._out.values(), key=lambda session: session.last_s))
        public_port = self._port(protocol, private_port, now_s)
        session = Session(protocol, private_port, public_port, remote, now_s)
        self._out[tag + private_port + remote] = self._in[tag + public_port + remote] = session
        return session

    def _close(self, session: Session) -> None:
        tag = bytes((session.protocol,))
        del self._out[tag + session.private_port + session.remote]
        del self._in[tag + session.public_port + session.remote]

    def _port(self, protocol: int, private_port: bytes, now_s: float) -> bytes:
        """A public port: the private port's own one, else the same number, else a free random one."""
        same = [session for session in self._out.values() if session.protocol == protocol]
        if self.kind == "cone":
            for session in same:
                if session.private_port == private_port and now_s - session.last_s <= IDLE_S[protocol]:
                    return session.public_port
        taken = {session.public_port for session in same}
        if self.kind == "cone" and private_port not in taken:
            return private_port
        while True:  # at most a quarter of these ports is taken: MAX_SESSIONS of them
            port = self.random.randrange(FIRST_DYNAMIC_PORT, 65536).to_bytes(2)
            if port not in taken:
                return port


def _later_fragment(packet: bytes) -> bool:
    return bool((packet[6] & 0x1F) or packet[7])


def _parts(packet: bytes, header: int) -> tuple[int, int, bytes, bytes] | None:
    """Protocol, where its ports stand, and both ports; `None` for what has no ports or is too short to have them."""
    protocol = packet[9]
    if protocol in (TCP, UDP):
        if len(packet) < header + CHECKSUM_OFFSET[protocol] + 2:
            return None
        return protocol, header, packet[header : header + 2], packet[header + 2 : header + 4]
    if protocol == ICMP and len(packet) >= header + 8:
        return protocol, header + 4, packet[header + 4 : header + 6], PORTLESS
    return None


def _rewrite(packet: bytes, address_at: int, address: bytes, port_at: int | None, old: bytes, new: bytes) -> bytes:
    """Replace an address and a port, and mend both checksums by the difference (RFC 1624)."""
    out = bytearray(packet)
    before = packet[address_at : address_at + 4]
    out[address_at : address_at + 4] = address
    change = _difference(before, address)
    _mend(out, 10, change)
    if port_at is not None:
        protocol = packet[9]
        out[port_at : port_at + 2] = new
        at = (packet[0] & 15) * 4 + CHECKSUM_OFFSET[protocol]
        if protocol == ICMP:  # its checksum covers no address
            _mend(out, at, _difference(old, new))
        elif protocol == TCP or out[at] or out[at + 1]:
            _mend(out, at, change + _difference(old, new))
            if protocol == UDP and not (out[at] or out[at + 1]):  # 0 would say that there is no checksum
                out[at] = out[at + 1] = 255
    return bytes(out)


def _difference(old: bytes, new: bytes) -> int:
    total = 0
    for at in range(0, len(old), 2):
        total += (~int.from_bytes(old[at : at + 2]) & 0xFFFF) + int.from_bytes(new[at : at + 2])
    return total


def _mend(packet: bytearray, at: int, change: int) -> None:
    total = (~(packet[at] << 8 | packet[at + 1]) & 0xFFFF) + change
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    total = ~total & 0xFFFF
    packet[at] = total >> 8
    packet[at + 1] = total & 255
