"""No answer reaches a scorer that would run it."""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest

from shoal.envs.answer_guard import (
    LITERAL_SCORERS,
    NUMERIC_SCORERS,
    OWN_ANSWER_SCORERS,
    SYMBOLIC_SCORERS,
    check_scorer,
    may_score,
)
from shoal.errors import TaskError

EVALUATING = sorted(LITERAL_SCORERS | NUMERIC_SCORERS | SYMBOLIC_SCORERS)

ATTACKS = [
    "__import__('os').system('touch /tmp/owned')",
    "open('/tmp/owned', 'w')",
    "open(1)",
    "exec(chr(49))",
    "().__class__",
    "(1).real",
    "x.subs",
    "[x for x in range(10)]",
    "[0 for a in [1] for b in [1]]",
    "(lambda: 1)()",
    "f'{1}'",
    "9**9**9**9",
    "9**(9**9)",
    "9**(99)**(99)",
    "9**999999",
    "(((9**99)**99)**99)**99",
    "x^9^9^9",
    "factorial(99999)",
    "1 if 1 else (2)()",
    "1;2()",
    "a:=b()",
    "x" * 10_000,
]

HONEST = {
    "binary_matrix": ["0 1\n1 0", "[[0, 1], [1, 0]]"],
    "n_queens": ["_ Q _\nQ _ _", "[['_', 'Q']]"],
    "spiral_matrix": ["1 2 3", "[1, 2, 3]"],
    "string_insertion": ["ABCDE", "['A', 'B']"],
    "countdown": ["(99 - 3)*2 + 4/2", "1.5 * 2"],
    "puzzle24": ["(4 + 4) * (5 - 2)"],
    "simple_integration": ["3*x**4/4 + 2*x**(1/2) + C", "-x**-2"],
    "intermediate_integration": ["exp(2*x)*sin(x)**2 + log(x) + C", "(2*x + 1)**10/20"],
    "polynomial_multiplication": ["12*x**4 - 3*x*y**2 + 7", "6*x**2"],
}


@pytest.mark.parametrize("scorer", EVALUATING)
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_do_not_reach_a_scorer(scorer: str, attack: str) -> None:
    assert not may_score(scorer, attack)


@pytest.mark.parametrize("scorer", EVALUATING)
def test_honest_answers_do(scorer: str) -> None:
    for answer in HONEST[scorer]:
        assert may_score(scorer, answer), answer


def test_the_guard_takes_no_time_over_long_answers() -> None:
    """A pattern that backtracks would take hours; the suite's own time limit would end it."""
    for scorer in EVALUATING:
        for piece in ("(", "**9", "[", "a ", "- ", ")**"):
            for length in (1000, 100_000):
                assert not may_score(scorer, piece * length + "@")


def test_every_scorer_of_the_library_that_evaluates_text_is_known_here() -> None:
    """If a new version of the library adds one, this test and `check_scorer` name it."""
    factory = pytest.importorskip("reasoning_gym.factory", reason="needs reasoning-gym")
    found = set()
    for name, (generator, _) in factory.DATASETS.items():
        tree = ast.parse(textwrap.dedent(inspect.getsource(generator.score_answer)))
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        called = {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}
        if called & {"eval", "exec", "parse_expr", "sympify"}:
            found.add(name)
    assert found == set(EVALUATING) | OWN_ANSWER_SCORERS


def test_an_unknown_scorer_that_evaluates_is_refused() -> None:
    def score_answer(answer: str) -> object:
        return eval(answer)  # noqa: S307 - what must be refused; never called

    with pytest.raises(TaskError, match="evaluates answers"):
        check_scorer("novelty", score_answer)
    check_scorer("puzzle24", score_answer)
    check_scorer("novelty", len)
