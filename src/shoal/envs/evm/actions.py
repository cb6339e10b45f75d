"""What an agent may do, as typed JSON, and how its words become that.

    {"action": "send", "to": "USDT", "function": "transfer", "args": ["0x…", "12.5 ether"], "value": "0"}
    {"action": "pay", "to": "0x…", "value": "0.05 ether"}
    {"action": "permit", "token": "T1363", "spender": "0x…", "value": "5 ether", "deadline": 2000000000}
    {"action": "query", "calls": {"balance": {"to": "USDT", "function": "balanceOf", "args": ["me"]}}}
    {"action": "submit", "answer": {"balance": "1000"}}          {"action": "error", "reason": "…"}

Invariant: an action's text is untrusted. It is bounded, becomes one of the types below or an `ActionError` that says
what was wrong, and nothing else happens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal, InvalidOperation, localcontext
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from shoal.envs.evm.abi import AbiError, encode, interfaces, known_functions, parse_signature
from shoal.envs.evm.chain import Transaction
from shoal.envs.evm.genesis import AGENT, load_genesis
from shoal.envs.evm.language import CONSTANTS, ETHER

MAX_ACTION_CHARS = 20_000
MAX_CALLS = 16
MAX_NESTING = 4
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_HEX = re.compile(r"0x(?:[0-9a-fA-F]{2})*")
_AMOUNT = re.compile(r"([0-9]{1,80}(?:\.[0-9]{1,18})?)\s*(ether|bnb)?", re.IGNORECASE)
CHAIN_FUNCTIONS = {
    "eth_blockNumber": 0,
    "eth_gasPrice": 0,
    "eth_maxPriorityFeePerGas": 0,
    "eth_getBalance": 1,
    "eth_getTransactionCount": 1,
}
"""What can be asked of the chain itself, and how many arguments it takes."""


class ActionError(Exception):
    """An action that makes no sense; the text tells the agent why."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Call(_Model):
    """One call: of a contract, or (without `to`) of the chain itself."""

    to: str = Field(default="", max_length=100)
    function: str = Field(max_length=200)
    args: tuple[Any, ...] = Field(default=(), max_length=32)
    index: int | None = Field(default=None, ge=0, le=32)
    """Which of several values is meant, for a query."""


class Send(Call):
    action: Literal["send"]
    value: str | int = 0


class Pay(_Model):
    action: Literal["pay"]
    to: str = Field(max_length=100)
    value: str | int
    data: str = Field(default="", max_length=MAX_ACTION_CHARS)
    """Hex with 0x, or text."""


class Permit(_Model):
    """Sign an ERC-2612 permit with the agent's key and send it."""

    action: Literal["permit"]
    token: str = Field(max_length=100)
    spender: str = Field(max_length=100)
    value: str | int
    deadline: int


class Query(_Model):
    action: Literal["query"]
    calls: dict[str, Call] = Field(min_length=1, max_length=MAX_CALLS)


class Submit(_Model):
    action: Literal["submit"]
    answer: dict[str, str | int | bool] = Field(default={}, max_length=MAX_CALLS)


class Report(_Model):
    """Say that it cannot be done."""

    action: Literal["error"]
    reason: str = Field(default="", max_length=2_000)


@dataclass(frozen=True, slots=True)
class Found:
    """What a script's query found out, by name. No text becomes one: a script has to run (`scripts`)."""

    answer: Mapping[str, Any]


Action = Send | Pay | Permit | Query | Submit | Report
_ACTIONS: TypeAdapter[Action] = TypeAdapter(Annotated[Action, Field(discriminator="action")])


def read_action(text: str) -> Action:
    """The action in a reply: its first JSON object; raises `ActionError`."""
    start = text.find("{")
    if start < 0:
        raise ActionError("there is no JSON object in the reply")
    try:
        found, _ = json.JSONDecoder().raw_decode(text[start : start + MAX_ACTION_CHARS])
    except (json.JSONDecodeError, RecursionError, ValueError):
        raise ActionError("the reply's JSON cannot be read") from None
    try:
        return _ACTIONS.validate_python(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ActionError(f"{where}: {first['msg']}"[:300]) from None


def write_action(action: Action) -> str:
    """The action as an agent would write it, in the order in which the grammar has its parts."""
    return json.dumps({"action": action.action, **action.model_dump(exclude_defaults=True)})


def address(text: Any) -> str:
    """An address, or the name of one, in lower case."""
    if isinstance(text, str):
        if _ADDRESS.fullmatch(text):
            return text.lower()
        named = load_genesis().names.get(text) or (CONSTANTS[text] if text in ("me", "whale") else None)
        if named:
            return str(named)
    raise ActionError(f"{str(text)[:60]!r} is no address and no known name")


def amount(value: Any) -> int:
    """An integer, its digits, or a number of ether such as "0.5 ether"."""
    if isinstance(value, bool):
        raise ActionError("true and false are no amounts")
    if isinstance(value, int):
        return value
    found = _AMOUNT.fullmatch(str(value).strip())
    if found is None or ("." in found[1] and not found[2]):
        raise ActionError(f'{str(value)[:60]!r} is no amount: give wei, or a number as in "0.5 ether"')
    try:
        with localcontext() as context:
            context.prec = 120
            scaled = Decimal(found[1]) * (ETHER if found[2] else 1)
            return int(scaled.to_integral_value(ROUND_DOWN))
    except InvalidOperation:
        raise ActionError(f"{found[1][:60]} is too large") from None


def octets(value: Any) -> bytes:
    """Hex with 0x, or the bytes of a text."""
    if not isinstance(value, str):
        raise ActionError(f"{str(value)[:60]!r} is neither hex nor text")
    if _HEX.fullmatch(value):
        return bytes.fromhex(value[2:])
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise ActionError("the text is not valid Unicode") from None


def argument(kind: str, value: Any, depth: int = 0) -> Any:
    """A JSON value as an ABI argument of type `kind`."""
    if kind.endswith("]"):
        if not isinstance(value, list | tuple) or depth >= MAX_NESTING:
            raise ActionError(f"{str(value)[:60]!r} is no list, as {kind} needs")
        inner = kind[: kind.rindex("[")]
        return [argument(inner, item, depth + 1) for item in value]
    if kind == "address":
        return address(value)
    if kind.startswith(("uint", "int")):
        return amount(value)
    if kind.startswith("bytes"):
        return octets(value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise ActionError(f"{str(value)[:60]!r} is neither true nor false")
        return value
    if kind == "string" and isinstance(value, str):
        return value
    raise ActionError(f"{str(value)[:60]!r} does not fit {kind}")


def resolve(call: Call) -> tuple[str, str, bytes]:
    """Callee, full signature and call data; a name alone is enough for a contract that is known."""
    to = address(call.to)
    signature = call.function.replace(" ", "")
    try:
        if "(" not in signature:
            kind = load_genesis().kinds.get(to)
            function = interfaces()[kind].functions.get((signature, len(call.args))) if kind else None
            if function is None:
                raise ActionError(f"{call.to[:60]} has no function {signature[:60]} with {len(call.args)} arguments")
            signature = function.signature
        _, types = parse_signature(signature)
        if len(types) != len(call.args):
            raise ActionError(f"{signature} takes {len(types)} arguments, not {len(call.args)}")
        args = [argument(kind, value) for kind, value in zip(types, call.args, strict=True)]
        return to, signature, encode(signature, args)
    except AbiError as error:
        raise ActionError(str(error)) from None


def transaction(action: Send | Pay) -> Transaction:
    """What is to be sent for an action; raises `ActionError`."""
    value = amount(action.value)
    if not 0 <= value < 2**256:
        raise ActionError("a value is between 0 and 2^256")
    if isinstance(action, Pay):
        return Transaction(AGENT, address(action.to), octets(action.data), value)
    to, _, data = resolve(action)
    return Transaction(AGENT, to, data, value)


def outputs(signature: str) -> tuple[str, ...] | None:
    """The types that a call returns, where the function is known."""
    function = known_functions().get(signature)
    return function.outputs if function else None
