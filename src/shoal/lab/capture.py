"""What passed a node's device, as a pcap file that tcpdump and Wireshark read.

The packets are those that the node itself sends and receives, so behind a NAT they carry its private address, and what
the network loses on the way in is not there. Times are those of the machine's clock.

Invariants: a file never grows beyond `MAX_FILE_BYTES`; a disk that takes no more ends a capture and nothing else;
what was not written is counted.
"""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

from shoal.errors import ConfigError

MAX_FILE_BYTES = 2**30
"""A capture that was forgotten fills no disk."""

FILE_HEADER = struct.Struct("=IHHiIII")
PACKET_HEADER = struct.Struct("=IIII")

MAGIC = 0xA1B2C3D4
"""Times in seconds and microseconds; its byte order tells the reader that of the other numbers."""

VERSION = (2, 4)
LINK_TYPE_RAW_IP = 101
SNAP_BYTES = 2**16


class PacketFile:
    """One node's capture.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_FILE_BYTES) -> None:
        self.omitted_packets = 0
        self._left_bytes = max_bytes - FILE_HEADER.size
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
            self._file.write(FILE_HEADER.pack(MAGIC, *VERSION, 0, 0, SNAP_BYTES, LINK_TYPE_RAW_IP))
        except OSError as error:
            raise ConfigError(
                f"No capture can be written to {path}: {error.strerror}.", "Give a folder that can be written."
            ) from None

    def write(self, packet: bytes, unix_s: float) -> None:
        """Add a packet, if there is room."""
        self._left_bytes -= PACKET_HEADER.size + len(packet)
        if self._left_bytes < 0:
            self.omitted_packets += 1
            return
        seconds, microseconds = divmod(int(unix_s * 1e6), 1_000_000)
        try:
            self._file.write(PACKET_HEADER.pack(seconds, microseconds, len(packet), len(packet)) + packet)
        except OSError:
            self.omitted_packets += 1
            self._left_bytes = 0

    def close(self) -> None:
        """Write out what is buffered."""
        with contextlib.suppress(OSError):
            self._file.close()
