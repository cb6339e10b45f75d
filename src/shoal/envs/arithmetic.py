"""Questions such as "What is 17 + 25?", with a held-out set that shares no pair of operands with training.

A task's id is the expression itself, so a task needs no seed and no data. Whether an expression is held out is decided
by a stable hash of its operations and of its operands *in any order*, and by nothing else.

Invariants: `2 + 3` and `3 + 2` are on the same side, whatever the ranges, seeds and levels; the held-out list holds one
question for each unordered pair, unless both orders are asked for; every answer is an integer, and not below zero but
in chains.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from shoal.envs.base import EnvironmentSettings, Split, check_cursor, stable_fraction, stable_int
from shoal.envs.extract import final_number, last_number
from shoal.envs.question import QuestionEnvironment, QuestionSettings
from shoal.errors import TaskError
from shoal.protocol.episode import Task

MAX_OPERAND = 999_999

MAX_DRAWS = 10_000
"""Draws after which a split is taken to be empty; with one pair in a thousand on it, that errs once in e^10 times."""

Range = tuple[int, int]
"""Lowest and highest operand, both included."""

LEVELS: dict[str, dict[str, Range]] = {
    "basic": {"add": (0, 30), "multiply": (0, 12)},
    "two_digit": {"add": (10, 99), "subtract": (10, 99), "multiply": (2, 20), "divide": (2, 12)},
    "three_digit": {"add": (100, 999), "subtract": (100, 999), "multiply": (10, 99), "divide": (2, 99)},
    "chain": {"chain": (0, 50)},
}

SYMBOLS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/", "chain": "+-"}

_EXPRESSION = re.compile(r"[0-9]{1,13}(?: [-+*/] [0-9]{1,6}){1,15}")


class ArithmeticSettings(QuestionSettings):
    """Which questions are asked. A level sets the ranges; naming any range replaces the level."""

    level: Literal["basic", "two_digit", "three_digit", "chain"] = "basic"
    """`basic`: add 0-30 and multiply 0-12; the others add subtraction, division, more digits, or chains of + and -."""
    add: Range | None = None
    """Lowest and highest operand of additions; likewise below."""
    subtract: Range | None = None
    """The larger operand comes first."""
    multiply: Range | None = None
    divide: Range | None = None
    """Range of divisor and quotient; divisions leave no remainder."""
    chain: Range | None = None
    """Operands of chains of additions and subtractions, which may end below zero."""
    chain_terms: int = Field(default=3, ge=3, le=16)
    """Operands in a chain."""
    balance: Literal["pairs", "operations"] = "pairs"
    """`pairs`: every question is equally likely; `operations`: every operation is."""
    heldout_fraction: float = Field(default=0.4, gt=0, lt=1)
    """Share of the operand pairs that is never trained on."""
    heldout_orders: Literal["one", "both"] = "one"
    """`both`: a held-out pair is asked as 2 + 3 and as 3 + 2, which makes the measurement steadier."""
    wording: str = "What is {expression}?"
    """The question; `{expression}` stands for the expression."""
    times: str = "*"
    """How multiplication is written."""

    @field_validator("add", "subtract", "multiply", "divide", "chain")
    @classmethod
    def _ordered(cls, value: Range | None) -> Range | None:
        if value is not None and not 0 <= value[0] <= value[1] <= MAX_OPERAND:
            raise ValueError(f"a range is [lowest, highest] with 0 <= lowest <= highest <= {MAX_OPERAND}")
        return value

    @field_validator("wording")
    @classmethod
    def _has_place(cls, value: str) -> str:
        if "{expression}" not in value:
            raise ValueError("it must contain {expression}")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> ArithmeticSettings:
        if "level" in self.model_fields_set and any(getattr(self, name) is not None for name in SYMBOLS):
            raise ValueError("give a level or ranges of your own, not both")
        if self.divide is not None and self.divide[0] == 0:
            raise ValueError("the range of divide starts at 1 or above, because 0 divides nothing")
        return self

    def operations(self) -> tuple[Operation, ...]:
        """What is asked, in a fixed order."""
        own = {name: getattr(self, name) for name in SYMBOLS if getattr(self, name) is not None}
        return tuple(
            Operation(name, low, high, terms=self.chain_terms if name == "chain" else 2)
            for name, (low, high) in (own or LEVELS[self.level]).items()
        )


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of expression over a range of operands."""

    name: str
    low: int
    high: int
    terms: int

    @property
    def num_questions(self) -> int:
        """Ordered choices of operands (and of signs in a chain)."""
        signs = 2 ** (self.terms - 1) if self.name == "chain" else 1
        return int((self.high - self.low + 1) ** self.terms) * signs

    def draw(self, rng: Random) -> str:
        """One expression, every choice of operands equally likely."""
        operands = [rng.randint(self.low, self.high) for _ in range(self.terms)]
        symbols = [rng.choice(SYMBOLS[self.name]) for _ in range(self.terms - 1)]
        if self.name == "subtract":
            operands.sort(reverse=True)
        elif self.name == "divide":
            operands[0] *= operands[1]
        rest = (f" {symbol} {operand}" for symbol, operand in zip(symbols, operands[1:], strict=True))
        return f"{operands[0]}{''.join(rest)}"


def evaluate(expression: str) -> int:
    """The value of an expression of this environment; raises `TaskError` for any other text."""
    if not _EXPRESSION.fullmatch(expression):
        raise TaskError(f"{expression[:80]!r} is not an arithmetic expression such as '17 + 25'.")
    first, *rest = expression.split(" ")
    value = int(first)
    for symbol, operand in zip(rest[::2], map(int, rest[1::2]), strict=True):
        if symbol in "*/" and len(rest) > 2:
            raise TaskError(f"{expression!r} mixes * or / into a chain, which this environment never asks.")
        if symbol == "/" and (operand == 0 or value % operand):
            raise TaskError(f"{expression!r} is not a division without remainder.")
        value = {"+": value + operand, "-": value - operand, "*": value * operand}.get(symbol, value // (operand or 1))
    return value


def pair_key(expression: str) -> tuple[str, ...]:
    """What decides an expression's side: its operations and its operands, both without their order."""
    first, *rest = expression.split(" ")
    operands = [int(first), *map(int, rest[1::2])]
    if rest[0] == "/":
        operands[0] //= operands[1]
    return ("".join(sorted(rest[::2])), *map(str, sorted(operands)))


def is_heldout(expression: str, fraction: float) -> bool:
    """Whether an expression belongs to the held-out side."""
    return stable_fraction("arithmetic", *pair_key(expression)) < fraction


def canonical(expression: str) -> str:
    """The one order in which a pair is asked when held out: either, as a stable hash decides."""
    key = pair_key(expression)
    if key[0] not in ("+", "*"):
        return expression
    flip = stable_fraction("order", *key) < 0.5
    low, high = key[1:]
    return f"{high} {key[0]} {low}" if flip else f"{low} {key[0]} {high}"


class Arithmetic(QuestionEnvironment):
    """Arithmetic questions, graded by the number in the reply."""

    Settings: ClassVar[type[EnvironmentSettings]] = ArithmeticSettings
    settings: ArithmeticSettings

    def task(self, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        operations = self.settings.operations()
        balanced = self.settings.balance == "operations"
        weights = [1 if balanced else operation.num_questions for operation in operations]
        rng = Random(stable_int("arithmetic", split, seed, index))
        for _ in range(MAX_DRAWS):
            expression = rng.choices(operations, weights)[0].draw(rng)
            if is_heldout(expression, self.settings.heldout_fraction) == (split == "heldout"):
                one_order = split == "heldout" and self.settings.heldout_orders == "one"
                chosen = canonical(expression) if one_order else expression
                return Task(env=self.name, id=chosen, seed=0)
        raise TaskError(
            f"environment {self.name!r} has no {split} question in its ranges.",
            "Widen a range, or change heldout_fraction.",
        )

    def question(self, task: Task) -> str:
        evaluate(task.id)
        return self.settings.wording.replace("{expression}", task.id.replace("*", self.settings.times))

    def answers(self, task: Task) -> tuple[str, ...]:
        return (str(evaluate(task.id)),)

    def grade(self, task: Task, reply: str) -> dict[str, float]:
        answer = evaluate(task.id)
        return {
            "strict": float(final_number(reply) == answer),
            "lenient": float(last_number(reply) == answer),
        }
