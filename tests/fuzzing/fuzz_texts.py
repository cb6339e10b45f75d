"""What models, tools, pages, contracts and programs say."""

from __future__ import annotations

import json

import pydantic
from fuzz_registry import target, text_of
from mcp import types

from shoal.agents.builtin.calculator import calculate
from shoal.agents.builtin.text import chunks, html_text
from shoal.agents.builtin.web import read_results
from shoal.agents.collective.model import read_chain
from shoal.agents.scheduler.decision import parse as parse_decision
from shoal.agents.scheduler.prompt import result_line
from shoal.agents.tools import mcp_client
from shoal.agents.tools.function import ToolError
from shoal.agents.tools.outcome import success
from shoal.agents.tools.schema import Schema
from shoal.envs import extract
from shoal.envs.dream.edit import apply
from shoal.envs.dream.script import read_script
from shoal.envs.evm import language
from shoal.envs.evm.abi import AbiError
from shoal.envs.evm.abi import decode as decode_abi
from shoal.envs.evm.actions import ActionError
from shoal.envs.evm.actions import read_action as read_evm_action
from shoal.envs.evm.reasons import read_reason
from shoal.envs.evm.scripts.outcome import read_outcome
from shoal.envs.external import parsed
from shoal.envs.sokoban import read_moves
from shoal.envs.sokoban_rules import parse as parse_level
from shoal.envs.web.actions import read_action
from shoal.envs.web.tree import read_page

# Agents: tools, schemas, decisions, pages.


@target(lambda: [b'{"thought":"x","calls":[{"id":"a","tool":"f","arguments":{"x":1},"after":[]}]}', b'{"answer": "4"}'])
def decision(data: bytes) -> None:
    parse_decision(text_of(data))


@target(
    lambda: [
        b'{"type":"object","properties":{"a":{"type":"string","pattern":"^a+$"}}}\0{"a":"aa"}',
        b'{"$ref":"#/$defs/x","$defs":{"x":{"anyOf":[{}]}}}\0[1]',
    ]
)
def tool_schema(data: bytes) -> None:
    """A tool's schema by a hostile server, and a value that is checked by it."""
    schema, _, value = data.partition(b"\0")
    try:
        table, given = json.loads(schema), json.loads(value or b"{}")
    except (ValueError, RecursionError):
        return
    if isinstance(table, dict):
        Schema(table, "tool").problem(given)


@target(
    lambda: [
        b'{"content":[{"type":"text","text":"x"},{"type":"image","data":"aa","mimeType":"image/png"}],"structuredContent":{"result":1},"isError":false}'
    ]
)
def tool_result(data: bytes) -> None:
    """An MCP server's result, and how it is told to a model."""
    try:
        result = types.CallToolResult.model_validate_json(data)
    except (pydantic.ValidationError, ValueError):
        return
    mcp_client._text(result.content)
    structured = getattr(result, "structured_content", None)
    result_line("c1", "tool", success(mcp_client._value(structured, wrapped=True)))


@target(
    lambda: [b'{"results":[{"title":"a","url":"/x","content":"c"}]}', b"<html><a href='/b'>word <b>x</b></a></html>"]
)
def search_results(data: bytes) -> None:
    try:
        read_results(text_of(data), "http://search.test/")
    except ToolError:
        return


@target(lambda: [b"<html><body><p>a</p><script>x</script><table><tr><td>1</td></tr></table></body></html>"])
def page_text(data: bytes) -> None:
    chunks(html_text(text_of(data)))


@target(lambda: [b"(1 + 2) * 3 ** 2 / 7", b"sqrt(2) + max(1, 2)", b"2 ** 0.5 // 3 % 2"])
def calculator(data: bytes) -> None:
    try:
        calculate(text_of(data))
    except ToolError:
        return


# Environments: actions, pages, edit scripts, contracts' answers.

PAGE = b"""URL: http://a.test/
RootWebArea 'x'
\t[2] button 'Go'
\t\tStaticText 'Go'
\t[3] textbox 'n', value='v', focused"""

EDITS = b"""navigate 'http://a.test/b'
remove [2]
set [3] name 'x'
insert [root] 0
\t[30] link 'Out'
\t\tStaticText 'now'"""


@target(lambda: [PAGE])
def page(data: bytes) -> None:
    read_page(text_of(data)).text()


@target(lambda: [EDITS, b"same"])
def edits(data: bytes) -> None:
    script = read_script(text_of(data))
    apply(script, read_page(PAGE.decode()), strict=False)


@target(
    lambda: [b"click [2]", b"type [3] [hello] [1]", b"select [3] [x]", b"scroll [down]", b"stop [4]", b"go_back"],
    allowed=(ValueError,),
)
def web_action(data: bytes) -> None:
    read_action(text_of(data))


@target(
    lambda: [
        b'{"action": "transfer", "to": "0x0000000000000000000000000000000000000001", "amount": "1"}',
        b'{"query_result": {"balance": "1"}}',
        b'{"value": {"to": "0x0000000000000000000000000000000000000001", "value": "0x1", "data": "0x"}}',
        b'{"error": "x"}',
    ]
)
def evm_action(data: bytes) -> None:
    for read, given in ((read_evm_action, text_of(data)), (read_outcome, data)):
        try:
            read(given)  # type: ignore[operator]
        except ActionError:
            continue


@target(lambda: [b"balance(agent, USDT) >= 10 * 10 ** decimals(USDT)", b"transfer(USDT, to_address, 5)"])
def quest_language(data: bytes) -> None:
    language.parse(text_of(data))


@target(lambda: [bytes(31) + b"\x20" + bytes(31) + b"\x02ab" + bytes(30), bytes(64)])
def contract_answer(data: bytes) -> None:
    for kinds in (("string",), ("uint256[]",), ("address", "bool"), ("(uint256,bytes)[]", "string")):
        try:
            decode_abi(kinds, data)
        except AbiError:
            continue
    read_reason(text_of(data) + data.hex())


@target(lambda: [b"The answer is 1,234.5.", b"#### -7", b"<answer>3/4</answer>", b"\\boxed{12}", b"(B)"])
def answers(data: bytes) -> None:
    text = text_of(data)
    for read in (extract.last_number, extract.final_number, extract.parse_number, extract.tagged, extract.last_line):
        read(text)
    extract.after_marker(text)
    extract.choice(text, ("yes", "no", "1"))


@target(lambda: [b"####\n#@.#\n#$ #\n####", b"up down left"])
def sokoban(data: bytes) -> None:
    text = text_of(data)
    read_moves(text)
    try:
        parse_level(text)
    except ValueError:
        return


@target(lambda: [b'log\n{"reward": 1.0, "parts": {"a": 0.5}}\n', b"text only"])
def program_output(data: bytes) -> None:
    parsed(text_of(data))


STEPS = [{"requirement": "arithmetic", "task": "add", "needs": []}, {"requirement": "b", "task": "c", "needs": [1]}]
CHAIN = json.dumps({"steps": STEPS}).encode()


@target(lambda: [CHAIN])
def written_chain(data: bytes) -> None:
    """The chain of steps that a planner's model writes."""
    read_chain(text_of(data))
