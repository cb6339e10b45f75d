"""Tensors as this room sees them: a type, a shape and bytes, little-endian and contiguous, as in safetensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from shoal.protocol.snapshot import DTYPE_BYTES, DType


class TensorView(NamedTuple):
    """One tensor's bytes, not copied."""

    dtype: DType
    shape: tuple[int, ...]
    data: memoryview

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    @property
    def layout(self) -> tuple[DType, tuple[int, ...]]:
        """All but the content."""
        return self.dtype, self.shape


def view_of(dtype: DType, shape: tuple[int, ...], buffer: bytes | bytearray | memoryview) -> TensorView:
    """A view of `buffer`, which must be contiguous and exactly as large as the type and shape say."""
    data = memoryview(buffer)
    data = data.cast("B") if data.nbytes else memoryview(b"")
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    assert data.nbytes == expected, f"{dtype} of shape {shape} has {expected} bytes, not {data.nbytes}"
    return TensorView(dtype, tuple(shape), data)


def chunks_of(parts: Iterable[bytes | memoryview], chunk_bytes: int) -> Iterator[bytes]:
    """The stream that `parts` make one after the other, in pieces of `chunk_bytes`, the last one shorter."""
    chunk = bytearray()
    for part in parts:
        at = 0
        while at < len(part):
            taken = min(len(part) - at, chunk_bytes - len(chunk))
            chunk += part[at : at + taken]
            at += taken
            if len(chunk) == chunk_bytes:
                yield bytes(chunk)
                chunk.clear()
    if chunk:
        yield bytes(chunk)
