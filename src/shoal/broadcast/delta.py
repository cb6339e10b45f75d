"""What changed in a tensor from one version to the next, as few bytes; and the change put back, bit for bit.

One optimizer step moves few bf16 weights, and those mostly by one unit in the last place. So a change is kept as
*where* and *by how much*, block by block of `BLOCK_ELEMENTS` elements:

    sparse   of each element that changed, its gap to the one before, and its
             step = new bits - old bits, modulo 2^n, folded so that small steps of either sign are small numbers;
             both cut into byte planes: the lowest bytes of all gaps, then the next ones, …
    dense    the steps of all elements; no gaps
    raw      the new bytes, where neither is shorter
    same     nothing

Every plane is a zstd frame (level 1). Elements are unsigned integers of the tensor's width here, whatever they mean:
NaN payloads, signed zeros and integers come back exactly.

1. The design speaks of new *values* where this keeps steps. Values overwrite, so they may be applied twice; steps take
   half to three quarters of the bytes (`docs/broadcast.md`). Nothing is ever applied twice here: the result must have
   the hash that the signed manifest gives.

Invariants: `apply_change(encode_change(old, new), old) == new`; a change is never longer than the tensor by more than
a header a block; hostile bytes end in `RecordError`, and no memory is taken that the block itself does not take.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from shoal.errors import RecordError

BLOCK_ELEMENTS = 2**20
"""Few enough that a block's work stays in the processor's caches, many enough that a plane's header is nothing."""

ZSTD_LEVEL = 1

SAME, SPARSE, DENSE, RAW = range(4)

MODE = struct.Struct("<B")
COUNT = struct.Struct("<I")
"""Elements that changed in a sparse block."""
FRAME = struct.Struct("<I")
"""Length of the zstd frame that follows."""

GAP = np.dtype("<u4")

Bytes = NDArray[np.uint8]
Elements = NDArray[np.unsignedinteger[Any]]

_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Change(NamedTuple):
    """One tensor's encoded change; empty if it is as before."""

    data: bytes
    num_changed: int
    """Elements whose bits differ."""


def encode_change(old: memoryview, new: memoryview, element_bytes: int) -> Change:
    """How `new` differs from `old`: two tensors of one layout, `element_bytes` bytes an element."""
    assert old.nbytes == new.nbytes and new.nbytes % element_bytes == 0
    before, after = _elements(old, element_bytes), _elements(new, element_bytes)
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False, write_content_size=True)
    parts: list[bytes] = []
    total = 0
    for block in _blocks(len(after)):
        num_changed, part = _encode_block(before[block], after[block], compressor)
        total += num_changed
        parts.append(part)
    return Change(b"".join(parts) if total else b"", total)


def apply_change(change: memoryview, data: memoryview, element_bytes: int) -> None:
    """Turn the old tensor in `data` (writable) into the new one.

    Raises:
        RecordError: these bytes are no change of such a tensor; `data` is then neither old nor new.
    """
    elements = _elements(data, element_bytes)
    if not len(change):
        return
    reader = _Reader(change)
    for block in _blocks(len(elements)):
        _apply_block(reader, elements[block])
    reader.end()


def _blocks(num_elements: int) -> Iterator[slice]:
    for start in range(0, num_elements, BLOCK_ELEMENTS):
        yield slice(start, min(num_elements, start + BLOCK_ELEMENTS))


def _elements(data: memoryview, element_bytes: int) -> Elements:
    return np.frombuffer(data, dtype=_UNSIGNED[element_bytes])


def _encode_block(old: Elements, new: Elements, compressor: zstandard.ZstdCompressor) -> tuple[int, bytes]:
    changed = old != new
    num_changed = int(np.count_nonzero(changed))
    if num_changed == 0:
        return 0, MODE.pack(SAME)
    if 2 * num_changed > len(new):
        mode, parts, steps = DENSE, [], new - old
    else:
        places = np.flatnonzero(changed).astype(np.int32)
        gaps = (np.diff(places, prepend=np.int32(-1)) - 1).astype(GAP)
        mode, steps = SPARSE, new[places] - old[places]
        parts = [COUNT.pack(num_changed), *(_frame(plane, compressor) for plane in _planes(gaps))]
    parts += [_frame(plane, compressor) for plane in _planes(_fold(steps))]
    data = b"".join(parts)
    if len(data) >= new.nbytes:
        return num_changed, MODE.pack(RAW) + new.tobytes()
    return num_changed, MODE.pack(mode) + data


def _apply_block(reader: _Reader, elements: Elements) -> None:
    (mode,) = MODE.unpack(reader.take(MODE.size))
    match mode:
        case 0:
            return
        case 1:
            (num_changed,) = COUNT.unpack(reader.take(COUNT.size))
            if not 1 <= num_changed <= len(elements):
                raise RecordError("a change names more places than there are.")
            places = np.cumsum(reader.planes(num_changed, GAP).astype(np.int64) + 1) - 1
            if places[-1] >= len(elements):
                raise RecordError("a change names a place outside its tensor.")
            elements[places] += _unfold(reader.planes(num_changed, elements.dtype))
        case 2:
            elements += _unfold(reader.planes(len(elements), elements.dtype))
        case 3:
            elements[:] = np.frombuffer(reader.take(elements.nbytes), dtype=elements.dtype)
        case _:
            raise RecordError(f"a change has a block of the unknown kind {mode}.")


def _planes(numbers: Elements) -> Iterator[Bytes]:
    table = numbers.view(np.uint8).reshape(len(numbers), numbers.itemsize)
    for index in range(numbers.itemsize):
        yield np.ascontiguousarray(table[:, index])


def _fold(steps: Elements) -> Elements:
    """0, -1, 1, -2, 2 … as 0, 1, 2, 3, 4 …, modulo 2^n (zigzag)."""
    bits = 8 * steps.itemsize
    negative = steps >> np.array(bits - 1, steps.dtype)
    folded: Elements = (steps << np.array(1, steps.dtype)) ^ (np.array(0, steps.dtype) - negative)
    return folded


def _unfold(folded: Elements) -> Elements:
    one = np.array(1, folded.dtype)
    steps: Elements = (folded >> one) ^ (np.array(0, folded.dtype) - (folded & one))
    return steps


def _frame(data: Bytes, compressor: zstandard.ZstdCompressor) -> bytes:
    packed = compressor.compress(data.data)
    return FRAME.pack(len(packed)) + packed


class _Reader:
    """Walks a change from its beginning to its end and nowhere else."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0
        self._decompressor = zstandard.ZstdDecompressor()

    def take(self, size: int) -> memoryview:
        """The next `size` bytes."""
        if self._at + size > len(self._data):
            raise RecordError("a change ends too early.")
        self._at += size
        return self._data[self._at - size : self._at]

    def frame(self, size: int) -> Bytes:
        """The next frame, which must unpack to exactly `size` bytes; a frame that claims another is not unpacked."""
        (length,) = FRAME.unpack(self.take(FRAME.size))
        packed = self.take(length)
        try:
            if zstandard.frame_content_size(packed) != size:
                raise RecordError("a change's plane does not have the size that its block needs.")
            unpacked = self._decompressor.decompress(packed, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise RecordError(f"a change cannot be unpacked: {error}.") from None
        if len(unpacked) != size:
            raise RecordError("a change's plane does not have the size that its block needs.")
        return np.frombuffer(unpacked, dtype=np.uint8)

    def planes(self, count: int, dtype: np.dtype[Any]) -> Elements:
        """The next `count` numbers, which are cut into byte planes."""
        table = np.empty((count, dtype.itemsize), dtype=np.uint8)
        for index in range(dtype.itemsize):
            table[:, index] = self.frame(count)
        return table.reshape(-1).view(dtype)

    def end(self) -> None:
        """Refuse what is left over."""
        if self._at != len(self._data):
            raise RecordError("a change goes on after its end.")
