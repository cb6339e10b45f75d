"""Finds planted plaintexts in what a tap decrypted.

A `Plant` is what was hidden in a run, by kind: byte strings that nothing but the run's own data contains. Patterns
have at least `MIN_BYTES` bytes and `MIN_DISTINCT` different ones, so that padding and counters match none and chance
matches one in far more data than any run moves.

The search is exact. A pattern that the transport has split between two of its frames is missed; with a hundred of
each kind that hides no kind.
"""

from __future__ import annotations

import contextlib
import mmap
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shoal.protocol.episode import Episode

MIN_BYTES = 16
MIN_DISTINCT = 8

MAX_PATTERN_BYTES = 256
BLOCK_BYTES = 8 * 2**20

WINDOWS_A_FILE = 200
"""Random windows taken of every file of weights."""


@dataclass
class Plant:
    """Patterns by kind; `add` ignores those that chance could match."""

    patterns: dict[str, set[bytes]] = field(default_factory=dict)

    def add(self, kind: str, pattern: bytes) -> None:
        pattern = pattern[:MAX_PATTERN_BYTES]
        kept = self.patterns.setdefault(kind, set())
        if len(pattern) >= MIN_BYTES and len(set(pattern)) >= MIN_DISTINCT:
            kept.add(pattern)

    def add_windows(self, kind: str, data: bytes, number: int, random: random.Random) -> None:
        """`number` windows of `MIN_BYTES` at random places of `data`."""
        for _ in range(number if len(data) >= MIN_BYTES else 0):
            start = random.randrange(len(data) - MIN_BYTES + 1)
            self.add(kind, data[start : start + MIN_BYTES])

    def add_episodes(self, episodes: Iterable[Episode]) -> None:
        """What workers sampled: texts, token ids and log-probabilities as they are encoded on their way."""
        for episode in episodes:
            for turn in episode.turns:
                self.add("replies", turn.completion.text.encode())
                self.add("token_ids", _elements(turn.completion.token_ids))
                self.add("token_ids", _elements(turn.context_ids))
                self.add("log_probabilities", _elements(turn.completion.logprobs))

    def add_weights(self, files: Iterable[Path], random: random.Random) -> None:
        """Windows of files of weights: chunks in a store, or tensors; a chunk that is pruned meanwhile is left out."""
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                self.add_windows("weights", file.read_bytes(), WINDOWS_A_FILE, random)


@dataclass
class Findings:
    """What of a plant was seen."""

    bytes_searched: int = 0
    bytes_found: dict[str, int] = field(default_factory=dict)
    patterns_found: dict[str, set[bytes]] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_found.values())


def search(files: Iterable[Path], plant: Plant) -> Findings:
    """Look for every pattern of the plant in every file."""
    index = _Index(plant)
    findings = Findings(bytes_found=dict.fromkeys(plant.patterns, 0), patterns_found={k: set() for k in plant.patterns})
    for file in files:
        size = file.stat().st_size
        findings.bytes_searched += size
        if size < MIN_BYTES:
            continue
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for start in range(0, size, BLOCK_BYTES):
                # Blocks overlap by a pattern less one byte, so that each place is looked at in one of them only.
                block = data[start : start + BLOCK_BYTES + MAX_PATTERN_BYTES - 1]
                for kind, pattern in index.matches(block, BLOCK_BYTES):
                    findings.bytes_found[kind] += len(pattern)
                    findings.patterns_found[kind].add(pattern)
    return findings


class _Index:
    """Patterns by their first eight bytes, behind a table that nearly every place of a file fails at once."""

    def __init__(self, plant: Plant) -> None:
        self._by_start: dict[bytes, list[tuple[str, bytes]]] = {}
        self._may_start = np.zeros(1 << 24, dtype=np.bool_)
        for kind, patterns in plant.patterns.items():
            for pattern in patterns:
                self._by_start.setdefault(pattern[:8], []).append((kind, pattern))
                self._may_start[int.from_bytes(pattern[:3], "little")] = True

    def matches(self, block: bytes, num_places: int) -> Iterable[tuple[str, bytes]]:
        """Every (kind, pattern) at each of the first `num_places` places."""
        octets = np.frombuffer(block, np.uint8).astype(np.uint32)
        starts = octets[:-2] | octets[1:-1] << 8 | octets[2:] << 16
        for place in np.flatnonzero(self._may_start[starts[:num_places]]).tolist():
            for kind, pattern in self._by_start.get(block[place : place + 8], ()):
                if block.startswith(pattern, place):
                    yield kind, pattern


def _elements(numbers: Sequence[Any]) -> bytes:
    """A sequence as MessagePack writes it inside a record, without the array's own header."""
    encoded = msgspec.msgpack.encode(tuple(numbers))
    return encoded[1 if len(numbers) < 16 else 3 if len(numbers) < 2**16 else 5 :]
