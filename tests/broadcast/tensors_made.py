"""Tensors that change as an optimizer step changes them: a few values, each by one unit in the last place."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from shoal.broadcast.link import Kind, Link
from shoal.broadcast.tensors import TensorView, view_of
from shoal.protocol.snapshot import DTYPE_BYTES


def nudged(tensors: dict[str, TensorView], seed: int, share: float = 0.02) -> dict[str, TensorView]:
    """The tensors with `share` of the values of `a` moved up or down by one; the others stay."""
    chosen = random.Random(seed)
    old = tensors["a"]
    size = DTYPE_BYTES[old.dtype]
    data = bytearray(old.data)
    for index in chosen.sample(range(len(data) // size), max(1, int(share * len(data) / size))):
        place = slice(index * size, (index + 1) * size)
        value = (int.from_bytes(data[place], "little") + chosen.choice((-1, 1))) % 256**size
        data[place] = value.to_bytes(size, "little")
    return {**tensors, "a": view_of(old.dtype, old.shape, data)}


async def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until it holds."""
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"not within {seconds:g} s")


async def next_chunk(link: Link) -> bytes:
    """Hash and bytes of the next chunk; signs of life are passed over."""
    while True:
        kind, frame = await link.receive()
        if kind is not Kind.ALIVE:
            assert kind is Kind.CHUNK
            return frame
