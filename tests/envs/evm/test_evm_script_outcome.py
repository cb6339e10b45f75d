"""Whatever a reply or a script's result holds, it is an act or a reason why not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.envs.evm.actions import ActionError, Found, Pay, transaction
from shoal.envs.evm.scripts.outcome import MAX_OUTCOME_BYTES, read_outcome
from shoal.envs.evm.scripts.reply import MAX_SCRIPT_CHARS, Language, find_script

TO = "0x" + "Ab" * 20

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([TO, "0x", "0x12", "5"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["to", "value", "data", "input", "query_result", "gas"]) | st.text(), inner, max_size=5
        )
    ),
    max_leaves=20,
)


def value(content: object) -> bytes:
    return json.dumps({"value": content}).encode()


@given(st.binary(max_size=200) | values.map(value) | values.map(lambda v: json.dumps(v).encode()))
def test_any_result_is_an_act_or_an_action_error(content: bytes) -> None:
    try:
        act = read_outcome(content)
        if isinstance(act, Pay):
            sent = transaction(act)
            assert sent.to.startswith("0x") and len(sent.to) == 42
        else:
            assert isinstance(act, Found) and 0 < len(act.answer) <= 64
    except ActionError as error:
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("written", "wei"), [(None, 0), (7, 7), ("7", 7), ("0x10", 16), (2**200, 2**200), (str(2**200), 2**200)]
)
def test_transactions_in_every_form(written: object, wei: int) -> None:
    fields = {"to": TO, "value": written, "data": "0x1234", "gasLimit": "21000", "nonce": 3, "from": "0x" + "00" * 20}
    for content in (value(fields), value(json.dumps(fields))):
        act = read_outcome(content)
        assert isinstance(act, Pay)
        sent = transaction(act)
        assert (sent.to, sent.value, sent.data) == (TO.lower(), wei, b"\x12\x34")


@pytest.mark.parametrize(
    "fields",
    [
        {"to": None},
        {"to": "USDT"},
        {"to": TO, "data": "0x1"},
        {"to": TO, "data": 5},
        {"to": TO, "value": 1.5},
        {"to": TO, "value": "0.5 ether"},
        {"to": TO, "value": "lots"},
        {"to": TO, "value": True},
        {"to": TO, "data": "0x" + "00" * 50_000},
        [{"to": TO}],
        "0x02f8",
        {},
        {"answer": None},
    ],
)
def test_what_is_no_transaction_and_no_result_is_refused(fields: object) -> None:
    with pytest.raises(ActionError):
        read_outcome(value(fields))


def test_results_are_found_inside_the_benchmark_s_wrappers() -> None:
    wrapped = {"query_result": {"success": True, "data": {"balance": "5", "note": None}, "balance": "7"}}
    assert read_outcome(value(wrapped)) == Found({"success": True, "balance": "7"})
    assert read_outcome(value({"reserves": ["1", "2"], "ratio": 0.5})) == Found(
        {"reserves": ["1", "2"], "ratio": "0.5"}
    )


def test_large_results_and_failures_are_said() -> None:
    with pytest.raises(ActionError, match="more than"):
        read_outcome(b" " * (MAX_OUTCOME_BYTES + 1))
    with pytest.raises(ActionError, match="too large"):
        read_outcome(value({"a": "x" * 5_000}))
    with pytest.raises(ActionError, match="nested"):
        read_outcome(value({"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}))
    with pytest.raises(ActionError, match="failed: line one line two$"):
        read_outcome(json.dumps({"error": "line one\n\x1b  line two"}).encode())


PYTHON = "def execute_skill(chain, agent_address, deployed_contracts):\n    return {}\n"
TYPESCRIPT = "export async function executeSkill() {\n  return {};\n}\n"


@pytest.mark.parametrize(("language", "script"), [("python", PYTHON), ("typescript", TYPESCRIPT)])
def test_a_script_is_found_in_a_reply(language: Language, script: str) -> None:
    assert find_script(script, language) == script
    assert find_script(f"Sure:\n```{language}\n{script}```\nThat is all.", language) == script
    assert find_script(f"```\nfirst\n```\n```\n{script}```", language) == script
    assert find_script(f"```json\n{{}}\n```\nThen:\n```{language}\r\n{script}```", language) == script
    assert find_script(f"  ```{language.upper()} title=x\n{script}  ```\n```sh\nls\n```", language) == script
    assert find_script(f"```{language}\n{script}\n```\nBetter:\n```{language}\n// now\n{script}```", language) == (
        f"// now\n{script}"
    )
    for reply in (
        "",
        "no script",
        f"```{language}\npass\n```",
        f"```{language}\n{script}{'#' * MAX_SCRIPT_CHARS}\n```",
    ):
        with pytest.raises(ActionError):
            find_script(reply, language)


@given(st.text(alphabet="`\n abexecutSkilpy()_", max_size=300))
def test_any_reply_has_a_script_or_none(reply: str) -> None:
    for language in ("python", "typescript"):
        try:
            assert find_script(reply, language) in reply  # type: ignore[arg-type]
        except ActionError:
            continue
