"""Every entrance withstands its seeds changed at random, and every input that once broke it."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from fuzz_registry import cases
from fuzz_targets import TARGETS

FOUND = Path(__file__).parent / "found"
"""Inputs that broke something once: `found/TARGET/what-it-was`."""

QUICK, MANY = 150, 20_000
CASE_S = 5.0
"""Processor seconds; generous, for a busy machine."""


def kept() -> list[tuple[str, str]]:
    return sorted((path.parent.name, path.name) for path in FOUND.glob("*/*"))


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_an_entrance_answers_or_refuses(name: str) -> None:
    attack(name, QUICK, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_an_entrance_answers_or_refuses_many(name: str) -> None:
    attack(name, MANY, seed=2)


@pytest.mark.parametrize(("name", "case"), kept())
def test_what_broke_an_entrance_does_so_no_more(name: str, case: str) -> None:
    TARGETS[name].answers((FOUND / name / case).read_bytes())


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_seeds_get_past_the_first_check(name: str) -> None:
    """Else nothing behind it would be tried."""
    one = TARGETS[name]
    assert any(one.answers(seed) for seed in one.seeds()) or one.is_packed


def attack(name: str, count: int, seed: int) -> None:
    one = TARGETS[name]
    for data in islice(cases(one, Random(seed)), count):
        before = time.process_time()
        held = False
        try:
            one.answers(data)
            held = True
        finally:
            if not held:
                print(f"{name} broke on {data!r}")
        assert time.process_time() - before < CASE_S, f"{name} of {data[:2000]!r}"
