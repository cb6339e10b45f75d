"""The small language of quests: how a task's file says amounts, calls, steps and checks, without Python.

The syntax is that of Python expressions. `USDT.balanceOf(me)` reads the chain, `3 * amount // 100` computes, `router`
is an address. A *form* is a call that is not made: in a step it says what to send, in a check what must have been
sent: `USDT.transfer(to, amount)`, `WBNB.deposit(value=amount)`, `pay(to, amount)`.

Invariant: evaluation is closed. Only the nodes handled below exist (no attributes of values, no comprehensions, no
lambdas), only names the task or the chain defines, only reads of the chain; a task's file can do nothing else.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any

from shoal.envs.evm.abi import AbiError, Function, decode, encode, interfaces
from shoal.envs.evm.chain import ChainBackend, Reverted
from shoal.envs.evm.genesis import AGENT, WHALE, Genesis, load_genesis
from shoal.errors import TaskError

ETHER = 10**18
MAX_EXPRESSION_CHARS = 2_000
DEADLINE_S = 1_200
"""How far ahead reference solutions set a deadline."""

CONSTANTS: dict[str, Any] = {"me": AGENT, "whale": WHALE, "ether": ETHER, "MAX": 2**256 - 1}

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: bool(a == b),
    ast.NotEq: lambda a, b: bool(a != b),
    ast.Lt: lambda a, b: bool(a < b),
    ast.LtE: lambda a, b: bool(a <= b),
    ast.Gt: lambda a, b: bool(a > b),
    ast.GtE: lambda a, b: bool(a >= b),
}
_PURE: dict[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "len": len,
    "text": lambda words: str(words).encode(),
}


class LanguageError(TaskError):
    """An expression in a task's file that means nothing."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem, "The language of quests is described in docs/evm.md.")


@lru_cache(maxsize=8192)
def parse(text: str) -> ast.expr:
    """The expression as a tree; raises `LanguageError`."""
    if len(text) > MAX_EXPRESSION_CHARS:
        raise LanguageError(f"an expression of {len(text)} characters is too long.")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError):
        raise LanguageError(f"{text!r} is no expression.") from None


@dataclass(frozen=True, slots=True)
class Form:
    """A call that is not made. Without a function it is a plain payment."""

    to: Any
    """An address; in a check a payment's may be a `Pattern`."""
    function: Function | None
    args: tuple[Any, ...]
    value: Any = 0
    data: Any = b""
    by: str = AGENT


@dataclass(frozen=True, slots=True)
class Pattern:
    """What an argument of a form may be, in a check."""

    accepts: Callable[[Any], bool]


@dataclass
class World:
    """What expressions are about: a chain, and the names of a task's instance."""

    chain: ChainBackend
    parameters: Mapping[str, Any]
    genesis: Genesis = field(default_factory=load_genesis)
    special: Mapping[str, Callable[[list[ast.expr]], Any]] = field(default_factory=dict)
    """Functions that take expressions, not values: those of checks."""

    def evaluate(self, node: ast.expr | str) -> Any:
        """The value of an expression, the chain as it stands."""
        if isinstance(node, str):
            node = parse(node)
        match node:
            case ast.Constant(value=bool() | int() | str() as value):
                return value
            case ast.Constant(value=float()):
                return Decimal(ast.unparse(node))
            case ast.Name(id=name):
                return self._name(name)
            case ast.List(elts=items):
                return [self.evaluate(item) for item in items]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return _apply(node, operator.neg, self.evaluate(operand))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self.evaluate(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _exact(_apply(node, _BINARY[type(op)], self.evaluate(left), self.evaluate(right)))
            case ast.BoolOp(op=ast.And(), values=values):
                return all(self.evaluate(value) for value in values)
            case ast.BoolOp(op=ast.Or(), values=values):
                return any(self.evaluate(value) for value in values)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                return self._compare(left, ops, rights)
            case ast.Subscript(value=value, slice=ast.expr() as index):
                return _apply(node, operator.getitem, self.evaluate(value), self.evaluate(index))
            case ast.Call(func=ast.Name(id=name), args=args):
                return self._function(name, args)
            case ast.Call(func=ast.Attribute()):
                return self._read(self.form(node))
        raise LanguageError(f"{ast.unparse(node)!r} means nothing.")

    def _name(self, name: str) -> Any:
        for known in (self.parameters, self.genesis.names, CONSTANTS):
            if name in known:
                return known[name]
        if name == "now":
            return self.chain.timestamp()
        if name == "deadline":
            return self.chain.timestamp() + DEADLINE_S
        raise LanguageError(f"there is no {name!r}.")

    def _compare(self, left: ast.expr, ops: list[ast.cmpop], rights: list[ast.expr]) -> bool:
        value = self.evaluate(left)
        for op, right in zip(ops, rights, strict=True):
            if type(op) not in _COMPARE:
                raise LanguageError("only ==, !=, <, <=, > and >= compare.")
            other = self.evaluate(right)
            # A value of the wrong kind (an agent's answer may be anything) is unequal to all and above none.
            ordered = isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE)
            if ordered and not (isinstance(value, int | Decimal) and isinstance(other, int | Decimal)):
                return False
            if not _COMPARE[type(op)](value, other):
                return False
            value = other
        return True

    def _function(self, name: str, args: list[ast.expr]) -> Any:
        if name in self.special:
            return _apply(name, self.special[name], args)
        values = [self.evaluate(arg) for arg in args]
        if name in _PURE:
            return _apply(name, _PURE[name], *values)
        match name, values:
            case "bnb", [str(address)]:
                return self.chain.balance(address)
            case "nonce", [str(address)]:
                return self.chain.nonce(address)
            case "block", []:
                return self.chain.block_number()
            case "gas_price", []:
                return self.chain.gas_price()
            case "priority_fee", []:
                return self.chain.priority_fee()
        raise LanguageError(f"there is no function {name}({', '.join(map(ast.unparse, args))}).")

    def _read(self, form: Form) -> Any:
        assert form.function is not None
        data = encode(form.function.signature, form.args)
        try:
            values = decode(form.function.outputs, self.chain.call(form.to, data, form.by))
        except Reverted as error:
            raise AbiError(f"{form.function.signature} reverts: {error}") from None
        return plain(values[0] if len(values) == 1 else values)

    def form(self, node: ast.expr | str, argument: Callable[[ast.expr], Any] | None = None) -> Form:
        """A call as a form, its arguments read by `argument` (by default: evaluated)."""
        if isinstance(node, str):
            node = parse(node)
        read = argument or self.evaluate
        if not isinstance(node, ast.Call):
            raise LanguageError(f"{ast.unparse(node)!r} is no call.")
        named = {word.arg: word.value for word in node.keywords}
        by = self.evaluate(named.pop("by")) if "by" in named else AGENT
        args = [read(arg) for arg in node.args]
        if isinstance(node.func, ast.Name) and node.func.id == "pay" and 2 <= len(args) <= 3 and not named:
            return Form(args[0], None, (), args[1], args[2] if len(args) == 3 else b"", by)
        value = read(named.pop("value")) if "value" in named else 0
        if not isinstance(node.func, ast.Attribute) or named:
            raise LanguageError(f"{ast.unparse(node)!r} is no call of a contract.")
        to = self.evaluate(node.func.value)
        function = self.function(to, node.func.attr, len(args))
        if function is None:
            raise LanguageError(f"{ast.unparse(node.func)} with {len(args)} arguments does not exist.")
        return Form(to, function, tuple(args), value, b"", by)

    def function(self, address: str, name: str, num_args: int) -> Function | None:
        """A function of the contract at `address`, if it is one of ours."""
        kind = self.genesis.kinds.get(address)
        return interfaces()[kind].functions.get((name, num_args)) if kind else None


def _apply(said: ast.expr | str, function: Callable[..., Any], *values: Any) -> Any:
    try:
        return function(*values)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        text = said if isinstance(said, str) else ast.unparse(said)
        raise LanguageError(f"{text!r} cannot be worked out: {error}.") from None


def _exact(value: Any) -> Any:
    return int(value) if isinstance(value, Decimal) and value == value.to_integral_value() else value


def plain(value: Any) -> Any:
    """A decoded value as the language compares it: tuples as lists."""
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value
