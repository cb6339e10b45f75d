"""JSON-RPC for scripts: the same answers on both backends, nothing but reads, and never upset."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.envs.evm.abi import decode, encode
from shoal.envs.evm.chain import BLOCK_SECONDS, GAS_PRICE, GENESIS_BLOCK, GENESIS_TIME, ChainBackend, Transaction
from shoal.envs.evm.genesis import AGENT, load_genesis
from shoal.envs.evm.language import ETHER
from shoal.envs.evm.pyrevm_chain import PyrevmChain
from shoal.envs.evm.record import Asked, Record
from shoal.envs.evm.scripts.methods import METHODS, transaction_hash
from shoal.envs.evm.scripts.rpc import MAX_BATCH, RpcSession

NAMES = load_genesis().names
USDT = NAMES["USDT"]
STRANGER = "0x" + "ab" * 20
TRANSFER = encode("transfer(address,uint256)", [STRANGER, 5])

FORBIDDEN = (
    "anvil_setBalance", "anvil_setCode", "anvil_setStorageAt", "anvil_impersonateAccount", "anvil_reset", "anvil_mine",
    "anvil_dealERC20", "anvil_dumpState", "anvil_nodeInfo", "evm_mine", "evm_snapshot", "evm_revert",
    "evm_increaseTime", "evm_setNextBlockTimestamp", "hardhat_setBalance", "hardhat_impersonateAccount",
    "hardhat_reset", "debug_traceTransaction", "debug_traceCall", "personal_unlockAccount", "personal_sendTransaction",
    "eth_sendTransaction", "eth_sendRawTransaction", "eth_sign", "eth_signTypedData_v4", "eth_accounts",
    "eth_requestAccounts", "eth_subscribe", "eth_newFilter", "txpool_content", "admin_peers", "miner_start",
    "tenderly_setBalance", "rpc_modules", "__class__", "",
)  # fmt: skip


def ask(session: RpcSession, method: str, *params: Any) -> Any:
    answer = json.loads(session.answer(json.dumps({"id": 1, "method": method, "params": params}).encode()))
    assert answer["id"] == 1
    if "error" in answer:
        raise LookupError(f"{answer['error']['code']}: {answer['error']['message']} {answer['error'].get('data', '')}")
    return answer["result"]


def everything(chain: ChainBackend) -> dict[str, Any]:
    """What a script can read, after a transfer and a failed one."""
    session = RpcSession(chain, Record())
    transfers = {"address": USDT, "fromBlock": hex(GENESIS_BLOCK), "toBlock": "latest"}
    read = {"from": AGENT, "to": USDT, "data": "0x" + TRANSFER.hex(), "gas": "0x5208", "nonce": "0x1"}
    topic = "0x" + "00" * 12 + STRANGER[2:]
    return {
        "chain": ask(session, "eth_chainId"),
        "network": ask(session, "net_version"),
        "block": ask(session, "eth_blockNumber"),
        "fees": [ask(session, "eth_gasPrice"), ask(session, "eth_maxPriorityFeePerGas")],
        "history": ask(session, "eth_feeHistory", "0x2", "latest", [25, 75]),
        "balance": ask(session, "eth_getBalance", AGENT, "latest"),
        "stranger": ask(session, "eth_getBalance", STRANGER),
        "nonce": ask(session, "eth_getTransactionCount", AGENT, "pending"),
        "code": [ask(session, "eth_getCode", address, "latest") for address in (USDT, AGENT, STRANGER)],
        "storage": [ask(session, "eth_getStorageAt", USDT, hex(slot), "latest") for slot in (0, 1, 2, 2**255)],
        "empty": ask(session, "eth_getStorageAt", STRANGER, "0x0", "latest"),
        "call": ask(session, "eth_call", read, "latest"),
        "estimate": ask(session, "eth_estimateGas", read),
        "nothing": ask(session, "eth_call", {"to": STRANGER, "input": "0x1234"}),
        "head": ask(session, "eth_getBlockByNumber", "latest", False),
        "before": ask(session, "eth_getBlockByNumber", hex(GENESIS_BLOCK), False),
        "future": ask(session, "eth_getBlockByNumber", hex(GENESIS_BLOCK + 10**6), False),
        "logs": ask(session, "eth_getLogs", {**transfers, "topics": [None, None, [topic]]}),
        "all": ask(session, "eth_getLogs", transfers),
        "none": ask(session, "eth_getLogs", {"topics": ["0x" + "11" * 32]}),
        "receipts": [
            ask(session, "eth_getTransactionReceipt", transaction_hash(receipt)) for receipt in chain.receipts()
        ],
        "unknown": ask(session, "eth_getTransactionReceipt", "0x" + "00" * 32),
    }


def acted(chain: ChainBackend) -> dict[str, Any]:
    point = chain.snapshot()
    chain.send(Transaction(AGENT, USDT, TRANSFER))
    chain.send(Transaction(AGENT, USDT, encode("transfer(address,uint256)", [STRANGER, 10**40])))
    chain.send(Transaction(AGENT, STRANGER, value=ETHER))
    read = everything(chain)
    chain.revert(point)
    assert not chain.receipts()
    return read


def test_what_a_script_reads_is_so(pyrevm: ChainBackend) -> None:
    read = acted(pyrevm)
    assert (read["chain"], read["network"], int(read["block"], 16)) == ("0x38", "56", GENESIS_BLOCK + 3)
    assert (int(read["balance"], 16), int(read["stranger"], 16)) == (99 * ETHER, ETHER)
    assert int(read["call"], 16) == 1 and read["nothing"] == "0x"
    assert read["code"][0] == "0x" + load_genesis().accounts[USDT].code.hex() and read["code"][1:] == ["0x", "0x"]
    assert int(read["head"]["timestamp"], 16) == GENESIS_TIME + 3 * BLOCK_SECONDS
    assert int(read["before"]["timestamp"], 16) == GENESIS_TIME and read["future"] is None
    assert [receipt["status"] for receipt in read["receipts"]] == ["0x1", "0x0", "0x1"]
    assert read["head"]["transactions"] == [read["receipts"][2]["transactionHash"]] and read["unknown"] is None
    assert read["logs"] == read["all"] == read["receipts"][0]["logs"] and len(read["logs"]) == 1
    assert read["none"] == []
    assert 2 * int(read["head"]["baseFeePerGas"], 16) + int(read["fees"][1], 16) == GAS_PRICE


def test_both_backends_give_the_same_answers(pyrevm: ChainBackend, anvil: ChainBackend) -> None:
    assert acted(pyrevm) == acted(anvil)


def test_what_was_asked_is_noted_like_a_query(pyrevm: ChainBackend) -> None:
    record = Record()
    session = RpcSession(pyrevm, record)
    read = encode("balanceOf(address)", [AGENT])
    ask(session, "eth_call", {"to": USDT.upper().replace("X", "x"), "data": "0x" + read.hex()}, "latest")
    ask(session, "eth_getBalance", AGENT, "latest")
    ask(session, "eth_getTransactionCount", AGENT)
    ask(session, "eth_blockNumber")
    ask(session, "eth_chainId")
    assert record.asked == [
        Asked(USDT, read, 0),
        Asked("eth_getBalance", AGENT.encode(), 0),
        Asked("eth_getTransactionCount", AGENT.encode(), 0),
        Asked("eth_blockNumber", b"", 0),
    ]


def test_a_reverted_call_says_why(chain: ChainBackend) -> None:
    session = RpcSession(chain, Record())
    poor = encode("transfer(address,uint256)", [STRANGER, 10**40])
    with pytest.raises(LookupError, match="3: execution reverted: transfer amount exceeds balance") as caught:
        ask(session, "eth_call", {"from": AGENT, "to": USDT, "data": "0x" + poor.hex()}, "latest")
    data = bytes.fromhex(str(caught.value).rpartition(" ")[2].rstrip("'")[2:])
    assert data[:4].hex() == "08c379a0"
    assert decode(["string"], data[4:]) == ("transfer amount exceeds balance",)
    with pytest.raises(LookupError, match="exceeds balance"):
        ask(session, "eth_estimateGas", {"from": AGENT, "to": USDT, "data": "0x" + poor.hex()})
    with pytest.raises(LookupError, match="not enough BNB"):
        ask(session, "eth_call", {"from": STRANGER, "to": AGENT, "value": "0x1"}, "latest")
    with pytest.raises(LookupError, match="reverted"):
        ask(session, "eth_call", {"from": AGENT, "to": AGENT, "value": hex(2**256 - 1)}, "latest")


@pytest.mark.parametrize("method", FORBIDDEN)
def test_nothing_but_reads(chain: ChainBackend, method: str) -> None:
    before = everything(chain)
    with pytest.raises(LookupError, match="-32601"):
        ask(RpcSession(chain, Record()), method, AGENT, "0x1")
    assert everything(chain) == before


def test_only_the_head_is_kept(pyrevm: ChainBackend) -> None:
    session = RpcSession(pyrevm, Record())
    assert ask(session, "eth_getBalance", AGENT, hex(GENESIS_BLOCK)) == hex(100 * ETHER)
    for tag in ("earliest", "0x1", hex(GENESIS_BLOCK + 1), {"blockHash": "0x00"}, 5, None):
        with pytest.raises(LookupError, match="-32602"):
            ask(session, "eth_getBalance", AGENT, tag)
    overridden = {USDT: {"code": "0x00"}}
    with pytest.raises(LookupError, match="number of parameters"):
        ask(session, "eth_call", {"to": USDT}, "latest", overridden)


def test_batches_and_bounds(pyrevm: ChainBackend) -> None:
    session = RpcSession(pyrevm, Record())
    batch = [{"id": n, "method": "eth_chainId"} for n in range(MAX_BATCH)]
    answers = json.loads(session.answer(json.dumps(batch).encode()))
    assert [answer["id"] for answer in answers] == list(range(MAX_BATCH))
    assert {answer["result"] for answer in answers} == {"0x38"}
    assert "error" in json.loads(session.answer(json.dumps([*batch, batch[0]]).encode()))
    assert "error" in json.loads(session.answer(b"[]"))
    # One answer is small enough, many together are not.
    code = [{"id": n, "method": "eth_getCode", "params": [NAMES["router"]]} for n in range(MAX_BATCH)]
    answers = json.loads(session.answer(json.dumps(code).encode()))
    assert "result" in answers[0] and "larger than" in answers[-1]["error"]["message"]
    assert len(json.dumps(answers)) < 3 << 20
    session = RpcSession(pyrevm, Record(), questions_left=1)
    assert ask(session, "eth_chainId") == "0x38"
    with pytest.raises(LookupError, match="may ask"):
        ask(session, "eth_chainId")


def test_a_chain_is_kept_busy_only_so_long(pyrevm: ChainBackend) -> None:
    """BLAKE2's rounds cost one gas each: the longest call that ten million buy."""
    session = RpcSession(pyrevm, Record(), seconds_left=0.3)
    rounds = (9_900_000).to_bytes(4, "big") + bytes(208) + b"\x01"
    call = {"method": "eth_call", "params": [{"to": "0x" + "00" * 19 + "09", "data": "0x" + rounds.hex()}]}
    answers = json.loads(session.answer(json.dumps([call] * 50).encode()))
    assert "result" in answers[0] and "keep the chain busy" in answers[-1]["error"]["message"]
    assert session.seconds_left <= 0


odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([AGENT, USDT, STRANGER, "latest", "0x0", "0x1", hex(2**256 - 1), "0x" + TRANSFER.hex(), "0x12"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["to", "from", "data", "value", "address", "topics", "fromBlock", "toBlock"]), inner
        )
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=150)
@given(
    st.binary(max_size=60)
    | odd.map(lambda value: json.dumps(value).encode())
    | st.builds(
        lambda method, params, name: json.dumps({"id": name, "method": method, "params": params}).encode(),
        st.sampled_from(sorted(METHODS)),
        st.lists(odd, max_size=3),
        odd,
    )
)
def test_nothing_upsets_it_and_nothing_changes(body: bytes) -> None:
    answers = json.loads(RpcSession(CHAIN, Record()).answer(body))
    for answer in answers if isinstance(answers, list) else [answers]:
        assert ("result" in answer) is not ("error" in answer)
    assert (CHAIN.balance(AGENT), CHAIN.nonce(AGENT), CHAIN.block_number()) == (100 * ETHER, 0, GENESIS_BLOCK)


CHAIN = PyrevmChain()
