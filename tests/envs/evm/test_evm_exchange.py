"""Our factory, pair and router beside Uniswap V2's own, with Uniswap's fee: the same numbers after any trades.

Uniswap's compiled contracts are GPL and are not part of this project: they come from npm at test time into a cache,
or from the node_modules folder that SHOAL_NODE_MODULES names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pyrevm
import pytest

from shoal.envs.evm.abi import decode, encode
from shoal.envs.evm.genesis import contract_file

PACKAGES = ("@uniswap/v2-core@1.0.1", "@uniswap/v2-periphery@1.1.0-beta.0")
FILES = {
    "Factory": "@uniswap/v2-core/build/UniswapV2Factory.json",
    "Router": "@uniswap/v2-periphery/build/UniswapV2Router02.json",
}
ACCOUNT = "0x" + "aa" * 20
FEE = 30
ETHER = 10**18
DEADLINE = 2**40
TRADES = 300


@pytest.fixture(scope="module")
def uniswap() -> dict[str, str]:
    """Creation code of Uniswap's contracts."""
    named = os.environ.get("SHOAL_NODE_MODULES")
    home = Path(os.environ.get("SHOAL_HOME", Path.home() / ".cache"))
    folder = Path(named) if named else home / "test-uniswap" / "node_modules"
    if not (folder / FILES["Router"]).is_file():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("needs npm, or SHOAL_NODE_MODULES with Uniswap V2's packages")
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder.parent), *PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        if done.returncode:
            pytest.skip(f"Uniswap's packages cannot be fetched: {done.stderr[-200:]}")
    return {
        name: json.loads((folder / path).read_text())["bytecode"].removeprefix("0x") for name, path in FILES.items()
    }


class Exchange:
    """Two tokens, wrapped BNB, a pair of each with the first token, and a router: Uniswap's or ours."""

    def __init__(self, uniswap: dict[str, str] | None) -> None:
        self.evm = pyrevm.EVM(gas_limit=2**32, spec_id="SHANGHAI")
        self.evm.set_balance(ACCOUNT, 10**9 * ETHER)
        self.evm.set_block_env(pyrevm.BlockEnv(number=1, timestamp=10**6, gas_limit=2**40))
        self.artifacts = json.loads(contract_file("artifacts.json"))
        self.a, self.b = self._ours("Token"), self._ours("Token")
        for token in (self.a, self.b):
            self.do(token, "initialize(string,string,address,uint256)", "T", "T", ACCOUNT, 10**12 * ETHER)
        self.weth = self._ours("WrappedNative")
        if uniswap:
            self.factory = self._deploy(uniswap["Factory"] + encode("f(address)", [ACCOUNT])[4:].hex())
            arguments = encode("f(address,address)", [self.factory, self.weth])[4:].hex()
            self.router = self._deploy(uniswap["Router"] + arguments)
            self.pairs = [self._create(self.a, other) for other in (self.b, self.weth)]
        else:
            self.factory, self.router = self._ours("Factory"), self._ours("Router")
            self.do(self.router, "initialize(address,address,uint256)", self.factory, self.weth, FEE)
            self.pairs = [self._register(self.a, other) for other in (self.b, self.weth)]
        for token in (self.a, self.b, self.weth, *self.pairs):
            self.do(token, "approve(address,uint256)", self.router, 2**256 - 1)

    def _deploy(self, code: str) -> str:
        return self.evm.deploy(deployer=ACCOUNT, code=bytes.fromhex(code))

    def _ours(self, name: str) -> str:
        return self._deploy(self.artifacts[name]["bytecode"])

    def _create(self, a: str, b: str) -> str:
        return str(decode(["address"], self.do(self.factory, "createPair(address,address)", a, b))[0])

    def _register(self, a: str, b: str) -> str:
        pair = self._ours("Pair")
        first, second = sorted((a.lower(), b.lower()))
        self.do(pair, "initializePair(address,address,address,uint256)", self.factory, first, second, FEE)
        self.do(self.factory, "register(address)", pair)
        return pair

    def do(self, to: str, signature: str, *args: Any, value: int = 0) -> bytes:
        return self.evm.message_call(caller=ACCOUNT, to=to, calldata=encode(signature, args), value=value)

    def attempt(self, to: str, signature: str, *args: Any, value: int = 0) -> bytes | None:
        """What came back, or None where it reverted."""
        try:
            return self.do(to, signature, *args, value=value)
        except RuntimeError:
            return None

    def at(self, names: list[str]) -> list[str]:
        return [{"a": self.a, "b": self.b, "weth": self.weth}[name] for name in names]

    def state(self) -> list[Any]:
        found: list[Any] = [self.evm.get_balance(ACCOUNT)]
        for token in (self.a, self.b, self.weth):
            found.append(self.do(token, "balanceOf(address)", ACCOUNT))
        for pair in self.pairs:
            first = decode(["address"], self.do(pair, "token0()"))[0]
            reserves = decode(["uint112", "uint112", "uint32"], self.do(pair, "getReserves()"))
            prices = [self.do(pair, f"price{side}CumulativeLast()") for side in (0, 1)]
            # The order of the tokens in a pair is that of their addresses, which differ between the two.
            flip = first.lower() != self.a.lower()
            found += [reserves[1::-1] if flip else reserves[:2], reserves[2], prices[::-1] if flip else prices]
            found += [self.do(pair, "totalSupply()"), self.do(pair, "balanceOf(address)", ACCOUNT)]
        return found


def act(exchange: Exchange, rng: Random) -> bytes | None:
    """One random use of the router."""
    amount = int(10 ** rng.uniform(0, 26))
    slack = rng.choice([0, 0, 0, 10**30])
    path = exchange.at(rng.choice([["a", "b"], ["b", "a"], ["a", "weth"], ["weth", "a"], ["b", "a", "weth"]]))
    last, first = path[-1] == exchange.weth, path[0] == exchange.weth
    route, end = path, (ACCOUNT, rng.choice([DEADLINE, DEADLINE, DEADLINE, 5]))
    r, a, b = exchange.router, exchange.a, exchange.b
    kinds = "(uint256,uint256,address[],address,uint256)"
    match rng.randrange(9):
        case 0:
            signature = "addLiquidity(address,address,uint256,uint256,uint256,uint256,address,uint256)"
            return exchange.attempt(r, signature, a, b, amount, int(amount * rng.uniform(0.1, 9)), 0, slack, *end)
        case 1:
            signature = "addLiquidityETH(address,uint256,uint256,uint256,address,uint256)"
            return exchange.attempt(r, signature, a, amount, slack, 0, *end, value=min(amount, ETHER * 10**6))
        case 2:
            signature = "removeLiquidity(address,address,uint256,uint256,uint256,address,uint256)"
            return exchange.attempt(r, signature, a, b, amount, 0, slack, *end)
        case 3:
            signature = "removeLiquidityETH(address,uint256,uint256,uint256,address,uint256)"
            return exchange.attempt(r, signature, a, amount, slack, 0, *end)
        case 4:
            name = "swapExactTokensForETH" if last else "swapExactTokensForTokens"
            return exchange.attempt(r, name + kinds, amount, slack, route, *end)
        case 5:
            name = "swapTokensForExactETH" if last else "swapTokensForExactTokens"
            return exchange.attempt(r, name + kinds, amount, 2**200 - slack, route, *end)
        case 6 if first:
            value = min(amount, 10**6 * ETHER)
            return exchange.attempt(
                r, "swapExactETHForTokens(uint256,address[],address,uint256)", slack, route, *end, value=value
            )
        case 7 if first:
            signature = "swapETHForExactTokens(uint256,address[],address,uint256)"
            return exchange.attempt(r, signature, amount, route, *end, value=10**6 * ETHER)
        case _:
            out = exchange.attempt(r, "getAmountsOut(uint256,address[])", amount, route)
            into = exchange.attempt(r, "getAmountsIn(uint256,address[])", amount, route)
            return (out or b"-") + (into or b"-")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_same_trades_give_the_same_numbers(uniswap: dict[str, str], seed: int) -> None:
    theirs, ours = Exchange(uniswap), Exchange(None)
    signature = "addLiquidity(address,address,uint256,uint256,uint256,uint256,address,uint256)"
    for exchange in (theirs, ours):
        exchange.do(exchange.weth, "deposit()", value=10**6 * ETHER)
        for other, amount in ((exchange.b, 10**24), (exchange.weth, 10**23)):
            exchange.do(exchange.router, signature, exchange.a, other, 10**24, amount, 0, 0, ACCOUNT, DEADLINE)
    done = 0
    for number in range(TRADES):
        results = [act(exchange, Random(f"{seed}/{number}")) for exchange in (theirs, ours)]
        assert results[0] == results[1], number
        assert theirs.state() == ours.state(), number
        done += results[0] is not None
        for exchange in (theirs, ours):
            exchange.evm.set_block_env(pyrevm.BlockEnv(number=2, timestamp=10**6 + 13 * number, gas_limit=2**40))
    assert done > TRADES // 3
