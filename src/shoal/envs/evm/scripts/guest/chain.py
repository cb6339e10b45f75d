"""The chain as a Python script sees it: reads by JSON-RPC, contracts, and signatures of the agent's own account.

The names are those of web3.py where it has them. Nothing here sends: a script returns its transaction.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

from eth_abi.abi import encode
from eth_keys.datatypes import PrivateKey
from eth_utils.crypto import keccak

from shoal.envs.evm.scripts.guest.contract import ARTIFACTS, Contract, Function, read_abi

TIMEOUT_S = 30
WEI = {"wei": 1, "gwei": 10**9, "ether": 10**18}
_PERMIT = "Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"


class ChainError(Exception):
    """The chain refused a question, or a call reverted."""


@lru_cache(maxsize=1)
def known_interfaces() -> dict[str, list[Function]]:
    """The functions of every contract that quests start with, by contract."""
    return {name: read_abi(artifact["abi"]) for name, artifact in json.loads(ARTIFACTS.read_text()).items()}


class Chain:
    """One episode's chain, from the agent's account."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.address: str = task["agent"]
        self.contracts: dict[str, str] = task["contracts"]
        """Address of each contract, by name."""
        self._kinds: dict[str, str] = task["kinds"]
        self._path: str = task["path"]
        self._key: str = task["key"]
        self._connection = http.client.HTTPConnection(task["host"], task["port"], timeout=TIMEOUT_S)

    def request(self, method: str, params: Sequence[Any] = ()) -> Any:
        """One question in JSON-RPC.

        Raises:
            ChainError: the answer is an error.
        """
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)})
        self._connection.request("POST", self._path, body, {"content-type": "application/json"})
        answer = json.loads(self._connection.getresponse().read())
        if "error" in answer:
            raise ChainError(answer["error"]["message"])
        return answer["result"]

    @property
    def block_number(self) -> int:
        return int(self.request("eth_blockNumber"), 16)

    @property
    def gas_price(self) -> int:
        return int(self.request("eth_gasPrice"), 16)

    @property
    def max_priority_fee(self) -> int:
        return int(self.request("eth_maxPriorityFeePerGas"), 16)

    def get_balance(self, address: str) -> int:
        """Wei."""
        return int(self.request("eth_getBalance", [address, "latest"]), 16)

    def get_transaction_count(self, address: str) -> int:
        return int(self.request("eth_getTransactionCount", [address, "latest"]), 16)

    def get_code(self, address: str) -> bytes:
        return bytes.fromhex(self.request("eth_getCode", [address, "latest"])[2:])

    def get_storage_at(self, address: str, slot: int) -> int:
        return int(self.request("eth_getStorageAt", [address, hex(slot), "latest"]), 16)

    def get_block(self, number: int | str = "latest") -> dict[str, Any]:
        """A block, its numbers as integers."""
        block = self.request("eth_getBlockByNumber", [hex(number) if isinstance(number, int) else number, False])
        numbers = ("number", "timestamp", "gasLimit", "gasUsed", "baseFeePerGas")
        return {name: int(value, 16) if name in numbers else value for name, value in block.items()}

    def get_logs(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        """Events of this episode, by `fromBlock`, `toBlock`, `address` and `topics`."""
        numbers = {name: hex(value) if isinstance(value, int) else value for name, value in wanted.items()}
        return list(self.request("eth_getLogs", [numbers]))

    def get_transaction_receipt(self, transaction_hash: str) -> dict[str, Any] | None:
        return self.request("eth_getTransactionReceipt", [transaction_hash])  # type: ignore[no-any-return]

    def call(self, transaction: dict[str, Any]) -> bytes:
        """What a call would return; raises `ChainError` where it reverts."""
        value = transaction.get("value", 0)
        asked = {"from": self.address, **transaction, "value": hex(value) if isinstance(value, int) else value}
        return bytes.fromhex(self.request("eth_call", [asked, "latest"])[2:])

    def contract(self, address: str, abi: Sequence[Any] | str | None = None) -> Contract:
        """A contract by its address or name; without `abi`, one of those that quests start with."""
        address = self.contracts.get(address, address)
        kind = self._kinds.get(address.lower())
        if abi is None and kind is None:
            raise ChainError(f"{address} is not one of the known contracts: give its abi")
        functions = known_interfaces()[str(kind)] if abi is None else read_abi(abi)
        return Contract(address, functions, self.call)

    def sign_permit(self, token: str, spender: str, value: int, deadline: int) -> dict[str, Any]:
        """The transaction of an ERC-2612 permit, signed by the agent."""
        abi = [
            "function nonces(address) returns (uint256)",
            "function DOMAIN_SEPARATOR() returns (bytes32)",
            "function permit(address,address,uint256,uint256,uint8,bytes32,bytes32)",
        ]
        contract = self.contract(token, abi)
        nonce = contract.functions.nonces(self.address).call()
        domain = contract.functions.DOMAIN_SEPARATOR().call()
        kinds = ["bytes32", "address", "address", "uint256", "uint256", "uint256"]
        content = keccak(encode(kinds, [keccak(text=_PERMIT), self.address, spender, value, nonce, deadline]))
        signed = PrivateKey(bytes.fromhex(self._key[2:])).sign_msg_hash(keccak(b"\x19\x01" + domain + content))
        r, s = signed.r.to_bytes(32, "big"), signed.s.to_bytes(32, "big")
        permit = contract.functions.permit(self.address, spender, value, deadline, signed.v + 27, r, s)
        return permit.build_transaction()


def to_wei(number: int | str | Decimal, unit: str = "ether") -> int:
    """A number of ether (or gwei) as wei."""
    return int(Decimal(str(number)) * WEI[unit])


def from_wei(number: int, unit: str = "ether") -> Decimal:
    """Wei as a number of ether (or gwei)."""
    return Decimal(number) / WEI[unit]
