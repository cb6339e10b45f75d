"""Records to signed bytes and back.

Invariants: a signature covers a domain text before the record's bytes, so that a grant is never taken for a node
record, nor either for an envelope; what is verified is the bytes that came, and the record is read from those; a
record that `verified` returns has passed its own check and is signed by the key it should be.
"""

from __future__ import annotations

from typing import TypeVar

from blake3 import blake3

from shoal.errors import RecordError
from shoal.fabric.identity import Identity, verify
from shoal.protocol.codec import decode, encode
from shoal.protocol.collective import StepDone
from shoal.protocol.ledger import MAX_ENTRY_BYTES, LedgerEntry
from shoal.protocol.roster import (
    MARK_BYTES,
    MAX_GRANT_BYTES,
    MAX_NODE_RECORD_BYTES,
    MAX_SIGNED_BYTES,
    Grant,
    NodeRecord,
    RevocationList,
    SignedRecord,
)

T = TypeVar("T", NodeRecord, Grant, RevocationList, LedgerEntry, StepDone)

DOMAINS: dict[type, bytes] = {
    NodeRecord: b"shoal node record 1:",
    Grant: b"shoal grant 1:",
    RevocationList: b"shoal revocation list 1:",
    LedgerEntry: b"shoal ledger entry 1:",
    StepDone: b"shoal step done 1:",
}
LIMITS: dict[type, int] = {
    NodeRecord: MAX_NODE_RECORD_BYTES,
    Grant: MAX_GRANT_BYTES,
    RevocationList: MAX_SIGNED_BYTES,
    LedgerEntry: MAX_ENTRY_BYTES,
    StepDone: MAX_GRANT_BYTES,
}


class ForgedRecord(RecordError):
    """A record that was not signed by the key it speaks for."""


def sign(identity: Identity, record: NodeRecord | Grant | RevocationList | LedgerEntry | StepDone) -> SignedRecord:
    """The record's bytes with the identity's signature."""
    record.check()
    body = encode(record)
    return SignedRecord(body, identity.public_key, identity.sign(DOMAINS[type(record)] + body))


def verified(signed: SignedRecord, kind: type[T]) -> T:
    """The record in `signed`, its signature checked against `signed.signer`.

    Whether that signer may say such a thing is the caller's to check.

    Raises:
        ForgedRecord: the signature is not the signer's.
        RecordError: too large, malformed or out of range.
    """
    signed.check()
    if len(signed.body) > LIMITS[kind]:
        raise RecordError(f"a {kind.__name__} of {len(signed.body)} bytes exceeds {LIMITS[kind]} bytes.")
    if not verify(signed.signer, DOMAINS[kind] + signed.body, signed.signature):
        raise ForgedRecord(f"a {kind.__name__}'s signature is not its signer's.")
    return decode(signed.body, kind, max_bytes=LIMITS[kind])


def mark(signed: SignedRecord) -> bytes:
    """Which record this is, in a few bytes. Two signatures of one body are one record."""
    return blake3(signed.body).digest(MARK_BYTES)
