"""The tiny model that reads pages, once for all of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from dream_cases import make_reader


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its directory."""
    return make_reader(tmp_path_factory.mktemp("reader") / "model")
