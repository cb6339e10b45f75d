"""What a script may read of its chain: Ethereum's JSON-RPC methods, reading ones only, answered from a `ChainBackend`.

Responsibilities: the allow-list, the shape of each answer, and noting in the quest's record what was asked, so that a
script's reads count as a typed query's do. Both backends are reached through this one table.

Invariants: nothing here changes the chain, signs, or touches a node's settings; only the head's state is kept. Hashes
of blocks and transactions are the platform's own (nothing is signed here), and equal on both backends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from eth_utils.crypto import keccak

from shoal.envs.evm.chain import BASE_FEE, BLOCK_SECONDS, CHAIN_ID, ChainBackend, Log, Receipt
from shoal.envs.evm.record import Asked, Record

MAX_LOGS = 1_000
MAX_CHOICES = 100
"""Of one topic, or percentiles of one question."""
MAX_HISTORY_BLOCKS = 128
BLOCK_GAS_LIMIT = 30_000_000
GAS_ESTIMATE = 500_000
"""Gas is free and not metered; this is above what any of our contracts uses."""

INVALID_PARAMS, REFUSED = -32602, -32005
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_HEX = re.compile(r"0x(?:[0-9a-fA-F]{2})*")
_QUANTITY = re.compile(r"0x[0-9a-fA-F]{1,64}")
_HEAD = ("latest", "pending", "safe", "finalized")
_NOBODY = "0x" + "00" * 20


class RpcError(Exception):
    """An answer that is an error."""

    def __init__(self, code: int, message: str, data: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.data = data


@dataclass
class ChainReader:
    """One script's view of one chain; what it asks goes into `record`."""

    chain: ChainBackend
    record: Record

    def note(self, to: str, data: bytes) -> None:
        """Remember that something was asked."""
        self.record.asked.append(Asked(to, data, len(self.record.receipts)))

    def at_head(self, tag: Any) -> None:
        """Raise `RpcError` where a question is not about the head."""
        if tag in _HEAD or (isinstance(tag, str) and self.number(tag) == self.chain.block_number()):
            return
        raise RpcError(INVALID_PARAMS, "only the latest block's state is kept")

    def number(self, tag: Any) -> int:
        """The block that a tag means."""
        if tag in _HEAD:
            return self.chain.block_number()
        if tag == "earliest":
            return 0
        return _quantity(tag)


class _Method(NamedTuple):
    run: Callable[[ChainReader, list[Any]], Any]
    least: int
    most: int


def _address(value: Any) -> str:
    if not isinstance(value, str) or not _ADDRESS.fullmatch(value):
        raise RpcError(INVALID_PARAMS, f"{str(value)[:60]!r} is no address")
    return value.lower()


def _quantity(value: Any) -> int:
    if not isinstance(value, str) or not _QUANTITY.fullmatch(value):
        raise RpcError(INVALID_PARAMS, f"{str(value)[:60]!r} is no hexadecimal quantity")
    return int(value, 16)


def _word(number: int) -> str:
    return f"0x{number:064x}"


def _balance(reader: ChainReader, params: list[Any]) -> str:
    address = _address(params[0])
    reader.at_head(params[1] if len(params) > 1 else "latest")
    reader.note("eth_getBalance", address.encode())
    return hex(reader.chain.balance(address))


def _nonce(reader: ChainReader, params: list[Any]) -> str:
    address = _address(params[0])
    reader.at_head(params[1] if len(params) > 1 else "latest")
    reader.note("eth_getTransactionCount", address.encode())
    return hex(reader.chain.nonce(address))


def _code(reader: ChainReader, params: list[Any]) -> str:
    reader.at_head(params[1] if len(params) > 1 else "latest")
    return "0x" + reader.chain.code(_address(params[0])).hex()


def _storage(reader: ChainReader, params: list[Any]) -> str:
    reader.at_head(params[2] if len(params) > 2 else "latest")
    return _word(reader.chain.storage(_address(params[0]), _quantity(params[1])))


def _block_number(reader: ChainReader, params: list[Any]) -> str:
    reader.note("eth_blockNumber", b"")
    return hex(reader.chain.block_number())


def _gas_price(reader: ChainReader, params: list[Any]) -> str:
    reader.note("eth_gasPrice", b"")
    return hex(reader.chain.gas_price())


def _priority_fee(reader: ChainReader, params: list[Any]) -> str:
    reader.note("eth_maxPriorityFeePerGas", b"")
    return hex(reader.chain.priority_fee())


def _execute(reader: ChainReader, request: Any) -> tuple[str, bytes, bytes]:
    """Callee, call data and what the call returns."""
    if not isinstance(request, dict) or request.get("to") is None:
        raise RpcError(INVALID_PARAMS, "a call is an object with `to`")
    to = _address(request["to"])
    sender = _NOBODY if request.get("from") is None else _address(request["from"])
    text = next((request[key] for key in ("data", "input") if request.get(key) is not None), "0x")
    if not isinstance(text, str) or not _HEX.fullmatch(text):
        raise RpcError(INVALID_PARAMS, "the call's data is not hex")
    data = bytes.fromhex(text[2:])
    value = 0 if request.get("value") is None else _quantity(request["value"])
    return to, data, reader.chain.call(to, data, sender, value)


def _eth_call(reader: ChainReader, params: list[Any]) -> str:
    reader.at_head(params[1] if len(params) > 1 else "latest")
    to, data, result = _execute(reader, params[0])
    reader.note(to, data)
    return "0x" + result.hex()


def _estimate(reader: ChainReader, params: list[Any]) -> str:
    reader.at_head(params[1] if len(params) > 1 else "latest")
    _execute(reader, params[0])
    return hex(GAS_ESTIMATE)


def _block_hash(number: int) -> str:
    return "0x" + keccak(text=f"block {number}").hex()


def transaction_hash(receipt: Receipt) -> str:
    """The platform's name of a transaction."""
    t = receipt.transaction
    return "0x" + keccak(text=f"{receipt.block} {t.sender} {t.to} {t.value} {t.data.hex()}").hex()


def _block(reader: ChainReader, params: list[Any]) -> dict[str, Any] | None:
    head = reader.chain.block_number()
    number = reader.number(params[0])
    if number > head or number < head - MAX_HISTORY_BLOCKS:
        return None
    if number == head:
        reader.note("eth_blockNumber", b"")
    return {
        "number": hex(number),
        "hash": _block_hash(number),
        "parentHash": _block_hash(number - 1),
        "timestamp": hex(reader.chain.timestamp() - (head - number) * BLOCK_SECONDS),
        "nonce": "0x0000000000000000",
        "difficulty": "0x0",
        "gasLimit": hex(BLOCK_GAS_LIMIT),
        "gasUsed": "0x0",
        "miner": _NOBODY,
        "extraData": "0x",
        "baseFeePerGas": hex(BASE_FEE),
        "transactions": [transaction_hash(r) for r in reader.chain.receipts() if r.block == number],
    }


def _fee_history(reader: ChainReader, params: list[Any]) -> dict[str, Any]:
    asked = params[0] if isinstance(params[0], int) else _quantity(params[0])
    newest = reader.number(params[1])
    if isinstance(asked, bool) or not 1 <= asked <= MAX_HISTORY_BLOCKS or newest > reader.chain.block_number():
        raise RpcError(INVALID_PARAMS, f"a fee history has 1 to {MAX_HISTORY_BLOCKS} blocks, up to the latest")
    percentiles = params[2] if len(params) > 2 and isinstance(params[2], list) else []
    if len(percentiles) > MAX_CHOICES:
        raise RpcError(INVALID_PARAMS, "too many percentiles")
    return {
        "oldestBlock": hex(max(0, newest - asked + 1)),
        "baseFeePerGas": [hex(BASE_FEE)] * (asked + 1),
        "gasUsedRatio": [0.0] * asked,
        "reward": [[hex(reader.chain.priority_fee())] * len(percentiles)] * asked,
    }


def _log_entry(receipt: Receipt, log: Log, index: int) -> dict[str, Any]:
    return {
        "address": log.address,
        "topics": ["0x" + topic.hex() for topic in log.topics],
        "data": "0x" + log.data.hex(),
        "blockNumber": hex(receipt.block),
        "blockHash": _block_hash(receipt.block),
        "transactionHash": transaction_hash(receipt),
        "transactionIndex": "0x0",
        "logIndex": hex(index),
        "removed": False,
    }


def _topics(wanted: Any) -> list[set[str] | None]:
    """For each place the topics that fit, None for any."""
    if not isinstance(wanted, list) or len(wanted) > 4:
        raise RpcError(INVALID_PARAMS, "topics are a list of at most four")
    places: list[set[str] | None] = []
    for place in wanted:
        choices = place if isinstance(place, list) else [place]
        if len(choices) > MAX_CHOICES or not all(isinstance(choice, str | None) for choice in choices):
            raise RpcError(INVALID_PARAMS, "a topic is hex, a list of such, or null")
        places.append(None if None in choices or not choices else {str(choice).lower() for choice in choices})
    return places


def _logs(reader: ChainReader, params: list[Any]) -> list[dict[str, Any]]:
    wanted = params[0]
    if not isinstance(wanted, dict) or "blockHash" in wanted:
        raise RpcError(INVALID_PARAMS, "logs are asked for by fromBlock, toBlock, address and topics")
    first = reader.number(wanted.get("fromBlock") or "latest")
    last = reader.number(wanted.get("toBlock") or "latest")
    named = wanted.get("address")
    addresses = None if named is None else {_address(a) for a in (named if isinstance(named, list) else [named])}
    topics = _topics(wanted.get("topics") or [])

    def matching() -> Iterator[dict[str, Any]]:
        for receipt in reader.chain.receipts():
            if not (receipt.success and first <= receipt.block <= last):
                continue
            for index, log in enumerate(receipt.logs):
                given = ["0x" + topic.hex() for topic in log.topics]
                fits = len(given) >= len(topics) and all(
                    place is None or topic in place for place, topic in zip(topics, given, strict=False)
                )
                if fits and (addresses is None or log.address in addresses):
                    yield _log_entry(receipt, log, index)

    found = [entry for entry, _ in zip(matching(), range(MAX_LOGS + 1), strict=False)]
    if len(found) > MAX_LOGS:
        raise RpcError(REFUSED, f"more than {MAX_LOGS} logs fit")
    return found


def _receipt(reader: ChainReader, params: list[Any]) -> dict[str, Any] | None:
    receipt = next((r for r in reader.chain.receipts() if transaction_hash(r) == params[0]), None)
    if receipt is None:
        return None
    return {
        "transactionHash": transaction_hash(receipt),
        "transactionIndex": "0x0",
        "blockNumber": hex(receipt.block),
        "blockHash": _block_hash(receipt.block),
        "from": receipt.transaction.sender,
        "to": receipt.transaction.to,
        "contractAddress": None,
        "status": hex(receipt.success),
        "type": "0x0",
        "gasUsed": "0x0",
        "cumulativeGasUsed": "0x0",
        "effectiveGasPrice": "0x0",
        "logsBloom": "0x" + "00" * 256,
        "logs": [_log_entry(receipt, log, index) for index, log in enumerate(receipt.logs)],
    }


METHODS: dict[str, _Method] = {
    "eth_chainId": _Method(lambda reader, params: hex(CHAIN_ID), 0, 0),
    "net_version": _Method(lambda reader, params: str(CHAIN_ID), 0, 0),
    "eth_blockNumber": _Method(_block_number, 0, 0),
    "eth_gasPrice": _Method(_gas_price, 0, 0),
    "eth_maxPriorityFeePerGas": _Method(_priority_fee, 0, 0),
    "eth_feeHistory": _Method(_fee_history, 2, 3),
    "eth_getBalance": _Method(_balance, 1, 2),
    "eth_getTransactionCount": _Method(_nonce, 1, 2),
    "eth_getCode": _Method(_code, 1, 2),
    "eth_getStorageAt": _Method(_storage, 2, 3),
    "eth_call": _Method(_eth_call, 1, 2),
    "eth_estimateGas": _Method(_estimate, 1, 2),
    "eth_getBlockByNumber": _Method(_block, 1, 2),
    "eth_getLogs": _Method(_logs, 1, 1),
    "eth_getTransactionReceipt": _Method(_receipt, 1, 1),
}
"""All that a script can ask. No method that sends, signs, mines, moves time or touches a node's settings."""
