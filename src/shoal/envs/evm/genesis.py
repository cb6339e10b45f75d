"""The state every quest starts from, and the names of what lives in it.

`contracts/genesis.json` is built by `contracts/build.py` from our Solidity sources: accounts with balance, code and
storage, and for each name its address and contract. Both backends load this one file.

Invariant: the file's hash is the one below, so that every machine starts from the same state.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from importlib import resources

from shoal.errors import StorageError

GENESIS_HASH = "aa44f5988606733ad21d85f8d2d08c286758073d6ec0798b9aa757fc7442a383"
"""BLAKE2b-256 of `genesis.json`; `contracts/build.py` prints the new one."""

AGENT_KEY = bytes.fromhex("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")
"""The agent's key, public on purpose: the first account of the test mnemonic that every development chain shares."""

AGENT = "0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266"
WHALE = "0x70997970c51812dc3a010c7d01b50e0d17dc79c8"
"""Another account, rich: it sets the stage (grants rewards, funds strangers)."""


@dataclass(frozen=True)
class Account:
    balance: int
    nonce: int
    code: bytes
    storage: dict[int, int]


@dataclass(frozen=True)
class Genesis:
    accounts: dict[str, Account]
    names: dict[str, str]
    """Name of a contract in tasks and actions -> address."""
    kinds: dict[str, str]
    """Address -> contract in `artifacts.json`."""


def contract_file(name: str) -> bytes:
    """The bytes of a file in `contracts/`."""
    return resources.files("shoal.envs.evm.contracts").joinpath(name).read_bytes()


@lru_cache(maxsize=1)
def load_genesis() -> Genesis:
    """The committed genesis.

    Raises:
        StorageError: the file is not the one this version was built with.
    """
    raw = contract_file("genesis.json")
    if blake2b(raw, digest_size=32).hexdigest() != GENESIS_HASH:
        raise StorageError("the chain's genesis file is damaged or from another version.", "Install Shoal again.")
    data = json.loads(raw)
    accounts = {
        address: Account(
            balance=int(a["balance"]),
            nonce=a["nonce"],
            code=bytes.fromhex(a["code"]),
            storage={int(slot, 16): int(value, 16) for slot, value in a["storage"].items()},
        )
        for address, a in data["accounts"].items()
    }
    names = {name: entry["address"] for name, entry in data["contracts"].items()}
    kinds = {entry["address"]: entry["contract"] for entry in data["contracts"].values()}
    return Genesis(accounts, names, kinds)
