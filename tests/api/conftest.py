"""The tiny models, and runs of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tiny import tiny_model

# The checkpoint whose tokens are bytes, as grammars need them, is that of the engine's tests.
sys.path.append(str(Path(__file__).parents[1] / "engine"))

from engine_cases import make_checkpoint

__all__ = ["bytes_model", "tiny_model"]


@pytest.fixture(scope="session")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("bytes") / "model")
