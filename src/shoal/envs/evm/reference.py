"""What solves a quest, and what must not: the reference solution as actions, and its mutants.

A mutant is the reference with one thing wrong: an act left out, an amount, an address, a token, a path, a text or a
value changed; or nothing done at all. Each must fail at least one check, or the checks are too weak. An *inefficient*
solution does what is asked and more queries besides: it keeps its points and loses by its steps alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from shoal.envs.evm.actions import Action, Call, Pay, Permit, Query, Report, Send, Submit
from shoal.envs.evm.judging import CHAIN_READS
from shoal.envs.evm.language import LanguageError, World, parse
from shoal.envs.evm.quest import Quest

STRANGER = "0x00000000000000000000000000000000005714a6"
OTHER_TOKEN = {"USDT": "BUSD", "BUSD": "USDT", "CAKE": "USDT", "WBNB": "BUSD", "T1363": "USDT"}


def reference_actions(quest: Quest) -> list[Action]:
    """Do what the task's solution says, step by step, and give the actions that did it. The quest must have begun."""
    done = []
    for step in quest.instance.definition.solution:
        action = step_action(World(quest.chain, quest.values), parse(step))
        quest.act(action)
        done.append(action)
    return done


def step_action(world: World, node: ast.expr) -> Action:
    """One line of a solution as an action, its arguments worked out from the chain as it stands."""
    if not isinstance(node, ast.Call):
        raise LanguageError(f"{ast.unparse(node)!r} is no step.")
    if isinstance(node.func, ast.Name) and node.func.id == "ask":
        return Query(action="query", calls={str(k.arg): _read_call(world, k.value) for k in node.keywords})
    if isinstance(node.func, ast.Name) and node.func.id == "permit":
        token, spender, value, deadline = (world.evaluate(arg) for arg in node.args)
        return Permit(action="permit", token=token, spender=spender, value=str(value), deadline=deadline)
    form = world.form(node)
    if form.function is None:
        data = "0x" + form.data.hex() if form.data else ""
        return Pay(action="pay", to=form.to, value=str(form.value), data=data)
    args = tuple(_json(arg) for arg in form.args)
    return Send(
        action="send", to=_name(world, form.to), function=form.function.signature, args=args, value=str(form.value)
    )


def _read_call(world: World, node: ast.expr) -> Call:
    if isinstance(node, ast.Subscript):
        inner = _read_call(world, node.value)
        return inner.model_copy(update={"index": world.evaluate(node.slice)})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id not in CHAIN_READS:
            raise LanguageError(f"{ast.unparse(node)!r} cannot be asked of the chain.")
        return Call(function=CHAIN_READS[node.func.id], args=tuple(world.evaluate(arg) for arg in node.args))
    form = world.form(node)
    assert form.function is not None
    return Call(to=_name(world, form.to), function=form.function.signature, args=tuple(_json(a) for a in form.args))


def _name(world: World, address: str) -> str:
    return next((name for name, known in world.genesis.names.items() if known == address), address)


def _json(value: Any) -> Any:
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, list):
        return [_json(item) for item in value]
    return value if isinstance(value, bool | str) else str(value)


def mutants(actions: list[Action], is_query: bool) -> Iterator[tuple[str, list[Action]]]:
    """Name and actions of everything that is wrong in one way."""
    yield "no-op", []
    yield "gives up", [Report(action="error", reason="it cannot be done")]
    if is_query and len(actions) == 1:
        yield "made up", [Submit(action="submit", answer=dict.fromkeys(_fields(actions[0]), 1))]
        yield "asks for something else", [Query(action="query", calls=dict.fromkeys(_fields(actions[0]), _PRIORITY))]
        wrong = {f"{name}_": call for name, call in _calls(actions[0]).items()}
        yield "wrong fields", [Query(action="query", calls=wrong)]
        yield "asks for a balance", [Query(action="query", calls=dict.fromkeys(_fields(actions[0]), _BALANCE))]
    for number, action in enumerate(actions):
        if len(actions) > 1:
            yield f"without step {number + 1}", actions[:number] + actions[number + 1 :]
        for name, changed in _changes(action):
            yield f"step {number + 1}: {name}", [*actions[:number], changed, *actions[number + 1 :]]


_PRIORITY = Call(function="eth_maxPriorityFeePerGas")
_BALANCE = Call(function="eth_getBalance", args=(STRANGER,))
LOOK = Query(action="query", calls={"block": Call(function="eth_blockNumber")})
"""A query that no task asks for: what an inefficient solution does besides."""


def _calls(action: Action) -> dict[str, Call]:
    return action.calls if isinstance(action, Query) else {}


def _fields(action: Action) -> list[str]:
    return list(_calls(action))


def _changes(action: Action) -> Iterator[tuple[str, Action]]:
    if isinstance(action, Query):
        for name, call in action.calls.items():
            for what, args in _wrong_args(call.args):
                changed = call.model_copy(update={"args": args})
                yield f"{name} with {what}", action.model_copy(update={"calls": {**action.calls, name: changed}})
    elif isinstance(action, Send):
        yield "to a stranger", action.model_copy(update={"to": STRANGER})
        if action.to in OTHER_TOKEN:
            yield "wrong token", action.model_copy(update={"to": OTHER_TOKEN[action.to]})
        for what, args in _wrong_args(action.args):
            yield what, action.model_copy(update={"args": args})
        yield from _wrong_value(action)
        yield "no arguments", action.model_copy(update={"args": (), "function": "stop()"})
    elif isinstance(action, Pay):
        yield "to a stranger", action.model_copy(update={"to": STRANGER})
        yield "to the router", action.model_copy(update={"to": "router"})
        yield from _wrong_value(action)
        if action.data:
            yield "other data", action.model_copy(update={"data": "0x00"})
            yield "no data", action.model_copy(update={"data": ""})
    elif isinstance(action, Permit):
        for key, value in (("token", "USDT"), ("spender", STRANGER), ("deadline", 1), ("deadline", 2_000_000_001)):
            yield f"{key} {value}", action.model_copy(update={key: value})
        for value in _wrong_numbers(int(action.value)):
            yield f"value {value}", action.model_copy(update={"value": str(value)})


def _wrong_value(action: Send | Pay) -> Iterator[tuple[str, Action]]:
    for value in _wrong_numbers(int(action.value)):
        yield f"value {value}", action.model_copy(update={"value": str(value)})


def _wrong_numbers(number: int) -> list[int]:
    return [number // 2, number * 3] if number > 1 else [number * 2 + 1, 7]


def _wrong_args(args: tuple[Any, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for place, value in enumerate(args):
        for wrong in _wrong(value):
            yield f"argument {place + 1} {str(wrong)[:40]}", (*args[:place], wrong, *args[place + 1 :])


def _wrong(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, list):
        return [value[::-1], value[:-1]]
    text = str(value)
    if text.isdecimal():
        return [str(number) for number in _wrong_numbers(int(text))]
    if text.startswith("0x") and len(text) == 42:
        return [STRANGER]
    return ["0x00"] if text.startswith("0x") else [text + "!"]
