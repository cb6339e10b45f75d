"""The language computes what it says and can do nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.envs.evm.chain import ChainBackend
from shoal.envs.evm.genesis import AGENT
from shoal.envs.evm.language import ETHER, Form, LanguageError, World, parse
from shoal.envs.evm.pyrevm_chain import PyrevmChain

CHAIN = PyrevmChain()

terms = st.recursive(
    st.integers(0, 10**30).map(str) | st.sampled_from(["a", "b", "ether"]),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    max_leaves=8,
)


@given(terms, st.integers(-(10**20), 10**20), st.integers(0, 10**20))
def test_arithmetic_is_that_of_integers(text: str, a: int, b: int) -> None:
    assert World(CHAIN, {"a": a, "b": b}).evaluate(text) == eval(text, {"a": a, "b": b, "ether": ETHER})  # noqa: S307


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5 * ether", ETHER // 2),
        ("7 // 2 + 7 % 2", 4),
        ("1 < 2 <= 2 < 3", True),
        ("1 == 1 and not 2 == 3 or nothing", True),
        ("min(3, 2) + max(1, 5) + abs(-4) + len([1, 2])", 13),
        ("[1, 2, 3][1]", 2),
        ("USDT.symbol()", "USDT"),
        ("me == '" + AGENT + "'", True),
        ("'text' < 5", False),
    ],
)
def test_values(text: str, value: object) -> None:
    assert World(CHAIN, {}).evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "me.__class__",
        "(lambda: 1)()",
        "[x for x in [1]]",
        "{1: 2}",
        "f'{me}'",
        "me if 1 else 2",
        "open('/etc/passwd')",
        "USDT.__init__()",
        "2 ** 999999999",
        "1 << 99",
        "[1, 2][0:1]",
        "unknown",
        "1 // 0",
        "[1][5]",
        "me - 1",
        "min()",
        "5[0]",
        "-me",
        "USDT.transfer(me, 1, value=2, gas=3)",
        "(yield)",
        "x := 1",
        "",
        "(" * 900 + "1" + ")" * 900,
    ],
)
def test_nothing_else_exists(text: str) -> None:
    with pytest.raises(LanguageError):
        World(CHAIN, {}).evaluate(text)


@given(st.text(max_size=40))
def test_any_text_is_an_expression_or_an_error(text: str) -> None:
    try:
        parse(text)
    except LanguageError as error:
        assert error.remedy


def test_forms_are_not_made(pyrevm: ChainBackend) -> None:
    world = World(pyrevm, {"to": "0x" + "34" * 20, "amount": 7})
    form = world.form("USDT.transfer(to, amount)")
    assert form.function is not None
    assert (form.function.signature, form.args) == ("transfer(address,uint256)", ("0x" + "34" * 20, 7))
    assert world.form("pay(to, amount, text('hi'))") == Form("0x" + "34" * 20, None, (), 7, b"hi", AGENT)
    assert world.form("WBNB.deposit(value=amount)").value == 7
    assert world.evaluate("USDT.balanceOf(to)") == 0
