"""A tiny model to decide with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The checkpoint is that of the engine's tests; servers are started as in the API's tests.
for folder in ("engine", "cli", "serving"):
    sys.path.append(str(Path(__file__).parents[1] / folder))

from engine_cases import PLAIN, make_checkpoint  # noqa: E402


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama over bytes, with a chat template."""
    return make_checkpoint(tmp_path_factory.mktemp("deciding") / "model", PLAIN, max_position_embeddings=4096)
