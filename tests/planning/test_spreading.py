"""Models of a broadcast: the cases one can do by hand, and that nothing beats the fluid optimum."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.planning.spreading import fluid_s, star_s, tree_s

RATES = st.lists(st.floats(1e5, 1e9), min_size=1, max_size=20)


@given(size=st.floats(1, 1e10), source=st.floats(1e5, 1e9), ups=RATES, down=st.floats(1e5, 1e9))
def test_no_strategy_beats_the_fluid_optimum(size: float, source: float, ups: list[float], down: float) -> None:
    downs = [down] * len(ups)
    best = fluid_s(size, source, ups, downs)
    assert best <= star_s(size, source, downs) * (1 + 1e-9)
    assert best >= size / source * (1 - 1e-9) and best >= size / down * (1 - 1e-9)
    # One more slow worker never makes the others' snapshot come sooner than the source can send it once.
    assert fluid_s(size, source, [*ups, 1e5], [*downs, down]) >= size / source * (1 - 1e-9)


def test_by_hand() -> None:
    """100 MB, a source of 10 MB/s, four workers of 10 MB/s up: 4 · 100 / 50 = 8 s, but the source needs 10."""
    assert fluid_s(100e6, 10e6, [10e6] * 4, [1e9] * 4) == pytest.approx(10.0)
    assert fluid_s(100e6, 100e6, [10e6] * 4, [1e9] * 4) == pytest.approx(400 / 140)
    assert star_s(100e6, 10e6, [1e9] * 4) == pytest.approx(40.0)
    assert star_s(1.0, 1.0, []) == fluid_s(1.0, 1.0, [], []) == 0.0
    chain = tree_s(100e6, 10e6, num_chunks=100, fan_out=1, depth=4, hop_s=0.05)
    assert chain == pytest.approx(10.3 + 0.2)
