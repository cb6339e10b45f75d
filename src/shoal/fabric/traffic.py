"""How many bytes this process's TCP connections on one local port have carried, as the kernel counts them.

Zenoh's Python wheel is built without statistics; the kernel keeps them for every socket, and a process may ask about
its own without being root. Linux only: elsewhere there is nothing to say.

Invariant: counts never fall; what a connection carried between the last look and its end is not counted.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import NamedTuple

TCP_INFO_BYTES = 192
ACKED, RECEIVED = 120, 128
"""Offsets of tcpi_bytes_acked and tcpi_bytes_received in Linux's struct tcp_info, both of 64 bits."""


class Traffic(NamedTuple):
    """Bytes on the wire, TLS included."""

    bytes_sent: int
    bytes_received: int
    num_connections: int
    """Open ones."""


class TrafficMeter:
    """Adds up the connections accepted on `port`; call `read` now and then."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._by_socket: dict[str, tuple[int, int]] = {}
        self._ended = (0, 0)

    def read(self) -> Traffic | None:
        """What was carried so far, or `None` where the system does not say."""
        if not sys.platform.startswith("linux"):
            return None
        seen = {}
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
                if target.startswith("socket:"):
                    counts = self._counts(int(name))
                    if counts is not None:
                        seen[target] = counts
            except OSError:
                continue  # Closed since it was listed, or no TCP socket.
        for ended in self._by_socket.keys() - seen.keys():
            sent, received = self._by_socket[ended]
            self._ended = (self._ended[0] + sent, self._ended[1] + received)
        self._by_socket = seen
        sent = self._ended[0] + sum(counts[0] for counts in seen.values())
        received = self._ended[1] + sum(counts[1] for counts in seen.values())
        return Traffic(sent, received, len(seen))

    def _counts(self, descriptor: int) -> tuple[int, int] | None:
        # A duplicate, so that closing our object does not close Zenoh's connection.
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                return None
            if connection.getsockname()[1] != self._port:
                return None
            connection.getpeername()  # The listening socket has none.
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
            return struct.unpack_from("Q", info, ACKED)[0], struct.unpack_from("Q", info, RECEIVED)[0]
