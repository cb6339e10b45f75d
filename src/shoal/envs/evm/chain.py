"""What a quest needs of a chain: one interface, whatever executes it.

Responsibilities: `ChainBackend` and the values it exchanges. Two rooms implement it: `pyrevm_chain` (in this process,
the default) and `anvil` (a node in a process of its own, the truth that the other is compared with).

Invariants:
- A backend starts from the committed genesis: the same accounts, code, storage, block number and time everywhere.
- Every transaction has a block of its own, 3 s after the last. Fees are zero; a nonce counts every transaction.
- After `revert(snapshot)` nothing can be read that happened since `snapshot()`; a snapshot is used up by its revert.
- Amounts are wei, addresses are lower-case hex.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from shoal.errors import ShoalError

CHAIN_ID = 56
BLOCK_SECONDS = 3
GENESIS_BLOCK = 40_000_000
GENESIS_TIME = 1_720_000_000
GAS_PRICE = 3_000_000_000
"""What the chain answers when asked for its price of gas; nothing is charged."""

PRIORITY_FEE = 1_000_000_000
"""The priority fee it answers with."""

BASE_FEE = (GAS_PRICE - PRIORITY_FEE) // 2
"""The base fee it answers with: twice that and the priority fee, as clients reckon, are the price of gas."""

GAS_LIMIT = 10_000_000


class ChainError(ShoalError):
    """A chain that cannot be started, reached, or did not answer in time."""


class Reverted(Exception):
    """A call that failed on the chain; the text is the reason, where the contract gave one, `data` what it returned."""

    def __init__(self, reason: str, data: bytes = b"") -> None:
        super().__init__(reason)
        self.data = data


@dataclass(frozen=True, slots=True)
class Transaction:
    """Unsigned: what is asked of the chain."""

    sender: str
    to: str
    data: bytes = b""
    value: int = 0


@dataclass(frozen=True, slots=True)
class Log:
    address: str
    topics: tuple[bytes, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a transaction."""

    transaction: Transaction
    success: bool
    block: int
    logs: tuple[Log, ...] = ()
    reason: str = ""
    """Why it failed, as the contract put it."""


class ChainBackend(ABC):
    """One chain. Not for several tasks at once: an episode has one of its own."""

    @abstractmethod
    def send(self, transaction: Transaction) -> Receipt:
        """Execute in a new block. A transaction that reverts has a receipt as well."""

    @abstractmethod
    def call(self, to: str, data: bytes, sender: str, value: int = 0) -> bytes:
        """What a call would return at the head; raises `Reverted`."""

    @abstractmethod
    def balance(self, address: str) -> int:
        """Wei held by `address`."""

    @abstractmethod
    def nonce(self, address: str) -> int:
        """Transactions sent by `address`."""

    @abstractmethod
    def code(self, address: str) -> bytes:
        """The code at `address`; empty where there is none."""

    @abstractmethod
    def storage(self, address: str, slot: int) -> int:
        """What a contract keeps in a slot."""

    @abstractmethod
    def receipts(self) -> Sequence[Receipt]:
        """Of every transaction since the genesis, in order."""

    @abstractmethod
    def block_number(self) -> int:
        """Number of the head block."""

    @abstractmethod
    def timestamp(self) -> int:
        """Unix seconds of the head block."""

    @abstractmethod
    def mine(self, blocks: int) -> None:
        """Let `blocks` empty blocks pass."""

    @abstractmethod
    def snapshot(self) -> Hashable:
        """A point to come back to."""

    @abstractmethod
    def revert(self, snapshot: Hashable) -> None:
        """Back to the point."""

    @abstractmethod
    def close(self) -> None:
        """Let go of processes and sockets."""

    def gas_price(self) -> int:
        """Wei a unit of gas, as the chain answers."""
        return GAS_PRICE

    def priority_fee(self) -> int:
        """Wei a unit of gas for whoever makes the block, as the chain answers."""
        return PRIORITY_FEE
