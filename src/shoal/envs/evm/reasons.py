"""Why a call reverted, in the contract's own words."""

from __future__ import annotations

import re

from eth_abi.abi import decode
from eth_abi.exceptions import DecodingError

MAX_REASON_CHARS = 200
ERROR_SELECTOR = "08c379a0"
PANIC_SELECTOR = "4e487b71"
_OUTPUT = re.compile(r"0x([0-9a-fA-F]*)")


def revert_data(text: str) -> bytes:
    """The bytes that a reverted call returned, out of a backend's error text; empty where there are none."""
    for found in _OUTPUT.finditer(text):
        if found[1].startswith((ERROR_SELECTOR, PANIC_SELECTOR)):
            return bytes.fromhex(found[1][: len(found[1]) // 2 * 2])
    return b""


def read_reason(text: str) -> str:
    """The reason inside a backend's error text, which holds the returned bytes as hex, or says what went wrong."""
    for found in _OUTPUT.finditer(text):
        if found[1].startswith(ERROR_SELECTOR):
            try:
                return str(decode(["string"], bytes.fromhex(found[1][8:]))[0])[:MAX_REASON_CHARS]
            except (DecodingError, ValueError):
                return "reverted"
        if found[1].startswith(PANIC_SELECTOR):
            return "arithmetic error"
    return "not enough BNB" if "fund" in text.lower() else "reverted"
