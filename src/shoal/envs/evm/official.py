"""The benchmark's own definitions: EVM-QuestBench's JSON files, with its templates and intervals and our checks.

A file is matched with our task of the same name, which brings solution and checks; what it says about wording and
intervals replaces ours. Where a file fixes or derives what we draw, ours stays, and `changes` says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shoal.envs.evm.definition import AmountParameter, Definition, NumberParameter, Parameter, shipped_tasks
from shoal.envs.evm.genesis import AGENT, WHALE, load_genesis
from shoal.errors import TaskError

MAX_FILE_BYTES = 1 << 20

RENAMED = {
    "added_value": "amount",
    "subtracted_value": "amount",
    "value": "amount",
    "amount_in": "amount",
    "amount_out": "amount",
    "stake_amount": "amount",
    "unstake_amount": "amount",
    "swap_amount": "amount",
    "amount_usdt": "amount",
    "amount_bnb": "amount",
    "amount_token_a": "amount_a",
    "amount_token_b": "amount_b",
    "liquidity_percentage": "percentage",
    "query_address": "account",
    "owner_address": "owner",
    "spender_address": "spender",
    "to_address": "to",
    "operator_address": "operator",
    "buyer_address": "buyer",
    "data_message": "message",
    "token_symbol": "token",
    "expected_balance": "held",
    "expected_allowance": "allowed",
    "expected_staked_amount": "staked",
    "expected_pending_rewards": "reward",
}
"""The benchmark's name of a parameter -> ours, where it has another and the task has that parameter."""


CONTRACTS = {
    "delegate_call_proxy_address": "proxy",
    "delegate_call_implementation_address": "implementation",
    "fallback_receiver_address": "receiver",
    "flashloan_receiver_address": "flash_loan",
    "simple_counter_address": "counter",
    "message_board_address": "board",
    "donation_box_address": "donations",
    "erc1363_token_address": "T1363",
    "erc1155_token_address": "multi",
    "erc721_token_address": "nft",
    "simple_staking_address": "staking",
    "simple_lp_staking_address": "lp_staking",
    "simple_reward_pool_address": "reward_pool",
}
"""What the benchmark deploys -> our name of it."""

ACCOUNTS = {"test_address": AGENT, "rich_address": WHALE}
_PLACEHOLDER = re.compile(r"\{+([A-Za-z0-9_]+)\}+")


@dataclass(frozen=True)
class Official:
    """One file, read."""

    definition: Definition
    """Ours, with the file's wording and intervals."""
    changes: tuple[str, ...]
    """What the file changed in our intervals, and which of its templates say what we do not draw, for people."""


def load_official(folder: Path) -> dict[str, Official]:
    """Every task of the benchmark's folder of definitions, by id.

    Raises:
        TaskError: the folder holds none, or a file that is none.
    """
    found = {}
    for path in sorted(folder.rglob("*.json")):
        official = read_official(path)
        found[official.definition.id] = official
    if not found:
        raise TaskError(f"{folder} holds no task definitions.", "Give the benchmark's folder of JSON files.")
    return found


def read_official(path: Path) -> Official:
    """One file; raises `TaskError`."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise TaskError(f"{path} is too large for a task.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} is not JSON: {error}.") from None
    ours = shipped_tasks().get(path.stem)
    if ours is None or not isinstance(content, dict):
        raise TaskError(f"{path} is none of the benchmark's tasks.", "Their names are those of shoal evm tasks.")
    templates = content.get("natural_language_templates", [])
    given = content.get("parameters", {})
    if not isinstance(templates, list) or not isinstance(given, dict):
        raise TaskError(f"{path} has no templates or no parameters.")
    parameters: dict[str, Parameter] = dict(ours.parameters)
    changes = []
    words: dict[str, str] = {}
    for name, entry in given.items():
        drawn = entry.get("generation") if isinstance(entry, Mapping) else None
        drawn = drawn if isinstance(drawn, Mapping) else {}
        if name.removesuffix("_address") in parameters.keys() - {name}:
            words[name] = f"{{{name}}}"
            continue
        known = name if name in parameters else RENAMED.get(name, name)
        if known not in parameters:
            words[name] = _fixed_word(drawn)
            continue
        words[name] = f"{{{known}}}"
        changed = _interval(parameters[known], drawn)
        if changed is not None and changed != parameters[known]:
            parameters[known] = changed
            changes.append(f"{known} is drawn from {drawn.get('min')} to {drawn.get('max')}")
    texts = tuple(_PLACEHOLDER.sub(lambda m: words.get(m[1]) or m[0], str(t)) for t in templates)
    unknown = {m for text in texts for m in _PLACEHOLDER.findall(text)} - {*parameters, *load_genesis().names}
    unknown -= {f"{name}_address" for name in parameters}
    if unknown or not texts:
        changes.append(f"wording is ours: the file's names {', '.join(sorted(unknown)) or 'nothing'}")
        texts = ours.templates
    return Official(ours.model_copy(update={"parameters": parameters, "templates": texts}), tuple(changes))


def _fixed_word(drawn: Mapping[str, Any]) -> str:
    """What an instruction says for a parameter that we do not draw; empty where the file gives no one value."""
    if drawn.get("method") == "from_env":
        key = str(drawn.get("env_key"))
        return f"{{{CONTRACTS[key]}}}" if key in CONTRACTS else ACCOUNTS.get(key, "")
    values = drawn.get("addresses") or drawn.get("values") or [drawn.get("value", "")]
    word = str(values[0]) if isinstance(values, list) and len(set(map(str, values))) == 1 else ""
    # A brace in a value would read as a name.
    return word.replace("{", "").replace("}", "")[:200]


def _interval(ours: Parameter, drawn: Mapping[str, Any]) -> Parameter | None:
    """Our parameter with the file's interval, if it has one that fits."""
    if drawn.get("min") is None or drawn.get("max") is None:
        return None
    try:
        low, high = Decimal(str(drawn["min"])), Decimal(str(drawn["max"]))
        if isinstance(ours, AmountParameter) and low <= high:
            texts = {"low": f"{low.normalize():f}", "high": f"{high.normalize():f}"}
            return AmountParameter(kind="amount", decimals=drawn.get("decimals", ours.decimals), **texts)
        if isinstance(ours, NumberParameter) and low <= high and low == int(low) and high == int(high):
            return NumberParameter(kind="number", low=int(low), high=int(high), step=drawn.get("step", ours.step))
    except (InvalidOperation, ValidationError):
        return None
    return None
