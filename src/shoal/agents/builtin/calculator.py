"""Exact arithmetic on fractions, from an expression as people write it.

Invariant: whatever the expression, it takes a bounded time: names are a few functions, nesting, digits and powers have
limits, and nothing is evaluated as Python.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Annotated

from pydantic import Field

from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool, ToolError
from shoal.agents.tools.toolbox import Callee

MAX_CHARS = 2000
MAX_BITS = 4096
"""Of a numerator or denominator."""

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Fraction]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "floor": lambda a: Fraction(math.floor(a)),
    "ceil": lambda a: Fraction(math.ceil(a)),
    "round": lambda a: Fraction(round(a)),
    "sqrt": lambda a: Fraction(math.sqrt(a)),
}


def calculate(
    expression: Annotated[str, Field(description="such as (3 + 4) * 2 ** 5 / 7", max_length=MAX_CHARS)],
) -> str:
    """Compute an expression exactly: + - * / // % **, parentheses, abs, min, max, floor, ceil, round, sqrt."""
    try:
        tree = ast.parse(expression.replace("^", "**").replace("×", "*").replace("÷", "/").strip(), mode="eval")
        value = _value(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError, OverflowError) as error:
        raise ToolError(f"the expression cannot be computed: {str(error) or type(error).__name__}") from None
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    text = f"{float(value):.15g}"
    return text if rest == 1 and Fraction(text) == value else f"{value.numerator}/{value.denominator} (about {text})"


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(Fraction(str(number)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS and arguments:
            return _bounded(_FUNCTIONS[name](*(_value(one) for one in arguments)))
    raise ValueError("only numbers, + - * / // % **, parentheses and " + ", ".join(_FUNCTIONS))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _bounded(Fraction(float(base) ** float(exponent)))
    size = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent.numerator)
    if size > MAX_BITS:
        raise ValueError("the power is too large")
    return Fraction(base**exponent.numerator)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError("the number is too large")
    return value


def tools() -> Sequence[Callee]:
    """The calculator."""
    return [FunctionTool(calculate, Use(idempotent=True, max_concurrency=64, timeout_s=10))]
