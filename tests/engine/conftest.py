"""Checkpoints that several tests of the engine read, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import PLAIN, make_checkpoint, reference

from shoal.engine.source import LocalModel, resolve
from shoal.fabric.identity import data_dir


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums are made in one order, and tests on a busy machine do not wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama; nobody writes into it."""
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "model", PLAIN)


@pytest.fixture(scope="session")
def plain_reference(plain: Path) -> Any:
    return reference(plain)


@pytest.fixture(scope="session")
def embedded() -> LocalModel:
    """The real 135 M model, from this user's cache; fetched and converted by whoever comes first."""
    return resolve("embedded", data_dir() / "models")


@pytest.fixture(scope="session")
def embedded_reference(embedded: LocalModel) -> Any:
    """The same in `transformers`, in fp32."""
    return reference(embedded.directory)
