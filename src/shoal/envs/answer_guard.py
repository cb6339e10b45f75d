"""Which answers may reach a scorer that evaluates them as Python.

Several reasoning-gym scorers call `eval` or sympy's `parse_expr` on the answer. An answer is untrusted (a model wrote
it, perhaps on a stranger's machine), so nothing that could call a function or name a builtin may reach them.

Invariants: `may_score` is false for any answer that holds a call, an attribute, a comprehension or an unknown name
where the scorer would evaluate it; a scorer that evaluates answers and is not listed here is refused by `check_scorer`.

Not covered: an accepted expression may still be slow to simplify. Powers are limited so that it is not slow by size.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

from shoal.errors import TaskError

MAX_ANSWER_CHARS = 4096
MAX_ALGEBRA_CHARS = 300
MAX_POWERS_OF_GROUPS = 2

LITERAL_SCORERS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""They `eval` what should be a list."""

NUMERIC_SCORERS = frozenset({"countdown", "puzzle24"})
"""They parse a sum of numbers."""

SYMBOLIC_SCORERS = frozenset({"intermediate_integration", "polynomial_multiplication", "simple_integration"})
"""They parse a formula of variables and functions."""

OWN_ANSWER_SCORERS = frozenset({"number_sorting"})
"""They evaluate their own expected answer only."""

_TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh")
FUNCTIONS = frozenset((*_TRIGONOMETRIC, "exp", "log", "ln", "sqrt", "pi", "Abs"))
"""Names that a formula may use beside single letters."""

_PLAIN = re.compile(r"[\w\s,_-]*")
_NUMERIC = re.compile(r"[0-9+\-*/(). \n]*")
_SYMBOLIC = re.compile(r"[0-9A-Za-z+\-*/^(). \n]*")
_BAD_DOT = re.compile(r"\.(?![0-9])|[A-Za-z)]\.")
_POWER = re.compile(r"\*\*|\^")
_EXPONENT = re.compile(
    r"\s*(?:-?[0-9]{1,2}|-?[a-z]|\(-?[0-9]{1,2}(?:/[0-9]{1,2})?\))(?![0-9A-Za-z.])(?!\s*(?:\*\*|\^|\())"
)
_EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")


def may_score(scorer: str, answer: str) -> bool:
    """Whether the scorer of the generator `scorer` may see `answer`; the empty answer always may."""
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    if scorer in LITERAL_SCORERS:
        return bool(_PLAIN.fullmatch(answer)) or _is_literal(answer)
    if scorer in NUMERIC_SCORERS:
        return bool(_NUMERIC.fullmatch(answer)) and _is_small_algebra(answer)
    if scorer in SYMBOLIC_SCORERS:
        names = re.findall(r"[A-Za-z]+", answer)
        known = all(len(name) == 1 or name in FUNCTIONS for name in names)
        return known and bool(_SYMBOLIC.fullmatch(answer)) and _is_small_algebra(answer)
    return True


def _is_literal(answer: str) -> bool:
    try:
        ast.literal_eval(answer)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _is_small_algebra(answer: str) -> bool:
    if len(answer) > MAX_ALGEBRA_CHARS or _BAD_DOT.search(answer):
        return False
    powers = list(_POWER.finditer(answer))
    groups = sum(answer[: power.start()].rstrip().endswith(")") for power in powers)
    return groups <= MAX_POWERS_OF_GROUPS and all(_EXPONENT.match(answer, power.end()) for power in powers)


def check_scorer(scorer: str, score: Callable[..., Any]) -> None:
    """Refuse a scorer that evaluates answers in a way that nobody has looked at.

    Raises:
        TaskError: the source of `score` evaluates text and `scorer` is not one of those known here.
    """
    if scorer in LITERAL_SCORERS | NUMERIC_SCORERS | SYMBOLIC_SCORERS | OWN_ANSWER_SCORERS:
        return
    try:
        source = inspect.getsource(score)
    except (OSError, TypeError):
        source = ""
    if _EVALUATES.search(source):
        raise TaskError(
            f"the scorer of {scorer!r} evaluates answers as code, in a way that is not known to be safe.",
            "Choose another generator, or the version of reasoning-gym in the constraints file.",
        )
