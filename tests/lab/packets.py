"""IPv4 packets made and checked by hand, the slow way, for the tests of NAT and switch."""

from __future__ import annotations

import socket
import struct

ICMP, TCP, UDP = 1, 6, 17
CHECKSUM_AT = {ICMP: 2, TCP: 16, UDP: 6}


def checksum(data: bytes) -> int:
    """RFC 1071, word by word."""
    data += b"\0" * (len(data) % 2)
    total = sum(word for (word,) in struct.iter_unpack("!H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packet(
    source: str,
    target: str,
    protocol: int = UDP,
    ports: tuple[int, int] = (1000, 2000),
    payload: bytes = b"",
    *,
    options: bytes = b"",
    echo_type: int = 8,
    udp_checksum: bool = True,
    ident: int = 0,
    fragment: int = 0,
) -> bytes:
    """A packet with right checksums; `ports[0]` is the identifier of an ICMP echo; `fragment` is that header field."""
    a, b = socket.inet_aton(source), socket.inet_aton(target)
    if fragment & 0x1FFF:
        body = payload
    elif protocol == ICMP:
        body = struct.pack("!BBHHH", echo_type, 0, 0, ports[0], 1) + payload
        body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    else:
        if protocol == UDP:
            body = struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload
        else:
            body = struct.pack("!HHIIBBHHH", *ports, 1, 2, 5 << 4, 16, 1024, 0, 0) + payload
        if protocol == TCP or udp_checksum:
            at = CHECKSUM_AT[protocol]
            value = checksum(a + b + struct.pack("!BBH", 0, protocol, len(body)) + body)
            if protocol == UDP:
                value = value or 0xFFFF
            body = body[:at] + struct.pack("!H", value) + body[at + 2 :]
    length = 20 + len(options)
    head = struct.pack("!BBHHHBBH4s4s", 64 + length // 4, 0, length + len(body), ident, fragment, 64, protocol, 0, a, b)
    head += options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def is_sound(data: bytes) -> bool:
    """Whether both checksums are right."""
    length = (data[0] & 15) * 4
    head, body, protocol = data[:length], data[length:], data[9]
    if checksum(head) != 0:
        return False
    if protocol == ICMP:
        return checksum(body) == 0
    if protocol == UDP and body[6:8] == b"\0\0":
        return True
    return checksum(data[12:20] + struct.pack("!BBH", 0, protocol, len(body)) + body) == 0


def ends(data: bytes) -> tuple[str, str, int, int]:
    """Source and target address, source and target port."""
    length = (data[0] & 15) * 4
    ports: tuple[int, int] = struct.unpack("!HH", data[length : length + 4])
    return socket.inet_ntoa(data[12:16]), socket.inet_ntoa(data[16:20]), *ports
