"""What a script returned, as an act. The bytes are the script's own choice: bounded, typed, never trusted.

A script returns an object, or the same as JSON text:
- with `to`, an unsigned transaction: `to`, `data` (or `input`) and `value`; fees, nonce and sender are the platform's;
- otherwise a query's result: its fields, also those inside `query_result` or `data`, by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from shoal.envs.evm.actions import MAX_ACTION_CHARS, ActionError, Found, Pay, address, amount

MAX_OUTCOME_BYTES = 100_000
MAX_FIELDS = 64
MAX_FIELD_CHARS = 4_000
MAX_NESTING = 4
MAX_ERROR_CHARS = 400
_HEX_DATA = re.compile(r"0x(?:[0-9a-fA-F]{2})*")
_HEX_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,64}")


def read_outcome(content: bytes) -> Pay | Found:
    """The act in a script's result file: `{"value": …}` or `{"error": …}`.

    Raises:
        ActionError: the script failed, or returned what is neither a transaction nor a result.
    """
    if len(content) > MAX_OUTCOME_BYTES:
        raise ActionError(f"the script returned more than {MAX_OUTCOME_BYTES} bytes")
    outcome = _parse(content)
    if not isinstance(outcome, dict):
        raise ActionError("the script's result cannot be read")
    if "error" in outcome:
        raise ActionError(f"the script failed: {one_line(outcome['error'])}")
    value = outcome.get("value")
    if isinstance(value, str):
        value = _parse(value.encode("utf-8", "replace"))
    if not isinstance(value, dict):
        raise ActionError("the script must return a transaction or an object of results")
    return _transaction(value) if "to" in value and "query_result" not in value else _result(value)


def one_line(text: Any) -> str:
    """Untrusted text on one line, cut, without control characters."""
    printable = "".join(char if char.isprintable() else " " for char in str(text))
    return " ".join(printable.split())[:MAX_ERROR_CHARS]


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise ActionError("what the script returned is not JSON") from None


def _transaction(fields: Mapping[str, Any]) -> Pay:
    to = fields["to"]
    if not isinstance(to, str) or not to.startswith("0x"):
        raise ActionError(f"the transaction's `to` is no address: {one_line(to)[:60]}")
    data = next((fields[key] for key in ("data", "input") if fields.get(key) is not None), "0x")
    if not isinstance(data, str) or len(data) > MAX_ACTION_CHARS or not _HEX_DATA.fullmatch(data):
        raise ActionError("the transaction's `data` is not hex of a reasonable length")
    return Pay(action="pay", to=address(to), value=str(_number(fields.get("value"))), data=data)


def _number(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, str) and _HEX_NUMBER.fullmatch(value):
        return int(value, 16)
    if isinstance(value, bool | float | list | dict) or "ether" in str(value):
        raise ActionError(f"the transaction's `value` is no number of wei: {one_line(value)[:60]}")
    return amount(value)


def _result(fields: Mapping[str, Any]) -> Found:
    found: dict[str, Any] = {}
    _collect(fields, found, 0)
    if not found:
        raise ActionError("the script's result has no fields")
    return Found(found)


def _collect(fields: Mapping[str, Any], found: dict[str, Any], depth: int) -> None:
    """Fields by name, those of inner objects too; an outer one wins over an inner one of the same name."""
    inner = []
    for name, value in fields.items():
        if isinstance(value, dict):
            inner.append(value)
        elif value is not None and name not in found:
            if len(found) >= MAX_FIELDS or len(str(value)) > MAX_FIELD_CHARS:
                raise ActionError("the script's result is too large")
            found[str(name)[:100]] = str(value) if isinstance(value, float) else value
    for value in inner:
        if depth >= MAX_NESTING:
            raise ActionError("the script's result is nested too deeply")
        _collect(value, found, depth + 1)
