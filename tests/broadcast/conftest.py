"""A run's learner, its store, and nodes that fetch from it over a real connection."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from shoal.broadcast.publisher import Publisher
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView, view_of
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity

RUN = "a run"
LEARNER = Identity(b"learner".ljust(32))
Tensors = dict[str, TensorView]


@pytest.fixture
def learner() -> Identity:
    """Whose signature the nodes of the run trust."""
    return LEARNER


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[[str], Store]:
    """Stores of the run, by name."""
    return lambda name: Store(tmp_path / name, run=RUN, trusted_key=LEARNER.public_key)


@pytest.fixture
def make_tensors() -> Callable[[int], Tensors]:
    """A small model; its first tensor is the same whatever the seed."""

    def make(seed: int) -> Tensors:
        changing = random.Random(seed)
        return {
            "same": view_of("F32", (100, 100), random.Random(0).randbytes(40_000)),
            "a": view_of("BF16", (300, 101), changing.randbytes(60_600)),
            "b": view_of("I64", (), changing.randbytes(8)),
            "empty": view_of("F32", (0, 7), b""),
        }

    return make


@pytest.fixture
async def source(make_store: Callable[[str], Store]) -> AsyncIterator[tuple[Fabric, Store, Publisher]]:
    """A listening node that serves the store `source`."""
    async with await Fabric.listen(Identity.generate()) as fabric:
        store = make_store("source")
        publisher = Publisher(fabric, store)
        await publisher.start()
        yield fabric, store, publisher


@pytest.fixture
async def node(source: tuple[Fabric, Store, Publisher]) -> AsyncIterator[Fabric]:
    """A node connected to the source."""
    async with await Fabric.connect(Identity.generate(), source[0].ticket(RUN, bytes(16))) as fabric:
        yield fabric
