"""The grammar of typed actions: what an agent may write, so that every reply parses and every call can be encoded.

It names the contracts and functions that exist and gives each function arguments of its types; which contract has
which function, and every address and amount, is the agent's to know. An atomic quest takes exactly one act; `submit`
and `error` belong to workflows.

Invariant: whatever matches is an action that `actions.read_action` reads, and each reference solution, written by
`write_action`, matches.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from functools import lru_cache

from shoal.envs.evm.actions import CHAIN_FUNCTIONS, MAX_CALLS
from shoal.envs.evm.genesis import contract_file, load_genesis
from shoal.protocol.sampling import Grammar

READING = ("view", "pure")
"""What an interface calls functions that change nothing."""

SET_UP = ("initialize", "initializePair", "register")
"""Functions that built the genesis; nobody can call them again."""

MAX_PATH = 4
"""Addresses in one list."""

_WORDS = r"""
start: "{{\"action\": \"" ({acts}) "}}"
pay: "pay\", \"to\": " ADDRESS ", \"value\": " AMOUNT (", \"data\": " TEXT)?
send: "send\", \"to\": " ADDRESS ", \"function\": " ({sends}) (", \"value\": " AMOUNT)?
permit: "permit\", \"token\": " ADDRESS ", \"spender\": " ADDRESS ", \"value\": " AMOUNT ", \"deadline\": " NUMBER
query: "query\", \"calls\": {{" named (", " named){{0,{more}}} "}}"
named: NAME ": {{" ("\"to\": " ADDRESS ", \"function\": " ({reads}) (", \"index\": " INDEX)? | {chain}) "}}"
submit: "submit\"" (", \"answer\": {{" pair (", " pair){{0,{more}}} "}}")?
pair: NAME ": " (TEXT | NUMBER | BOOL)
error: "error\"" (", \"reason\": " TEXT)?
list: "[" ADDRESS (", " ADDRESS){{0,{path}}} "]"
ADDRESS: /"({names})"/
AMOUNT: /"[0-9]{{1,78}}((\.[0-9]{{1,18}})? ether)?"/
NUMBER: /[1-9][0-9]{{0,11}}|0/
INDEX: /[0-9]/
BOOL: "true" | "false"
TEXT: /"[^"\\\x00-\x1f\x7f]{{0,200}}"/
NAME: /"[A-Za-z_][A-Za-z0-9_]{{0,30}}"/
"""


@lru_cache(maxsize=256)
def action_grammar(composite: bool, addresses: frozenset[str] | None = None) -> Grammar:
    """What one reply in a quest must be.

    Args:
        addresses: those that may be written besides the known names; None is any.
    """
    sends, send_rules = _calls("S", reading=False)
    reads, read_rules = _calls("R", reading=True)
    acts = "pay | send | permit | query" + (" | submit | error" if composite else "")
    hexes = ["0x[0-9a-fA-F]{40}"] if addresses is None else sorted(addresses)
    text = _WORDS.format(
        acts=acts,
        sends=sends,
        reads=reads,
        chain=" | ".join(_chain(name, count) for name, count in CHAIN_FUNCTIONS.items()),
        names="|".join([*hexes, "me", *load_genesis().names]),
        more=MAX_CALLS - 1,
        path=MAX_PATH - 1,
    )
    return Grammar(kind="lark", text="\n".join([text.strip(), *send_rules, *read_rules]))


@lru_cache(maxsize=2)
def _calls(prefix: str, *, reading: bool) -> tuple[str, list[str]]:
    """Alternatives of a signature and its arguments, one for each list of types, and the rules that they name."""
    names: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for artifact in json.loads(contract_file("artifacts.json")).values():
        for entry in artifact["abi"]:
            known = entry["type"] == "function" and entry["name"] not in SET_UP
            if known and (entry["stateMutability"] in READING) is reading:
                names[tuple(i["type"] for i in entry["inputs"])].add(entry["name"])
    calls, rules = [], []
    for number, (types, found) in enumerate(sorted(names.items())):
        signature = re.escape(f"({','.join(types)})")
        rules.append(f'{prefix}{number}: /"({"|".join(sorted(found))}){signature}"/')
        inside = ' ", " '.join(_argument(kind) for kind in types)
        args = rf'", \"args\": [" {inside} "]"' if types else r'(", \"args\": []")?'
        calls.append(f"{prefix}{number} {args}")
    return " | ".join(calls), rules


def _argument(kind: str) -> str:
    if kind == "address[]":
        return "list"
    if kind.startswith("uint"):
        return "AMOUNT"
    return {"address": "ADDRESS", "bool": "BOOL"}.get(kind, "TEXT")


def _chain(name: str, num_args: int) -> str:
    args = r' ", \"args\": [" ADDRESS "]"' if num_args else r' (", \"args\": []")?'
    return rf'"\"function\": \"{name}\""{args}'
