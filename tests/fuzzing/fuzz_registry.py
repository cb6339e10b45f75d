"""Entrances that are fuzzed: what reads bytes from elsewhere, each as a function of bytes.

A target may raise what its reader says that it raises (`allowed`), nothing else. `seeds` are inputs that get far; what
is `packed` is also changed as values, so that it stays MessagePack. `fuzz_wire`, `fuzz_files` and `fuzz_texts` fill
`TARGETS`; `cases` changes seeds at random, where no fuzzer that follows coverage is installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from fuzz_samples import mutated, packed, unpacked

from shoal.errors import ShoalError

Feed = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """One entrance."""

    name: str
    feed: Feed
    seeds: Callable[[], Sequence[bytes]]
    allowed: tuple[type[BaseException], ...] = (ShoalError,)
    is_packed: bool = False
    """Whether what follows the first byte is MessagePack."""

    def answers(self, data: bytes) -> bool:
        """Whether the input is taken; False where it is refused as it should be. Anything else is raised."""
        try:
            self.feed(data)
        except self.allowed:
            return False
        return True


TARGETS: dict[str, Target] = {}


def target(
    seeds: Callable[[], Sequence[bytes]], *, allowed: tuple[type[BaseException], ...] = (), is_packed: bool = False
) -> Callable[[Feed], Feed]:
    """Register a function of bytes under its name."""

    def register(feed: Feed) -> Feed:
        name = feed.__name__
        TARGETS[name] = Target(name, feed, seeds, (ShoalError, *allowed), is_packed)
        return feed

    return register


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "replace")


@cache
def scratch() -> Path:
    """A folder in memory where there is one: some readers want a path."""
    where = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="shoal-fuzz-", dir=where if where.is_dir() else None))


def written(name: str, data: bytes) -> Path:
    path = scratch() / name
    path.write_bytes(data)
    return path


def cases(one: Target, draw: Random) -> Iterator[bytes]:
    """Its seeds, changed at random without end: for where no fuzzer that follows coverage is installed."""
    seeds = list(one.seeds())
    while True:
        seed = draw.choice(seeds)
        if one.is_packed and draw.random() < 0.7:
            value = unpacked(seed[1:])
            for _ in range(draw.randint(1, 3)):
                value = mutated(value, draw)
            yield seed[:1] + packed(value)
            continue
        data = bytearray(seed)
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(data) + 1)
            match draw.randrange(5):
                case 0:
                    data[at : at + draw.randint(1, 8)] = draw.randbytes(draw.randint(0, 8))
                case 1:
                    data[at:at] = data[: draw.randint(0, 64)] * draw.choice((1, 2, 50))
                case 2:
                    del data[at:]
                case 3:
                    data[at:at] = draw.choice(
                        (b"\xff\xfe", b"\0", b'"', b"[" * 3000, b"{", b"'", b"9" * 5000, b"\xed\xa0\x80")
                    )
                case _:
                    other = draw.choice(seeds)
                    data[at:] = other[draw.randrange(len(other) + 1) :]
        yield bytes(data)
