"""Compile our contracts and build the genesis: `python -m shoal.envs.evm.contracts.build --solc NODE_MODULES`.

Needs node with the npm package `solc`, and Anvil (`SHOAL_ANVIL`). Writes `artifacts.json` and `genesis.json` beside
itself and prints the genesis' hash, which belongs into `genesis.py`. The genesis is what Anvil holds after the
contracts were deployed and used through their own functions, so no storage layout is written down anywhere.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
from hashlib import blake2b
from pathlib import Path
from typing import Any

from shoal.envs.evm.abi import decode, encode
from shoal.envs.evm.anvil import AnvilChain
from shoal.envs.evm.chain import GENESIS_BLOCK, GENESIS_TIME, Transaction
from shoal.envs.evm.genesis import AGENT, WHALE

HERE = Path(__file__).parent
ETHER = 10**18
DEPLOYER = "0x00000000000000000000000000000000000d3913"
COMPILE_S = 300

CANONICAL = {
    "WBNB": ("0xbb4cdb9cbd36b01bd1cbaebf2de08d9173bc095c", "WrappedNative"),
    "USDT": ("0x55d398326f99059ff775485246999027b3197955", "Token"),
    "BUSD": ("0xe9e7cea3dedca5984780bafc599bd69add087d56", "Token"),
    "CAKE": ("0x0e09fabb73bd3ade0a17ecc321fd13a19e81ce82", "Token"),
    "router": ("0x10ed43c718714eb63d5aa57b78b54704e256024e", "Router"),
    "factory": ("0xca143ce32fe78f1f7019d7d551a6402fc5350c73", "Factory"),
    "USDT_BUSD": ("0x7efaef62fddcca950418312c6c91aef321375a00", "Pair"),
    "USDT_WBNB": ("0x16b9a82891338f9ba80e2d6970fdda79d1eb0dae", "Pair"),
    "CAKE_WBNB": ("0x0ed7e52944161450477ee417de9cd3a859b14fd0", "Pair"),
    "CAKE_USDT": ("0xa39af17ce4a8eb807e076805da1e2b8ea7d0755b", "Pair"),
    "CAKE_BUSD": ("0x804678fa97d91b974ec2af3c843270886528a9e6", "Pair"),
    "Squad": ("0x0a8901b0e25deb55a87524f0cc164e9644020eba", "Collection"),
}
"""Contracts that live at the addresses they have on BSC; `Squad` is PancakeSquad."""

FEE = 25
"""PancakeSwap V2's, in hundredths of a percent."""

NAMES = {
    "USDT": ("Tether USD", "USDT"),
    "BUSD": ("BUSD Token", "BUSD"),
    "CAKE": ("PancakeSwap Token", "Cake"),
    "T1363": ("Test Callback Token", "T1363"),
}
POOLS = {
    "USDT_BUSD": ("USDT", 4_000_000, "BUSD", 4_000_000),
    "USDT_WBNB": ("USDT", 6_000_000, "WBNB", 10_000),
    "CAKE_WBNB": ("CAKE", 600_000, "WBNB", 2_500),
    "CAKE_USDT": ("CAKE", 400_000, "USDT", 1_000_000),
    "CAKE_BUSD": ("CAKE", 200_000, "BUSD", 500_000),
}
"""What each pair holds: one BNB is 600 USDT, one CAKE 2.5."""

SOLC = """
const solc = require(process.argv[1] + "/solc");
let text = ""; process.stdin.on("data", d => text += d);
process.stdin.on("end", () => process.stdout.write(solc.compile(text)));
"""


def compile_sources(node_modules: Path) -> dict[str, Any]:
    """ABI and creation code of every contract in the sources here."""
    request = {
        "language": "Solidity",
        "sources": {path.name: {"content": path.read_text()} for path in sorted(HERE.glob("*.sol"))},
        "settings": {
            "optimizer": {"enabled": True, "runs": 200},
            "evmVersion": "shanghai",
            "metadata": {"bytecodeHash": "none", "appendCBOR": False},
            "outputSelection": {"*": {"*": ["abi", "evm.bytecode.object", "evm.deployedBytecode.object"]}},
        },
    }
    done = subprocess.run(
        ["node", "-e", SOLC, str(node_modules.resolve())],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
        timeout=COMPILE_S,
    )
    output = json.loads(done.stdout[done.stdout.index("{") :])
    errors = [e["formattedMessage"] for e in output.get("errors", ()) if e["severity"] == "error"]
    if errors:
        raise SystemExit("\n".join(errors))
    return {
        name: {"abi": c["abi"], "bytecode": c["evm"]["bytecode"]["object"]}
        for contracts in output["contracts"].values()
        for name, c in sorted(contracts.items())
        if c["evm"]["bytecode"]["object"]
    }


class Stage:
    """A chain being furnished."""

    def __init__(self, artifacts: dict[str, Any]) -> None:
        self.chain = AnvilChain(genesis=False)
        self.artifacts = artifacts
        self.contracts: dict[str, dict[str, str]] = {}
        for account in (DEPLOYER, WHALE):
            self.chain.rpc("anvil_setBalance", account, hex(10_000_000 * ETHER))

    def __getitem__(self, name: str) -> str:
        return self.contracts[name]["address"]

    def send(self, sender: str, to: str, signature: str, *args: Any, value: int = 0) -> None:
        receipt = self.chain.send(Transaction(sender, to, encode(signature, args), value))
        if not receipt.success:
            raise SystemExit(f"{signature} at {to}: {receipt.reason}")

    def deploy(self, contract: str, signature: str = "constructor()", *args: Any) -> str:
        code = self.artifacts[contract]["bytecode"] + encode(signature, args)[4:].hex()
        request = {"from": DEPLOYER, "data": "0x" + code, "gas": hex(10_000_000), "gasPrice": "0x0"}
        hash_ = self.chain.rpc("eth_sendTransaction", request)
        self.chain.mine(1)
        receipt = self.chain.rpc("eth_getTransactionReceipt", hash_)
        if int(receipt["status"], 16) != 1:
            raise SystemExit(f"{contract} cannot be deployed")
        return str(receipt["contractAddress"]).lower()

    def place(self, name: str, contract: str, address: str) -> None:
        """Put a contract's code at a given address."""
        code = self.chain.rpc("eth_getCode", self.deploy(contract), "latest")
        self.chain.rpc("anvil_setCode", address, code)
        self.contracts[name] = {"address": address, "contract": contract}

    def add(self, name: str, contract: str, signature: str = "constructor()", *args: Any) -> None:
        self.contracts[name] = {"address": self.deploy(contract, signature, *args), "contract": contract}


def furnish(stage: Stage) -> None:
    """Deploy everything and give the agent what it starts with."""
    for name, (address, contract) in CANONICAL.items():
        stage.place(name, contract, address)
    stage.add("T1363", "CallbackToken")
    for name, (title, symbol) in NAMES.items():
        stage.send(
            DEPLOYER, stage[name], "initialize(string,string,address,uint256)", title, symbol, WHALE, 10**9 * ETHER
        )
    stage.send(WHALE, stage["WBNB"], "deposit()", value=100_000 * ETHER)
    stage.send(DEPLOYER, stage["router"], "initialize(address,address,uint256)", stage["factory"], stage["WBNB"], FEE)
    for token in ("USDT", "BUSD", "CAKE", "WBNB"):
        stage.send(WHALE, stage[token], "approve(address,uint256)", stage["router"], 2**256 - 1)
    for pair, (a, amount_a, b, amount_b) in POOLS.items():
        token0, token1 = sorted((stage[a], stage[b]))
        stage.send(
            DEPLOYER,
            stage[pair],
            "initializePair(address,address,address,uint256)",
            stage["factory"],
            token0,
            token1,
            FEE,
        )
        stage.send(DEPLOYER, stage["factory"], "register(address)", stage[pair])
        amounts = [amount_a * ETHER, amount_b * ETHER]
        stage.send(
            WHALE,
            stage["router"],
            "addLiquidity(address,address,uint256,uint256,uint256,uint256,address,uint256)",
            stage[a],
            stage[b],
            *amounts,
            *amounts,
            WHALE,
            GENESIS_TIME + 10**8,
        )
    stage.send(DEPLOYER, stage["Squad"], "initialize(string,string,address,uint256)", "Pancake Squad", "PS", AGENT, 10)
    stage.add("nft", "Collection")
    stage.send(DEPLOYER, stage["nft"], "initialize(string,string,address,uint256)", "Test Collection", "NFT", AGENT, 10)
    stage.add("multi", "MultiToken", "constructor(address,uint256,uint256)", AGENT, 3, 100)
    stage.add("staking", "Staking", "constructor(address)", stage["CAKE"])
    stage.add("lp_staking", "Staking", "constructor(address)", stage["USDT_BUSD"])
    for name, token in (("reward_pool", "USDT_BUSD"), ("bnb_reward_pool", "USDT_WBNB")):
        signature = "constructor(address,address,uint256,address)"
        stage.add(name, "RewardPool", signature, stage[token], stage["CAKE"], ETHER // 20, WHALE)
        stage.send(WHALE, stage["CAKE"], "transfer(address,uint256)", stage[name], 1_000_000 * ETHER)
        stage.send(WHALE, stage["CAKE"], "approve(address,uint256)", stage[name], 2**256 - 1)
    stage.add("flash_loan", "FlashLoan")
    stage.send(WHALE, stage["USDT"], "transfer(address,uint256)", stage["flash_loan"], 1_000_000 * ETHER)
    for name, contract in (
        ("counter", "Counter"),
        ("board", "MessageBoard"),
        ("donations", "DonationBox"),
        ("receiver", "FallbackReceiver"),
        ("implementation", "Implementation"),
    ):
        stage.add(name, contract)
    stage.add("proxy", "Proxy", "constructor(address)", stage["implementation"])
    holdings = {"USDT": 1000, "BUSD": 1000, "WBNB": 100, "CAKE": 200, "T1363": 10_000, "USDT_BUSD": 12, "USDT_WBNB": 3}
    for name, amount in holdings.items():
        stage.send(WHALE, stage[name], "transfer(address,uint256)", AGENT, amount * ETHER)
    pool, lp = stage["reward_pool"], stage["USDT_BUSD"]
    for who in (AGENT, WHALE):
        stage.send(who, lp, "approve(address,uint256)", pool, 2 * ETHER)
        stage.send(who, pool, "deposit(uint256)", 2 * ETHER)


def dump(stage: Stage) -> bytes:
    """The chain's accounts as JSON, in a fixed order."""
    raw = bytes.fromhex(stage.chain.rpc("anvil_dumpState")[2:])
    state = json.loads(gzip.decompress(raw))
    chain = stage.chain
    head = decode(["uint256"], chain.call(stage["reward_pool"], encode("lastRewardBlock()", ()), WHALE))[0]
    accounts = {}
    used = {AGENT, WHALE, *(entry["address"] for entry in stage.contracts.values())}
    for address, account in sorted(state["accounts"].items()):
        if address.lower() not in used:
            continue
        is_contract = len(account["code"]) > 2
        accounts[address.lower()] = {
            "balance": str(100 * ETHER if address.lower() == AGENT else int(account["balance"], 16)),
            "nonce": 1 if is_contract else 0,
            "code": account["code"][2:],
            "storage": {
                f"{int(slot, 16):#x}": f"{int(value, 16):#x}"
                for slot, value in sorted(account["storage"].items())
                if int(value, 16)
            },
        }
    assert head <= chain.block_number() <= GENESIS_BLOCK
    return json.dumps({"contracts": stage.contracts, "accounts": accounts}, indent=0, sort_keys=True).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--solc", type=Path, required=True, help="a node_modules folder that holds solc")
    artifacts = compile_sources(parser.parse_args().solc)
    (HERE / "artifacts.json").write_text(json.dumps(artifacts, sort_keys=True, separators=(",", ":")) + "\n")
    stage = Stage(artifacts)
    try:
        furnish(stage)
        state = dump(stage)
    finally:
        stage.chain.close()
    (HERE / "genesis.json").write_bytes(state)
    print(blake2b(state, digest_size=32).hexdigest())


if __name__ == "__main__":
    main()
