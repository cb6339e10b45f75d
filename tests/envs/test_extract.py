"""Answers out of replies: what counts as the last number, the final number, a choice, the same text."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.envs.extract import (
    after_marker,
    choice,
    final_number,
    last_line,
    last_number,
    normalise,
    parse_number,
    tagged,
)

NUMBERS = st.integers(-(10**9), 10**9)
CLOSERS = st.text(alphabet=" .!\n*_`)}]$\"'", max_size=10)
WORDS = st.text(alphabet="abc xyz,:;=(", max_size=30)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("17 + 25 = 42", "42"),
        ("The answer is 42.", "42"),
        ("It is 12. Then 13.", "13"),
        ("1,234", "1234"),
        ("1,234,567.50 dollars", "1234567.50"),
        ("1,2,3", "3"),
        ("12,3456", "3456"),
        ("-7", "-7"),
        ("x = -7", "-7"),
        ("x = \u22127", "-7"),
        ("17-42", "42"),
        ("17 - 42", "42"),
        ("(3)-4", "4"),
        ("0.5", "0.5"),
        (".5", "0.5"),
        ("+3", "3"),
        ("$42$", "42"),
        (r"\boxed{42}", "42"),
        ("007", "7"),
        ("\u0664\u0662", None),
        ("forty-two", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("42", True),
        ("The answer is **42**.", True),
        (r"\(17 + 25 = \boxed{42}\)", True),
        ("<answer>42</answer>\n", True),
        ('It is "42".', True),
        ("42 \n\n", True),
        ("42 apples", False),
        ("42. That is all", False),
        ("42%", False),
        ("42 =", False),
        ("42 + x", False),
        ("42 < x>", False),
    ],
)
def test_final_number(text: str, right: bool) -> None:
    assert final_number(text) == (42 if right else None)
    assert last_number(text) == 42


@given(WORDS, NUMBERS, CLOSERS)
def test_a_number_with_closers_behind_it_is_final(before: str, number: int, after: str) -> None:
    assert final_number(f"{before} {number}{after}") == number


@given(WORDS, NUMBERS)
def test_separators_and_decimals_do_not_change_a_number(before: str, number: int) -> None:
    assert last_number(f"{before} {number:,}.") == number
    assert last_number(f"{before} {number}.00") == number
    assert parse_number(f"{number:,}") == parse_number(f" ${number}") == number


@given(st.text())
def test_any_text_is_taken_and_final_agrees_with_last(text: str) -> None:
    final = final_number(text)
    assert final is None or final == last_number(text) or final.is_nan()
    for function in (tagged, last_line, normalise, after_marker, parse_number):
        function(text)
    choice(text, ["one", "two"])


@pytest.mark.parametrize("piece", ["1,111", r"\)", "<answer>", "</a>", "-", "1.", "((((", "a)", "\n \n"])
def test_long_repetitions_take_no_time_to_speak_of(piece: str) -> None:
    """A pattern that backtracks would take hours here; the suite's own time limit would end it."""
    text = piece * 50_000
    for ending in ("", "x", "1,1111"):
        last_number(text + ending), final_number(text + ending), tagged(text + ending), last_line(text + ending)


def test_a_number_too_long_to_be_an_answer_equals_nothing() -> None:
    found = last_number("9" * 100_000)
    assert found is not None
    assert found != found


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("She has 3.\n#### 1,200", "1,200"), ("7", "7"), ("#### 1\n#### 2", "2")],
)
def test_after_marker(text: str, wanted: str) -> None:
    assert after_marker(text) == wanted


def test_tags_and_lines() -> None:
    assert tagged("<answer>1</answer> no, <answer> 2 </answer>") == "2"
    assert tagged("<answer>1") is None
    assert tagged("1</answer>") is None
    assert last_line("a\n\nThe final answer is: Paris \n \n") == "Paris"
    assert last_line("Answer: 7") == last_line("the answer is 7") == "7"
    assert last_line("Answering is hard") == "Answering is hard"
    assert normalise("  **The  Cat.** ") == "the cat"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B", 1),
        ("(b)", 1),
        ("The answer is B.", 1),
        ("A is wrong.\nSo it is **C**", 2),
        ("London", 1),
        ("It is a city", None),
        ("Z", None),
        ("", None),
        ("d", None),
    ],
)
def test_choice(text: str, wanted: int | None) -> None:
    assert choice(text, ["Paris", "London", "Rome"]) == wanted
