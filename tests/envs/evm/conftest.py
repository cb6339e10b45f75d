"""Chains for tests: one in this process, and Anvil where it is installed; and sandboxes for scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from shoal.envs.evm.anvil import AnvilChain, find_anvil
from shoal.envs.evm.chain import ChainBackend
from shoal.envs.evm.pyrevm_chain import PyrevmChain
from shoal.envs.evm.scripts import ScriptRunner
from shoal.envs.evm.scripts.ethers import ethers_folder
from shoal.errors import RunError
from shoal.sandbox import Availability, Limits, Sandbox


@pytest.fixture
def pyrevm() -> ChainBackend:
    return PyrevmChain()


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def sandboxes() -> Availability:
    """What kinds of script can run here."""
    return asyncio.run(Sandbox.available())


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def python(sandboxes: Availability) -> AsyncIterator[ScriptRunner]:
    """Runs Python scripts, within limits that let a hostile one end soon."""
    if not sandboxes.python:
        pytest.skip("; ".join(f"{lack.what} {lack.remedy}" for lack in sandboxes.missing))
    limits = Limits(
        wall_s=30, cpu_s=3, memory_bytes=128 << 20, processes=6, output_bytes=64 << 10, scratch_bytes=4 << 20
    )
    async with ScriptRunner("python", workers=1, limits=limits) as runner:
        yield runner


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def typescript(sandboxes: Availability) -> AsyncIterator[ScriptRunner]:
    """Runs TypeScript scripts, where there is Deno and ethers can be had."""
    if not sandboxes.deno:
        pytest.skip("; ".join(f"{lack.what} {lack.remedy}" for lack in sandboxes.missing))
    try:
        ethers_folder()
    except RunError as error:
        pytest.skip(str(error))
    async with ScriptRunner("typescript", workers=1) as runner:
        yield runner
