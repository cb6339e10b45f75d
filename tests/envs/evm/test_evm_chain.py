"""Both backends keep the same promises, and the same state."""

from __future__ import annotations

import pytest

from shoal.envs.evm.abi import encode
from shoal.envs.evm.chain import BLOCK_SECONDS, GENESIS_BLOCK, GENESIS_TIME, ChainBackend, Reverted, Transaction
from shoal.envs.evm.genesis import AGENT, WHALE, load_genesis
from shoal.envs.evm.language import ETHER, World

USDT = load_genesis().names["USDT"]
STRANGER = "0x" + "ab" * 20
READS = (
    "bnb(me)",
    "USDT.balanceOf(me)",
    "BUSD.balanceOf(me)",
    "CAKE.balanceOf(me)",
    "WBNB.balanceOf(me)",
    "USDT_BUSD.balanceOf(me)",
    "USDT_WBNB.balanceOf(me)",
    "USDT_BUSD.getReserves()",
    "USDT_WBNB.getReserves()",
    "CAKE_BUSD.getReserves()",
    "reward_pool.pendingReward(me)",
    "reward_pool.userInfo(me)",
    "nft.tokenURI(7)",
    "nft.ownerOf(7) == me",
    "multi.balanceOf(me, 1)",
    "T1363.DOMAIN_SEPARATOR()",
    "router.getAmountsIn(ether, [USDT, WBNB, CAKE])",
    "block()",
    "now",
    "nonce(me)",
)


def start(chain: ChainBackend) -> dict[str, object]:
    return {read: World(chain, {}).evaluate(read) for read in READS}


def test_the_agent_starts_with_what_the_benchmark_gives(pyrevm: ChainBackend) -> None:
    values = start(pyrevm)
    held = {name: values[f"{name}.balanceOf(me)"] for name in ("USDT", "BUSD", "CAKE", "WBNB")}
    assert held == {"USDT": 1000 * ETHER, "BUSD": 1000 * ETHER, "CAKE": 200 * ETHER, "WBNB": 100 * ETHER}
    assert values["bnb(me)"] == 100 * ETHER
    assert (values["block()"], values["now"]) == (GENESIS_BLOCK, GENESIS_TIME)


def test_both_backends_start_from_the_same_state(pyrevm: ChainBackend, anvil: ChainBackend) -> None:
    assert start(pyrevm) == start(anvil)


def test_a_snapshot_brings_everything_back(chain: ChainBackend) -> None:
    before = start(chain)
    for _ in range(20):
        point = chain.snapshot()
        assert chain.send(Transaction(AGENT, STRANGER, value=ETHER)).success
        assert chain.send(Transaction(AGENT, USDT, encode("transfer(address,uint256)", [STRANGER, 5]))).success
        chain.mine(3)
        assert chain.balance(STRANGER) == ETHER
        assert chain.block_number() == GENESIS_BLOCK + 5
        assert chain.timestamp() == GENESIS_TIME + 5 * BLOCK_SECONDS
        chain.revert(point)
        assert start(chain) == before


def test_a_failure_takes_a_block_and_a_nonce_and_nothing_else(chain: ChainBackend) -> None:
    point = chain.snapshot()
    before = chain.balance(AGENT), chain.nonce(AGENT)
    reverted = chain.send(Transaction(AGENT, USDT, encode("transfer(address,uint256)", [STRANGER, 10**30])))
    poor = chain.send(Transaction(STRANGER, WHALE, value=1))
    payable = chain.send(Transaction(AGENT, USDT, encode("approve(address,uint256)", [STRANGER, 1]), value=5))
    assert not (reverted.success or poor.success or payable.success)
    assert reverted.reason == "transfer amount exceeds balance"
    assert poor.reason == "not enough BNB"
    assert (reverted.block, poor.block, payable.block) == tuple(GENESIS_BLOCK + n for n in (1, 2, 3))
    assert (chain.balance(AGENT), chain.nonce(AGENT)) == (before[0], before[1] + 2)
    chain.revert(point)


def test_a_call_changes_nothing_and_says_why_it_fails(chain: ChainBackend) -> None:
    transfer = encode("transfer(address,uint256)", [STRANGER, 5])
    assert int.from_bytes(chain.call(USDT, transfer, AGENT), "big") == 1
    assert World(chain, {"to": STRANGER}).evaluate("USDT.balanceOf(to)") == 0
    with pytest.raises(Reverted, match="exceeds balance"):
        chain.call(USDT, encode("transfer(address,uint256)", [STRANGER, 10**30]), AGENT)


def test_logs_are_those_of_the_transaction(chain: ChainBackend) -> None:
    point = chain.snapshot()
    receipt = chain.send(Transaction(AGENT, USDT, encode("transfer(address,uint256)", [STRANGER, 5])))
    chain.revert(point)
    (log,) = receipt.logs
    assert log.address == USDT
    assert log.topics[2][-20:].hex() == STRANGER[2:]
    assert int.from_bytes(log.data, "big") == 5


def test_thousands_of_cycles_do_not_wear_a_chain_out(pyrevm: ChainBackend) -> None:
    for _ in range(3000):
        point = pyrevm.snapshot()
        assert pyrevm.send(Transaction(AGENT, STRANGER, value=1)).success
        assert not pyrevm.send(Transaction(STRANGER, AGENT, value=10**30)).success
        pyrevm.revert(point)
    assert start(pyrevm)["bnb(me)"] == 100 * ETHER


@pytest.mark.slow
def test_a_thousand_cycles_lose_no_transaction_on_anvil(anvil: ChainBackend) -> None:
    for _ in range(1000):
        point = anvil.snapshot()
        assert anvil.send(Transaction(AGENT, STRANGER, value=1)).success
        assert anvil.balance(STRANGER) == 1
        anvil.revert(point)
