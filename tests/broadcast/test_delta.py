"""Changes of tensors: bit for bit there and back, short where little changed, and harmless when hostile."""

from __future__ import annotations

import contextlib
import random
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.broadcast import delta
from shoal.broadcast.delta import BLOCK_ELEMENTS, COUNT, FRAME, MODE, apply_change, encode_change
from shoal.errors import RecordError

WIDTHS = (1, 2, 4, 8)


def changed(old: bytes, new: bytes, width: int) -> bytes:
    """What the change of `old` makes of it."""
    data = bytearray(old)
    apply_change(memoryview(encode_change(memoryview(old), memoryview(new), width).data), memoryview(data), width)
    return bytes(data)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[bytes, bytes, int]:
    """Two tensors of one layout, alike in some places."""
    width = draw(st.sampled_from(WIDTHS))
    count = draw(st.integers(0, 400))
    old = draw(st.binary(min_size=count * width, max_size=count * width))
    new = bytearray(old)
    for index in draw(st.lists(st.integers(0, max(0, count - 1)), max_size=count)):
        new[index * width : (index + 1) * width] = draw(st.binary(min_size=width, max_size=width))
    return old, bytes(new), width


@given(pairs())
def test_bit_for_bit(pair: tuple[bytes, bytes, int]) -> None:
    old, new, width = pair
    change = encode_change(memoryview(old), memoryview(new), width)
    assert changed(old, new, width) == new
    differing = sum(old[i : i + width] != new[i : i + width] for i in range(0, len(old), width))
    assert change.num_changed == differing and bool(change.data) == bool(differing)
    assert len(change.data) <= len(new) + MODE.size, "never longer than the tensor and a header"


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (np.float16, [0.0, -0.0, np.inf, -np.inf, np.nan, 6e-8, 65504.0]),
        (np.float32, [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38]),
        (np.int64, [0, -1, 2**63 - 1, -(2**63), 7]),
        (np.int32, [0, -1, 2**31 - 1, -(2**31), 7]),
        (np.int16, [0, -1, 2**15 - 1, -(2**15), 7]),
        (np.int8, [0, -1, 127, -128, 7]),
        (np.bool_, [True, False]),
    ],
)
def test_every_special_value_from_and_to_every_other(kind: type[np.generic], values: list[float]) -> None:
    table = np.array(values, dtype=kind)
    old, new = np.repeat(table, len(table)), np.tile(table, len(table))
    assert changed(old.tobytes(), new.tobytes(), old.itemsize) == new.tobytes()


def test_nan_payloads_and_every_bf16() -> None:
    """All 65,536 bit patterns of bf16 and fp16, each turned into another: no bit is lost, whatever it means."""
    old = np.arange(65536, dtype=np.uint16)
    new = np.random.default_rng(0).permutation(old)
    assert changed(old.tobytes(), new.tobytes(), 2) == new.tobytes()
    assert changed(old.tobytes(), (old ^ np.uint16(0x8000)).tobytes(), 2) == (old ^ np.uint16(0x8000)).tobytes()


@pytest.mark.parametrize("count", [BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 2 * BLOCK_ELEMENTS + 5])
def test_blocks(count: int) -> None:
    """A change at each end of each block, and gaps as wide as a block."""
    old = np.zeros(count, dtype=np.uint16)
    new = old.copy()
    for place in (0, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, count - 1):
        if place < count:
            new[place] += 1
    change = encode_change(memoryview(old).cast("B"), memoryview(new).cast("B"), 2)
    assert len(change.data) < 500 and changed(old.tobytes(), new.tobytes(), 2) == new.tobytes()


@pytest.mark.parametrize(("share", "bits"), [(0.001, 15.0), (0.01, 11.0), (0.023, 9.4), (0.3, 5.0)])
def test_a_step_of_one_unit_costs_little(share: float, bits: float) -> None:
    """Bits per changed value where values move up or down by one; the entropy is H(share) / share + 1."""
    chance = np.random.default_rng(1)
    old = chance.integers(0, 65536, 2_000_000).astype(np.uint16)
    moved = chance.random(len(old)) < share
    new = old.copy()
    new[moved] += chance.choice(np.array([1, 65535], dtype=np.uint16), int(moved.sum()))
    change = encode_change(memoryview(old).cast("B"), memoryview(new).cast("B"), 2)
    entropy = (-share * np.log2(share) - (1 - share) * np.log2(1 - share)) / share + 1
    assert entropy < 8 * len(change.data) / change.num_changed < bits


def test_what_cannot_be_shortened_is_sent_raw() -> None:
    chance = random.Random(0)
    old, new = chance.randbytes(100_000), chance.randbytes(100_000)
    change = encode_change(memoryview(old), memoryview(new), 4)
    assert len(change.data) == MODE.size + 100_000 and changed(old, new, 4) == new


def attempt(change: bytes, old: bytes, width: int) -> None:
    """Apply hostile bytes: a result or `RecordError`, nothing else."""
    data = bytearray(old)
    with contextlib.suppress(RecordError):
        apply_change(memoryview(change), memoryview(data), width)
    assert len(data) == len(old)


@given(st.binary(max_size=200), st.sampled_from(WIDTHS))
def test_garbage_is_refused(change: bytes, width: int) -> None:
    attempt(change, bytes(64 * width), width)


@settings(max_examples=200)
@given(pairs(), st.data())
def test_damaged_changes_are_refused_or_harmless(pair: tuple[bytes, bytes, int], data: st.DataObject) -> None:
    old, new, width = pair
    change = bytearray(encode_change(memoryview(old), memoryview(new), width).data)
    if not change:
        return
    match data.draw(st.sampled_from(["cut", "flip", "more"])):
        case "cut":
            del change[data.draw(st.integers(1, len(change) - 1)) if len(change) > 1 else 0 :]
        case "flip":
            change[data.draw(st.integers(0, len(change) - 1))] ^= data.draw(st.integers(1, 255))
        case "more":
            change += b"x"
    attempt(bytes(change), old, width)


def frame(data: bytes) -> bytes:
    packed = zstandard.ZstdCompressor().compress(data)
    return FRAME.pack(len(packed)) + packed


SPARSE = MODE.pack(delta.SPARSE)


def planes(*numbers: int, width: int) -> bytes:
    data = b"".join(number.to_bytes(width, "little") for number in numbers)
    return b"".join(frame(data[index::width]) for index in range(width))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (b"", None),
        (b"\x09", "unknown kind"),
        (SPARSE + COUNT.pack(65), "more places"),
        (SPARSE + COUNT.pack(0), "more places"),
        (SPARSE + COUNT.pack(1) + planes(64, width=4) + planes(1, width=2), "outside"),
        (SPARSE + COUNT.pack(2) + planes(0, 2**32 - 1, width=4) + planes(1, 1, width=2), "outside"),
        (SPARSE + COUNT.pack(2) + planes(2**32 - 1, 1, width=4) + planes(1, 1, width=2), "outside"),
        (SPARSE + COUNT.pack(1) + planes(0, width=4) + frame(b"1"), "too early"),
        (SPARSE + COUNT.pack(1) + frame(bytes(2)), "size"),
        (SPARSE + COUNT.pack(1) + FRAME.pack(4) + b"junk", "unpacked"),
        (SPARSE + COUNT.pack(1) + planes(0, width=4) + planes(1, width=2) + b"more", "after its end"),
        (MODE.pack(delta.RAW) + bytes(127), "too early"),
    ],
)
def test_each_lie_is_named(change: bytes, reason: str | None) -> None:
    data = bytearray(128)
    if reason is None:
        apply_change(memoryview(change), memoryview(data), 2)
        assert data == bytes(128), "nothing changed"
        return
    with pytest.raises(RecordError, match=reason):
        apply_change(memoryview(change), memoryview(data), 2)


def test_bombs_take_no_memory() -> None:
    """A frame that claims a gigabyte, one that unpacks to a gigabyte and claims nothing, and one that lies."""
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=True)
    bomb = compressor.compress(bytes(2**28))
    silent = zstandard.ZstdCompressor(level=1, write_content_size=False).compressobj()
    unsized = silent.compress(bytes(2**28)) + silent.flush()
    tracemalloc.start()
    try:
        for packed in (bomb, unsized):
            change = SPARSE + COUNT.pack(1) + FRAME.pack(len(packed)) + packed
            with pytest.raises(RecordError):
                apply_change(memoryview(change), memoryview(bytearray(128)), 2)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
