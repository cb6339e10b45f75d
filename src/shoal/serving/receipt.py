"""Signed receipts: what was served by which weights, on which node, how fast; anybody can check one.

Invariant: the signature covers the receipt's canonical JSON (sorted keys, no white space) behind a domain text, so it
is never taken for anything else that the node signs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blake3 import blake3

from shoal.errors import RecordError
from shoal.fabric.identity import Identity, node_id_of, verify

DOMAIN = b"shoal serving receipt 1:"
MAX_RECEIPT_BYTES = 1 << 20


def weights_hash(files: list[Path]) -> str:
    """BLAKE3 over the weight files' own hashes, in the order of their names."""
    whole = blake3()
    for path in sorted(files):
        one = blake3(max_threads=1)
        one.update_mmap(path)
        whole.update(one.digest())
    return whole.hexdigest()


def sign(identity: Identity, facts: dict[str, Any]) -> dict[str, Any]:
    """The receipt that says `facts`, which are JSON values."""
    signature = identity.sign(DOMAIN + _canonical(facts))
    return {
        "facts": facts,
        "node": identity.node_id,
        "public_key": identity.public_key.hex(),
        "signature": signature.hex(),
    }


def verified(text: str | bytes) -> dict[str, Any]:
    """A receipt's facts.

    Raises:
        RecordError: it is malformed, or the signature is not its node's.
    """
    if len(text) > MAX_RECEIPT_BYTES:
        raise RecordError(f"a receipt exceeds {MAX_RECEIPT_BYTES} bytes.")
    try:
        receipt = json.loads(text)
        facts, key = receipt["facts"], bytes.fromhex(receipt["public_key"])
        signed = verify(key, DOMAIN + _canonical(facts), bytes.fromhex(receipt["signature"]))
        genuine = signed and receipt["node"] == node_id_of(key) and isinstance(facts, dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RecordError("this is no receipt.") from None
    if not genuine:
        raise RecordError("a receipt's signature is not its node's.")
    return dict(facts)


def _canonical(facts: Any) -> bytes:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
