"""Frames between the host and a sandbox's supervisor: a JSON header and, behind it, blobs of bytes.

Used by both sides. Invariant: nobody reads more than the bound it gives; a frame beyond it is a `ValueError`.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

PREFIX = struct.Struct(">IQ")
"""Length of the header, and of all blobs together."""

MAX_HEADER_BYTES = 1 << 20


def pack(header: dict[str, Any], blobs: Sequence[bytes] = ()) -> list[bytes]:
    """The frame's pieces, in order. The header gains `blobs`, their lengths."""
    text = json.dumps({**header, "blobs": [len(blob) for blob in blobs]}).encode()
    return [PREFIX.pack(len(text), sum(map(len, blobs))) + text, *blobs]


def split(header: dict[str, Any], body: bytes) -> list[bytes]:
    """The blobs of a frame, cut as its header says.

    Raises:
        ValueError: the lengths do not add up to the body.
    """
    lengths = header.get("blobs")
    if not isinstance(lengths, list) or not all(isinstance(n, int) and n >= 0 for n in lengths):
        raise ValueError("a frame's lengths are malformed")
    if sum(lengths) != len(body):
        raise ValueError("a frame's lengths do not add up")
    blobs, start = [], 0
    for length in lengths:
        blobs.append(body[start : start + length])
        start += length
    return blobs


def send(connection: socket.socket, header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
    for piece in pack(header, blobs):
        connection.sendall(piece)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(min(count - len(data), 1 << 20))
        if not piece:
            raise EOFError("the host has gone")
        data += piece
    return bytes(data)


def receive(connection: socket.socket, max_bytes: int) -> tuple[dict[str, Any], list[bytes]]:
    """Blocks for one frame.

    Raises:
        EOFError: the other side has closed.
        ValueError: the frame is malformed or larger than `max_bytes`.
    """
    header_bytes, body_bytes = PREFIX.unpack(_exactly(connection, PREFIX.size))
    if header_bytes > MAX_HEADER_BYTES or body_bytes > max_bytes:
        raise ValueError("a frame is larger than it may be")
    header = json.loads(_exactly(connection, header_bytes))
    if not isinstance(header, dict):
        raise ValueError("a frame's header is no object")
    return header, split(header, _exactly(connection, body_bytes))
