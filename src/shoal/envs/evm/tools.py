"""Reads of a chain as tools for agents: a balance, a call, and a transaction tried without consequence.

Arguments are words as an agent writes them (names or addresses, "0.5 ether"); results are JSON values, integers as
decimal text. What makes no sense raises `ActionError`, a call that reverts `Reverted`: both are for the agent to read.

Invariant: nothing here leaves a trace on the chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from shoal.envs.evm.abi import AbiError, decode, encode, interfaces
from shoal.envs.evm.actions import ActionError, Call, Pay, Send, address, outputs, resolve, transaction
from shoal.envs.evm.chain import ChainBackend, Log
from shoal.envs.evm.genesis import AGENT, load_genesis
from shoal.envs.evm.language import ETHER, plain


def balance(chain: ChainBackend, account: str = "me", token: str = "") -> dict[str, str]:
    """What an account holds of BNB, or of a token: `base_units`, and `amount` with 18 decimals applied."""
    who = address(account)
    if not token:
        held = chain.balance(who)
    else:
        (held,) = _read(["uint256"], chain.call(address(token), encode("balanceOf(address)", [who]), AGENT))
    return {"base_units": str(held), "amount": f"{Decimal(held) / ETHER:f}"}


def call(chain: ChainBackend, to: str, function: str, args: Sequence[Any] = ()) -> dict[str, Any]:
    """What a contract's function returns: `values`, or `data` as hex where the function is not known."""
    callee, signature, data = resolve(Call(to=to, function=function, args=tuple(args)))
    raw = chain.call(callee, data, AGENT)
    types = outputs(signature)
    if types is None:
        return {"data": "0x" + raw.hex()}
    return {"values": [_jsonable(value) for value in plain(_read(types, raw))]}


def simulate(chain: ChainBackend, action: Send | Pay) -> dict[str, Any]:
    """What sending it now would do: `success`, `reason`, `events`, and the agent's `spent` BNB; then undone."""
    sent = transaction(action)
    point = chain.snapshot()
    try:
        before = chain.balance(AGENT)
        receipt = chain.send(sent)
        return {
            "success": receipt.success,
            "reason": receipt.reason,
            "events": [_event(log) for log in receipt.logs],
            "spent": str(before - chain.balance(AGENT)),
        }
    finally:
        chain.revert(point)


def _read(types: Sequence[str], raw: bytes) -> tuple[Any, ...]:
    try:
        return decode(types, raw)
    except AbiError as error:
        raise ActionError(str(error)) from None


def _event(log: Log) -> dict[str, Any]:
    """A log by name and values where its contract is known, else as it is."""
    kind = load_genesis().kinds.get(log.address)
    events = interfaces()[kind].events.values() if kind else ()
    event = next((event for event in events if log.topics[:1] == (event.topic,)), None)
    if event is None:
        return {"address": log.address, "topics": ["0x" + t.hex() for t in log.topics], "data": "0x" + log.data.hex()}
    return {
        "address": log.address,
        "event": event.name,
        "values": [_jsonable(value) for value in event.values(log.topics, log.data)],
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value if isinstance(value, bool | str) else str(value)
