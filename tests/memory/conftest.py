"""The tiny model of `tiny`, and worlds and samplers to try memories in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from memory_arenas import make_arena

from shoal.memory.trials import Arena
from tiny import tiny_model

__all__ = ["tiny_model"]


@pytest.fixture
def arena(tiny_model: Path) -> Arena:
    """Trials of `FirstDigit`, sampled by a reader of prompts."""
    return make_arena(tiny_model)
