"""A chain in a process of its own: Anvil, spoken to by JSON-RPC on loopback.

Automatic mining is off: under load, Anvil can lose a transaction that it mines by itself after a revert. Here each
transaction is sent, mined by an explicit call and its receipt fetched; without one before the deadline it is a
`ChainError`, never a silent loss.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from shoal.envs.evm.abi import encode
from shoal.envs.evm.chain import (
    BLOCK_SECONDS,
    CHAIN_ID,
    GAS_LIMIT,
    GENESIS_BLOCK,
    GENESIS_TIME,
    ChainBackend,
    ChainError,
    Log,
    Receipt,
    Reverted,
    Transaction,
)
from shoal.envs.evm.genesis import Account, load_genesis
from shoal.envs.evm.pyrevm_chain import PyrevmChain
from shoal.envs.evm.reasons import read_reason, revert_data

START_S = 20.0
"""Anvil answers within this long, or is taken to have failed."""
ANSWER_S = 20.0
BUILD_BLOCKS = 1_000
"""An empty chain starts this many blocks before the genesis: what is built on it lies in the genesis' past."""
TOKENS = ("Token", "WrappedNative", "Pair")
"""Contracts whose balances are set on a fork."""
NPM_PLACES = (
    "node_modules/@foundry-rs/anvil-linux-amd64/bin/anvil",
    "node_modules/@foundry-rs/anvil-linux-arm64/bin/anvil",
)


def find_anvil() -> Path | None:
    """Anvil's program: `SHOAL_ANVIL`, then PATH, then `node_modules` here."""
    named = os.environ.get("SHOAL_ANVIL")
    places = [named] if named else [shutil.which("anvil"), *NPM_PLACES]
    return next((Path(p) for p in places if p and Path(p).is_file()), None)


@dataclass(frozen=True)
class Fork:
    """A live chain at a pinned block."""

    url: str
    """Of its JSON-RPC."""
    block: int


class AnvilChain(ChainBackend):
    """The truth: a real node.

    Args:
        genesis: False starts an empty chain, which the build script fills.
        fork: start from this chain's state; see `_stage_fork` for what is laid over it.
    """

    def __init__(self, *, genesis: bool = True, fork: Fork | None = None) -> None:
        program = find_anvil()
        if program is None:
            raise ChainError(
                "Anvil was not found.",
                "Install it (npm install @foundry-rs/anvil) and name the program in SHOAL_ANVIL.",
            )
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-anvil-")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(program), "--port", str(port), "--no-mining", "--auto-impersonate", "--silent", "--threads", "1"]
        command += ["--chain-id", str(CHAIN_ID), "--gas-price", "0", "--base-fee", "0"]
        command += ["--accounts", "1", "--balance", "0", "--no-cors"]
        if fork is not None:
            command += ["--fork-url", fork.url, "--fork-block-number", str(fork.block), "--no-storage-caching"]
        else:
            earlier = 0 if genesis else BUILD_BLOCKS
            command += ["--hardfork", "shanghai", "--number", str(GENESIS_BLOCK - earlier)]
            command += ["--timestamp", str(GENESIS_TIME - earlier * BLOCK_SECONDS)]
        self._process = subprocess.Popen(
            command,
            cwd=self._folder.name,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.url = f"http://127.0.0.1:{port}"
        """Its JSON-RPC, which can do anything: never for scripts."""
        self._client = httpx.Client(base_url=self.url, timeout=ANSWER_S, trust_env=False)
        self._ids = itertools.count(1)
        self._receipts: list[Receipt] = []
        try:
            self._wait_until_up(fork)
            if fork is not None:
                self._stage_fork()
            elif genesis:
                self._load_genesis()
        except BaseException:
            self.close()
            raise

    def _wait_until_up(self, fork: Fork | None) -> None:
        end = time.monotonic() + START_S
        while True:
            try:
                self.rpc("eth_chainId")
                return
            except ChainError:
                if self._process.poll() is None and time.monotonic() < end:
                    time.sleep(0.02)
                    continue
            if fork is None:
                raise ChainError("Anvil did not start.", "Run its program by hand to see why.")
            raise ChainError(
                f"Anvil could not fork {fork.url} at block {fork.block}.",
                "Check that the URL answers and that its node keeps the state of that block (an archive node does).",
            )

    def _load_genesis(self) -> None:
        for address, account in load_genesis().accounts.items():
            self._set_account(address, account)

    def _set_account(self, address: str, account: Account) -> None:
        if account.code:
            self.rpc("anvil_setCode", address, "0x" + account.code.hex())
        self.rpc("anvil_setBalance", address, hex(account.balance))
        if account.nonce:
            self.rpc("anvil_setNonce", address, hex(account.nonce))
        for slot, value in account.storage.items():
            self.rpc("anvil_setStorageAt", address, f"0x{slot:064x}", f"0x{value:064x}")

    def _stage_fork(self) -> None:
        """Lay over the fork what quests need: our accounts, those of our contracts that it lacks, and their tokens.

        A contract that the fork has stays the fork's. Accounts that hold its tokens at our genesis get as much here.
        """
        if self.block_number() < GENESIS_BLOCK or self.timestamp() < GENESIS_TIME:
            raise ChainError(
                f"Block {self.block_number()} of the fork is older than what quests begin with.",
                f"Pin block {GENESIS_BLOCK} or a later one.",
            )
        genesis = load_genesis()
        upstream = {address for address, account in genesis.accounts.items() if account.code and self.code(address)}
        ours = {address: account for address, account in genesis.accounts.items() if address not in upstream}
        for address, account in ours.items():
            if not account.code:
                # The accounts of well-known keys may carry delegated code on a live chain.
                self.rpc("anvil_setCode", address, "0x")
            self._set_account(address, account)
        reference = PyrevmChain()
        for token in sorted(upstream):
            if genesis.kinds.get(token) not in TOKENS:
                continue
            for holder in ours:
                read = encode("balanceOf(address)", [holder])
                held = reference.call(token, read, holder)
                if any(held) and self.call(token, read, holder) != held:
                    self.rpc("anvil_dealERC20", holder, token, "0x" + held.hex())
                    if self.call(token, read, holder) != held:
                        raise ChainError(
                            f"The fork's token {token} does not let its balances be set.", "Use the offline chain."
                        )

    def rpc(self, method: str, *params: Any) -> Any:
        """One JSON-RPC call; an error in its answer is `Reverted`."""
        body = {"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": params}
        try:
            answer = self._client.post("/", content=json.dumps(body), headers={"content-type": "application/json"})
        except httpx.TimeoutException:
            raise ChainError(
                f"Anvil did not answer {method} within {ANSWER_S:.0f} s.", "Is the machine busy?"
            ) from None
        except httpx.TransportError as error:
            raise ChainError(f"Anvil cannot be reached: {error}.", "It has ended, or was ended.") from None
        content = answer.json()
        if "error" in content:
            said = f"{content['error'].get('data', '')} {content['error'].get('message', '')}"
            raise Reverted(read_reason(said), revert_data(said))
        return content["result"]

    def send(self, transaction: Transaction) -> Receipt:
        receipt = self._execute(transaction)
        self._receipts.append(receipt)
        return receipt

    def _execute(self, t: Transaction) -> Receipt:
        request = {"from": t.sender, "to": t.to, "data": "0x" + t.data.hex(), "value": hex(t.value)}
        request |= {"gas": hex(GAS_LIMIT), "gasPrice": "0x0"}
        time_before = self.timestamp()
        if self.balance(t.sender) < t.value:
            # A node refuses what cannot be paid; as a mined failure it takes a block, like on the other backend.
            self.mine(1)
            self.rpc("anvil_setNonce", t.sender, hex(self.nonce(t.sender) + 1))
            return Receipt(t, False, self.block_number(), reason="not enough BNB")
        hash_ = self.rpc("eth_sendTransaction", request)
        self.rpc("evm_setNextBlockTimestamp", time_before + BLOCK_SECONDS)
        self.rpc("evm_mine")
        receipt = self.rpc("eth_getTransactionReceipt", hash_)
        end = time.monotonic() + ANSWER_S
        while receipt is None:
            if time.monotonic() > end:
                raise ChainError("Anvil lost a transaction.", "Run again; report it if it happens often.")
            time.sleep(0.01)
            receipt = self.rpc("eth_getTransactionReceipt", hash_)
        block = int(receipt["blockNumber"], 16)
        if int(receipt["status"], 16) == 1:
            return Receipt(t, True, block, tuple(_log(entry) for entry in receipt["logs"]))
        return Receipt(t, False, block, reason=self._reason(request, block))

    def _reason(self, request: dict[str, str], block: int) -> str:
        try:
            self.rpc("eth_call", request, hex(block - 1))
        except Reverted as reverted:
            return str(reverted)
        return "reverted"

    def call(self, to: str, data: bytes, sender: str, value: int = 0) -> bytes:
        request = {"from": sender, "to": to, "data": "0x" + data.hex(), "value": hex(value)}
        return bytes.fromhex(self.rpc("eth_call", request, "latest")[2:])

    def balance(self, address: str) -> int:
        return int(self.rpc("eth_getBalance", address, "latest"), 16)

    def nonce(self, address: str) -> int:
        return int(self.rpc("eth_getTransactionCount", address, "latest"), 16)

    def code(self, address: str) -> bytes:
        return bytes.fromhex(self.rpc("eth_getCode", address, "latest")[2:])

    def storage(self, address: str, slot: int) -> int:
        return int(self.rpc("eth_getStorageAt", address, hex(slot), "latest"), 16)

    def receipts(self) -> Sequence[Receipt]:
        return self._receipts

    def block_number(self) -> int:
        return int(self.rpc("eth_blockNumber"), 16)

    def timestamp(self) -> int:
        return int(self.rpc("eth_getBlockByNumber", "latest", False)["timestamp"], 16)

    def mine(self, blocks: int) -> None:
        if blocks:
            self.rpc("evm_setNextBlockTimestamp", self.timestamp() + BLOCK_SECONDS)
            self.rpc("anvil_mine", hex(blocks), hex(BLOCK_SECONDS))

    def snapshot(self) -> Hashable:
        return str(self.rpc("evm_snapshot")), len(self._receipts)

    def revert(self, snapshot: Hashable) -> None:
        assert isinstance(snapshot, tuple)
        name, num_receipts = snapshot
        if self.rpc("evm_revert", name) is not True:
            raise ChainError(f"Anvil has no snapshot {name}.", "A snapshot is used up by its revert.")
        del self._receipts[num_receipts:]

    def close(self) -> None:
        self._client.close()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()


def _log(entry: dict[str, Any]) -> Log:
    topics = tuple(bytes.fromhex(topic[2:]) for topic in entry["topics"])
    return Log(entry["address"].lower(), topics, bytes.fromhex(entry["data"][2:]))
