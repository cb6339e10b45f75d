"""The search that says what a tapped router could read: exact, over block edges, blind to padding."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def plaintext() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import _plaintext

        yield _plaintext
    finally:
        sys.path.remove(folder)


def occurrences(data: bytes, pattern: bytes) -> int:
    """How often a pattern stands in data, overlaps included; the slow way."""
    return sum(data.startswith(pattern, at) for at in range(len(data)))


@given(seed=st.integers(0, 2**32), block_bytes=st.integers(16, 200), num_patterns=st.integers(1, 6))
def test_it_finds_what_the_slow_way_finds(
    plaintext: ModuleType, tmp_path_factory: pytest.TempPathFactory, seed: int, block_bytes: int, num_patterns: int
) -> None:
    chance = random.Random(seed)
    plant = plaintext.Plant()
    for number in range(num_patterns):
        plant.add(f"kind {number % 3}", chance.randbytes(chance.randrange(16, 60)))
    planted = sorted(p for patterns in plant.patterns.values() for p in patterns)
    pieces = [chance.choice([*planted, chance.randbytes(chance.randrange(80))]) for _ in range(12)]
    file = tmp_path_factory.mktemp("search") / "stream"
    file.write_bytes(b"".join(pieces))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plaintext, "BLOCK_BYTES", block_bytes)
        found = plaintext.search([file], plant)
    assert found.bytes_searched == file.stat().st_size
    for kind, patterns in plant.patterns.items():
        counts = {pattern: occurrences(file.read_bytes(), pattern) for pattern in patterns}
        assert found.bytes_found[kind] == sum(len(pattern) * count for pattern, count in counts.items())
        assert found.patterns_found[kind] == {pattern for pattern, count in counts.items() if count}


def test_what_chance_could_match_is_no_pattern(plaintext: ModuleType, tmp_path: Path) -> None:
    plant = plaintext.Plant()
    plant.add("padding", bytes(64))
    plant.add("counter", b"abcabcabcabcabcabc")
    plant.add("short", b"0123456789")
    assert plant.patterns == {"padding": set(), "counter": set(), "short": set()}
    (tmp_path / "stream").write_bytes(bytes(1000))
    assert plaintext.search([tmp_path / "stream"], plant).total_bytes == 0


@given(st.lists(st.integers(0, 50_000), min_size=20, max_size=200, unique=True))
def test_token_ids_are_planted_as_they_travel(plaintext: ModuleType, ids: list[int]) -> None:
    assert msgspec.msgpack.encode({"ids": ids}).endswith(plaintext._elements(ids))
