"""A tiny model and servers of it: real processes on loopback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The checkpoints are those of the engine's tests; the processes are started as those of the commands' tests.
for folder in ("engine", "cli"):
    sys.path.append(str(Path(__file__).parents[1] / folder))

from engine_cases import PLAIN, make_checkpoint  # noqa: E402
from serving_cases import ChatServer, start  # noqa: E402


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama over bytes, with a chat template."""
    return make_checkpoint(tmp_path_factory.mktemp("served") / "model", PLAIN, max_position_embeddings=2048)


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatServer]:
    """One server that asks for no key, shared by the tests that leave it as they found it."""
    with start(model, tmp_path_factory.mktemp("server")) as running:
        yield running
