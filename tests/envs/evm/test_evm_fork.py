"""Forking a live chain at a pinned block; the live chain is an Anvil of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from shoal.envs.evm.abi import decode, encode
from shoal.envs.evm.anvil import BUILD_BLOCKS, AnvilChain, Fork, find_anvil
from shoal.envs.evm.chain import BLOCK_SECONDS, ChainBackend, ChainError, Transaction
from shoal.envs.evm.definition import shipped_tasks
from shoal.envs.evm.genesis import AGENT, WHALE, load_genesis
from shoal.envs.evm.language import ETHER
from shoal.envs.evm.sampling import sample
from shoal.envs.evm.selftest import reference

NAMES = load_genesis().names
USDT = NAMES["USDT"]
SOLVED = ("erc20_transfer_fixed", "swap_exact_tokens_for_tokens", "harvest_rewards", "composite_swap_approve_stake")
"""Quests done on a fork that has everything."""


@pytest.fixture
def upstream() -> Iterator[AnvilChain]:
    """A live chain with our contracts."""
    if find_anvil() is None:
        pytest.skip("Anvil is not installed (SHOAL_ANVIL, PATH or node_modules)")
    with closing(AnvilChain()) as chain:
        yield chain


def held(chain: ChainBackend, who: str) -> int:
    return int(decode(["uint256"], chain.call(USDT, encode("balanceOf(address)", [who]), AGENT))[0])


def pay(chain: ChainBackend, who: str, amount: int) -> None:
    assert chain.send(Transaction(AGENT, USDT, encode("transfer(address,uint256)", [who, amount]))).success


def test_a_fork_stands_at_its_block_whatever_happens_upstream(upstream: AnvilChain) -> None:
    pay(upstream, WHALE, 7 * ETHER)
    pinned, rich = upstream.block_number(), held(upstream, WHALE)
    pay(upstream, WHALE, 5 * ETHER)
    upstream.mine(10)
    with closing(AnvilChain(fork=Fork(upstream.url, pinned))) as fork:
        assert fork.block_number() == pinned
        # The agent has what every quest starts with, of the fork's own token.
        assert (held(fork, AGENT), fork.balance(AGENT)) == (1000 * ETHER, 100 * ETHER)
        assert fork.code(USDT) == upstream.code(USDT)
        point, time = fork.snapshot(), fork.timestamp()
        pay(fork, WHALE, ETHER)
        assert (fork.block_number(), fork.timestamp()) == (pinned + 1, time + BLOCK_SECONDS)
        fork.revert(point)
        assert held(fork, AGENT) == 1000 * ETHER
        for name in SOLVED:
            assert reference(sample(shipped_tasks()[name], 1), fork)[1].strict == 100, name
    assert held(upstream, WHALE) == rich + 5 * ETHER


@pytest.mark.slow
def test_what_a_fork_lacks_is_laid_over_it() -> None:
    """A live chain without any of our contracts: everything is ours, and all quests can be done there."""
    if find_anvil() is None:
        pytest.skip("Anvil is not installed (SHOAL_ANVIL, PATH or node_modules)")
    with closing(AnvilChain(genesis=False)) as empty:
        with pytest.raises(ChainError, match="older than what quests begin with"):
            AnvilChain(fork=Fork(empty.url, empty.block_number()))
        empty.mine(BUILD_BLOCKS + 100)
        with closing(AnvilChain(fork=Fork(empty.url, empty.block_number()))) as fork:
            assert not empty.code(USDT) and fork.code(USDT)
            for task in shipped_tasks().values():
                assert reference(sample(task, 0), fork)[1].strict == 100, task.id


@pytest.mark.parametrize("block", [0, 10**9])
def test_a_fork_that_cannot_be_is_said_to(block: int) -> None:
    if find_anvil() is None:
        pytest.skip("Anvil is not installed (SHOAL_ANVIL, PATH or node_modules)")
    url = "http://127.0.0.1:9"
    with pytest.raises(ChainError, match=rf"could not fork {url} at block {block}\. Check that the URL answers"):
        AnvilChain(fork=Fork(url, block))
