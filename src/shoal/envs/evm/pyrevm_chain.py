"""A chain inside this process: pyrevm executes, this module keeps what a chain keeps.

pyrevm 0.3.7 is an executor. Blocks, times and nonces are kept here; fees are not charged; slots stay warm after a
first touch, so its gas is wrong and nothing here reports it. `commit()` is never called (it breaks later calls), and
balances are moved by transactions only, because `set_balance` escapes the journal. Every snapshot must be reverted:
one that is not adds to the depth of calls for good, and at 1,024 all calls fail.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import pyrevm
from pyrevm import EVM, AccountInfo, BlockEnv

from shoal.envs.evm.chain import (
    BLOCK_SECONDS,
    CHAIN_ID,
    GAS_LIMIT,
    GENESIS_BLOCK,
    GENESIS_TIME,
    ChainBackend,
    Log,
    Receipt,
    Reverted,
    Transaction,
)
from shoal.envs.evm.genesis import load_genesis
from shoal.envs.evm.reasons import read_reason, revert_data

SPEC = "SHANGHAI"


@dataclass(frozen=True, slots=True)
class _Point:
    checkpoint: object
    block: int
    time: int
    nonces: tuple[tuple[str, int], ...]
    num_receipts: int


class PyrevmChain(ChainBackend):
    """The default backend."""

    def __init__(self) -> None:
        config = pyrevm.CfgEnv(chain_id=CHAIN_ID)
        self._evm = EVM(env=pyrevm.Env(cfg=config), gas_limit=GAS_LIMIT, spec_id=SPEC)
        self._block, self._time = GENESIS_BLOCK, GENESIS_TIME
        self._nonces: dict[str, int] = {}
        self._receipts: list[Receipt] = []
        for address, account in load_genesis().accounts.items():
            info = AccountInfo(nonce=account.nonce, code=account.code or None)
            self._evm.insert_account_info(address, info)
            self._evm.set_balance(address, account.balance)
            for slot, value in account.storage.items():
                self._evm.insert_account_storage(address, slot, value)
            self._nonces[address] = account.nonce
        self._enter_block()

    def _enter_block(self) -> None:
        self._evm.set_block_env(
            BlockEnv(number=self._block, timestamp=self._time, gas_limit=30_000_000, basefee=0, prevrandao=bytes(32))
        )

    def _pass(self, blocks: int) -> None:
        self._block += blocks
        self._time += blocks * BLOCK_SECONDS
        self._enter_block()

    def send(self, transaction: Transaction) -> Receipt:
        receipt = self._execute(transaction)
        self._receipts.append(receipt)
        return receipt

    def _execute(self, t: Transaction) -> Receipt:
        self._pass(1)
        self._nonces[t.sender] = self._nonces.get(t.sender, 0) + 1
        try:
            self._evm.message_call(caller=t.sender, to=t.to, calldata=t.data, value=t.value, gas=GAS_LIMIT)
        except (RuntimeError, OverflowError) as error:
            return Receipt(t, False, self._block, reason=read_reason(str(error)))
        result = self._evm.result
        logs = tuple(_log(entry) for entry in result.logs) if result is not None else ()
        return Receipt(t, True, self._block, logs)

    def call(self, to: str, data: bytes, sender: str, value: int = 0) -> bytes:
        # What a node does: run it, then forget it. (A static call would refuse functions that write.)
        point = self._evm.snapshot()
        try:
            return self._evm.message_call(caller=sender, to=to, calldata=data, value=value, gas=GAS_LIMIT)
        except (RuntimeError, OverflowError) as error:
            raise Reverted(read_reason(str(error)), revert_data(str(error))) from None
        finally:
            self._evm.revert(point)

    def balance(self, address: str) -> int:
        return self._evm.get_balance(address)

    def nonce(self, address: str) -> int:
        return self._nonces.get(address, 0)

    def code(self, address: str) -> bytes:
        return self._evm.get_code(address) or b""

    def storage(self, address: str, slot: int) -> int:
        return self._evm.storage(address, slot)

    def receipts(self) -> Sequence[Receipt]:
        return self._receipts

    def block_number(self) -> int:
        return self._block

    def timestamp(self) -> int:
        return self._time

    def mine(self, blocks: int) -> None:
        self._pass(blocks)

    def snapshot(self) -> Hashable:
        return _Point(self._evm.snapshot(), self._block, self._time, tuple(self._nonces.items()), len(self._receipts))

    def revert(self, snapshot: Hashable) -> None:
        assert isinstance(snapshot, _Point)
        self._evm.revert(snapshot.checkpoint)  # type: ignore[arg-type]
        self._block, self._time, self._nonces = snapshot.block, snapshot.time, dict(snapshot.nonces)
        del self._receipts[snapshot.num_receipts :]
        self._enter_block()

    def close(self) -> None:
        return None


def _log(entry: pyrevm.Log) -> Log:
    topics, data = entry.data
    return Log(str(entry.address).lower(), tuple(bytes(topic) for topic in topics), bytes(data))
