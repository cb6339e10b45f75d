"""Chains for tests: one in this process, and Anvil where it is installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shoal.envs.evm.anvil import AnvilChain, find_anvil
from shoal.envs.evm.chain import ChainBackend
from shoal.envs.evm.pyrevm_chain import PyrevmChain


@pytest.fixture
def pyrevm() -> ChainBackend:
    return PyrevmChain()


@pytest.fixture(scope="module")
def anvil() -> Iterator[ChainBackend]:
    if find_anvil() is None:
        pytest.skip("Anvil is not installed (SHOAL_ANVIL, PATH or node_modules)")
    chain = AnvilChain()
    yield chain
    chain.close()


@pytest.fixture(params=["pyrevm", "anvil"])
def chain(request: pytest.FixtureRequest) -> ChainBackend:
    """Each backend in turn."""
    backend: ChainBackend = request.getfixturevalue(request.param)
    return backend
