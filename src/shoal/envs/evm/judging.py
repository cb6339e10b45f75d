"""Checks: what came of a quest, compared with what its instance says.

Special functions of checks, beside the language's own:
- `was(x)` is `x` as it stood before the first act, `gain(x)` is `x - was(x)`.
- `ok()`: the last transaction succeeded. `sent(FORM)`: how many that fit the form succeeded; an argument of the form
  may be `ANY`, `at_least(x)`, `at_most(x)` or `between(a, b)`. `count()`: how many succeeded at all. `only(name, …)`:
  of what the agent holds, nothing but these changed. `emitted(X.EVENT(…))`: how many events fit.
- `asked(READ)`, `asked_before(READ)`, `asked_after(READ)`: it was queried; before the first transaction, after the
  last.
- `answered(name, x)`: the answer has this value.

Scores. `strict` is ours: points of passed checks, for a composite task times min(1, optimal steps / steps taken).
`paper` repeats the released runner, whose composite base is 100 as soon as any transaction was sent, even a reverted
one (or, where nothing has to be sent, as soon as something was asked), and whose optimum is mostly 3.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from shoal.envs.evm.abi import AbiError, decode, encode, interfaces
from shoal.envs.evm.chain import ChainBackend, Receipt
from shoal.envs.evm.definition import Definition
from shoal.envs.evm.language import Form, LanguageError, Pattern, World, parse, plain
from shoal.envs.evm.record import Asked, Record

NUMBERS = ("BNB", "USDT", "BUSD", "WBNB", "CAKE", "T1363", "USDT_BUSD", "USDT_WBNB")
WATCHED = {name: "bnb(me)" if name == "BNB" else f"{name}.balanceOf(me)" for name in NUMBERS} | {
    "nft": "nft.balanceOf(me)",
    "Squad": "Squad.balanceOf(me)",
    "multi": "multi.balanceOf(me, 1)",
    "staked CAKE": "staking.userInfo(me)[0]",
    "staked LP": "lp_staking.userInfo(me)[0]",
    "reward pool": "reward_pool.userInfo(me)[0]",
    "BNB reward pool": "bnb_reward_pool.userInfo(me)[0]",
}
"""What an agent holds, for `only`."""

CHAIN_READS = {
    "bnb": "eth_getBalance",
    "nonce": "eth_getTransactionCount",
    "block": "eth_blockNumber",
    "gas_price": "eth_gasPrice",
    "priority_fee": "eth_maxPriorityFeePerGas",
}
"""How the language calls what can be asked of the chain itself."""

ANY = Pattern(lambda value: True)


@dataclass(frozen=True)
class Verdict:
    """What a quest earned."""

    passed: dict[str, bool]
    points: int
    """Of passed checks, out of 100."""
    steps: int
    strict: float
    paper: float


@dataclass
class Judge:
    """The checks of one instance, whose parameters and names are `values`."""

    definition: Definition
    chain: ChainBackend
    values: Mapping[str, Any]
    _before: dict[str, Any] = field(default_factory=dict)
    _record: Record = field(default_factory=Record)

    def __post_init__(self) -> None:
        special: dict[str, Callable[[list[ast.expr]], Any]] = {
            "was": self._was,
            "gain": lambda args: World.evaluate(self._world, args[0]) - self._was(args),
            "ok": lambda args: bool(self._record.receipts) and self._record.receipts[-1].success,
            "sent": lambda args: sum(self._fits(self._pattern(args[0]), r) for r in self._record.receipts),
            "emitted": self._emitted,
            "only": self._only,
            "asked": lambda args: bool(self._queries(args)),
            "asked_before": lambda args: any(q.after == 0 for q in self._queries(args)),
            "asked_after": lambda args: any(q.after == len(self._record.receipts) > 0 for q in self._queries(args)),
            "answered": self._answered,
            "count": lambda args: sum(r.success for r in self._record.receipts),
        }
        self._world = World(self.chain, self.values, special=special)

    def note(self) -> None:
        """Read what `was`, `gain` and `only` need, now, before the first act."""
        for _, that in self.definition.checks.values():
            for node in _before_reads(that):
                key = _key(node)
                if key not in self._before:
                    self._before[key] = self._world.evaluate(node)

    def verdict(self, record: Record, steps: int) -> Verdict:
        """Judge what was done, in `steps` rounds; the chain must stand where the acts left it."""
        self._record = record
        definition = self.definition
        passed = {name: self._holds(that) for name, (_, that) in definition.checks.items()}
        points = sum(definition.checks[name][0] for name, holds in passed.items() if holds)
        if not definition.composite:
            return Verdict(passed, points, steps, float(points), float(points))
        did_something = bool(record.receipts) or (definition.is_query and bool(record.asked))
        strict = points * min(1.0, definition.optimal_steps / steps)
        paper = 100.0 * did_something * min(1.0, definition.paper_steps / steps)
        return Verdict(passed, points, steps, strict, paper)

    def _holds(self, that: str) -> bool:
        try:
            return bool(self._world.evaluate(that))
        except AbiError:
            # A read that reverts (the token is gone) is a state that is not as it should be.
            return False

    def _was(self, args: list[ast.expr]) -> Any:
        return self._before[_key(args[0])]

    def _only(self, args: list[ast.expr]) -> bool:
        allowed = {arg.value for arg in args if isinstance(arg, ast.Constant)}
        if not allowed <= WATCHED.keys():
            raise LanguageError(f"only() knows {', '.join(WATCHED)}.")
        return all(
            self._world.evaluate(read) == self._before[_key(parse(read))]
            for name, read in WATCHED.items()
            if name not in allowed
        )

    def _answered(self, args: list[ast.expr]) -> bool:
        name, wanted = (self._world.evaluate(arg) for arg in args)
        given = self._record.answer.get(name)
        if given is None or isinstance(given, bool) is not isinstance(wanted, bool):
            return False
        return bool(given == wanted or str(given).strip().lower() == str(wanted).lower())

    def _argument(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id == "ANY":
            return ANY
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            match node.func.id, [self._world.evaluate(arg) for arg in node.args]:
                case "at_least", [low]:
                    return Pattern(lambda value: bool(value >= low))
                case "at_most", [high]:
                    return Pattern(lambda value: bool(value <= high))
                case "between", [low, high]:
                    return Pattern(lambda value: bool(low <= value <= high))
        return self._world.evaluate(node)

    def _pattern(self, node: ast.expr) -> Form:
        return self._world.form(node, self._argument)

    def _fits(self, form: Form, receipt: Receipt) -> bool:
        t = receipt.transaction
        if not (receipt.success and _accepts(form.to, t.to) and _accepts(form.value, t.value)):
            return False
        if form.function is None:
            return _accepts(form.data, t.data)
        if t.data[:4] != form.function.selector:
            return False
        try:
            given = decode(form.function.inputs, t.data[4:])
        except AbiError:
            return False
        return all(_accepts(wanted, plain(value)) for wanted, value in zip(form.args, given, strict=True))

    def _emitted(self, args: list[ast.expr]) -> int:
        """How many events of the successful transactions fit."""
        node = args[0]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            raise LanguageError(f"{ast.unparse(node)!r} is no event of a contract.")
        address = self._world.evaluate(node.func.value)
        kind = self._world.genesis.kinds.get(address)
        event = interfaces()[kind].events.get(node.func.attr) if kind else None
        if event is None or len(event.inputs) != len(node.args):
            raise LanguageError(f"{ast.unparse(node)!r} is no event of a contract.")
        wanted = [self._argument(arg) for arg in node.args]
        logs = [log for receipt in self._record.receipts if receipt.success for log in receipt.logs]
        return sum(
            all(_accepts(want, value) for want, value in zip(wanted, event.values(log.topics, log.data), strict=True))
            for log in logs
            if log.address == address and log.topics[:1] == (event.topic,)
        )

    def _queries(self, args: list[ast.expr]) -> list[Asked]:
        node = args[0]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            to = CHAIN_READS[node.func.id]
            data = "".join(self._world.evaluate(arg) for arg in node.args).encode()
        else:
            form = self._world.form(node)
            assert form.function is not None
            to, data = form.to, encode(form.function.signature, form.args)
        return [query for query in self._record.asked if (query.to, query.data) == (to, data)]


@lru_cache(maxsize=8192)
def _key(node: ast.expr) -> str:
    """What an expression says: the same for every tree of the same words."""
    return ast.dump(node)


def _accepts(wanted: Any, given: Any) -> bool:
    return wanted.accepts(given) if isinstance(wanted, Pattern) else bool(wanted == given)


@lru_cache(maxsize=8192)
def _before_reads(that: str) -> tuple[ast.expr, ...]:
    """The expressions under `was` and `gain`, and all that `only` watches."""
    found: list[ast.expr] = []
    for node in ast.walk(parse(that)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("was", "gain") and len(node.args) == 1:
                found.append(node.args[0])
            elif node.func.id == "only":
                found += [parse(read) for read in WATCHED.values()]
    return tuple(found)
