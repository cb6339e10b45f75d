"""Whatever an agent writes becomes an action or a reason why not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.envs.evm.actions import (
    ActionError,
    Pay,
    Query,
    Send,
    Submit,
    address,
    amount,
    read_action,
    resolve,
    transaction,
    write_action,
)
from shoal.envs.evm.genesis import AGENT, load_genesis

USDT = load_genesis().names["USDT"]
TO = "0x" + "12" * 20

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
likely = st.fixed_dictionaries(
    {"action": st.sampled_from(["send", "pay", "permit", "query", "submit", "error", "fly"])},
    optional={
        "to": st.sampled_from(["USDT", "me", TO, "nobody", ""]) | json_values,
        "value": st.sampled_from(["1", "0.5 ether", "-1", "1e9", 3, 2**256]) | json_values,
        "function": st.sampled_from(["transfer", "transfer(address,uint256)", "f(", "f(uint8[)", "f()"]) | st.text(),
        "args": st.lists(st.sampled_from([TO, "5", "me", "1.5 ether"]) | json_values, max_size=4),
        "data": st.sampled_from(["0x12", "0x1", "hello", "\ud800"]),
        "token": st.just("T1363"),
        "spender": st.just(TO),
        "deadline": st.integers(-5, 2**70),
        "calls": st.dictionaries(st.text(max_size=5), json_values, max_size=3),
        "answer": st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    },
)


@given(st.text() | json_values.map(json.dumps) | likely.map(json.dumps))
def test_any_text_is_an_action_or_an_action_error(text: str) -> None:
    try:
        action = read_action(text)
        if isinstance(action, Send | Pay):
            sent = transaction(action)
            assert sent.sender == AGENT and 0 <= sent.value < 2**256
    except ActionError as error:
        assert str(error)


@given(likely)
def test_what_was_read_reads_back(content: dict[str, object]) -> None:
    try:
        action = read_action(json.dumps(content))
    except ActionError:
        return
    assert read_action(write_action(action)) == action


@given(st.integers(0, 2**200), st.integers(0, 18))
def test_amounts_in_ether_are_exact(wei: int, places: int) -> None:
    wei -= wei % 10 ** (18 - places)
    text = f"{wei // 10**18}.{wei % 10**18:018d}"[: -(18 - places) or None].rstrip(".")
    assert amount(f"{text} ether") == wei
    assert amount(str(wei)) == wei == amount(wei)


@pytest.mark.parametrize("wrong", ["1.5", "-1", "1e18", "ten", "", "0x10", True, None, [1], 1.5, "1" * 90])
def test_an_amount_is_never_guessed(wrong: object) -> None:
    with pytest.raises(ActionError):
        amount(wrong)


def test_names_and_short_signatures() -> None:
    short = read_action('{"action": "send", "to": "USDT", "function": "transfer", "args": ["me", "2 ether"]}')
    full = read_action(
        f'Sure! {{"action":"send","to":"{USDT.upper().replace("X", "x")}","function":"transfer(address, uint256)",'
        f'"args":["{AGENT}",2000000000000000000]}} That should do.'
    )
    assert isinstance(short, Send) and isinstance(full, Send)
    assert transaction(short) == transaction(full)
    assert address("router") == load_genesis().names["router"]
    with pytest.raises(ActionError, match="no function fly"):
        resolve(Send(action="send", to="USDT", function="fly"))


def test_sizes_are_bounded() -> None:
    calls = {str(n): {"function": "eth_blockNumber"} for n in range(17)}
    with pytest.raises(ActionError):
        read_action(json.dumps({"action": "query", "calls": calls}))
    with pytest.raises(ActionError):
        read_action('{"action": "submit", "answer": ' + '{"a":' * 5000 + "1" + "}" * 5000 + "}")
    assert read_action('{"action": "submit"}') == Submit(action="submit")
    assert isinstance(read_action('{"action":"query","calls":{"n":{"function":"eth_blockNumber"}}}'), Query)
