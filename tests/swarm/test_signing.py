"""Signed records: bytes that only their key's owner can make, and only as one kind of record."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarm_nodes import NOW, ROOT, RUN, grant, identity, profile, signed

from shoal.errors import RecordError
from shoal.protocol.codec import decode, encode
from shoal.protocol.roster import (
    MAX_DELAYS,
    Bundle,
    Digest,
    DigestEntry,
    Evidence,
    Grant,
    NodeRecord,
    Revocation,
    RevocationList,
    SignedRecord,
    SyncReply,
    SyncRequest,
)
from shoal.swarm.signing import ForgedRecord, sign, verified

NODE = identity("node")


def test_round_trip() -> None:
    record = profile(NODE, delays={identity("other").node_id: 0.05}, skills="arithmetic", region="eu")
    assert verified(sign(NODE, record), NodeRecord) == record
    assert verified(grant(NODE), Grant).subject == NODE.public_key


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_changed_byte_is_noticed(where: int, change: int) -> None:
    original = signed(NODE)
    parts = [bytearray(original.body), bytearray(original.signer), bytearray(original.signature)]
    position = where % sum(map(len, parts))
    for part in parts:
        if position < len(part):
            part[position] ^= change
            break
        position -= len(part)
    with pytest.raises(ForgedRecord):
        verified(SignedRecord(*map(bytes, parts)), NodeRecord)


def test_one_kind_is_not_taken_for_another() -> None:
    with pytest.raises(ForgedRecord):
        verified(grant(NODE), NodeRecord)
    with pytest.raises(ForgedRecord):
        verified(signed(NODE), Grant)
    body = encode(profile(NODE))
    with pytest.raises(ForgedRecord):
        verified(SignedRecord(body, NODE.public_key, NODE.sign(body)), NodeRecord)


@pytest.mark.parametrize(
    "fields",
    [
        {"sequence": 0},
        {"sequence": 2**63},
        {"issued_at": float("nan")},
        {"ttl_s": -1.0},
        {"ttl_s": 601.0},
        {"roles": ("worker", "worker")},
        {"skills": "x" * 4097},
        {"price_usd_per_hour": float("inf")},
        {"memory_bytes": -1},
        {"delays": {"no node": 1.0}},
        {"delays": {"0" * 16: -1.0}},
        {"delays": {f"{n:016x}": 1.0 for n in range(MAX_DELAYS + 1)}},
        {"sealing_key": b"short"},
        {"run": ""},
    ],
)
def test_records_out_of_range(fields: dict[str, object]) -> None:
    with pytest.raises(RecordError):
        sign(NODE, profile(NODE, **fields))
    body = encode(profile(NODE, **fields)) if fields.get("sequence") != 2**63 else b"\x80"
    forced = SignedRecord(body, NODE.public_key, NODE.sign(b"shoal node record 1:" + body))
    with pytest.raises(RecordError):
        verified(forced, NodeRecord)


def test_largest_record_fits_its_limit() -> None:
    delays = {f"{n:016x}": 59.123456789 for n in range(MAX_DELAYS)}
    record = profile(
        NODE, skills="é" * 4096, name="n" * 256, device="d" * 64, region="r" * 64, run="r" * 256, delays=delays
    )
    assert verified(sign(NODE, record), NodeRecord) == record


@given(st.binary(max_size=300))
def test_hostile_bytes(data: bytes) -> None:
    for kind in (Bundle, SyncRequest, SyncReply, NodeRecord, Grant, RevocationList, Digest):
        with pytest.raises(RecordError):
            decode(data + b"\xc1", kind)
    try:
        verified(SignedRecord(data, data[:32], data[:64]), NodeRecord)
    except RecordError:
        return
    pytest.fail("noise was taken for a record")


def test_bounds_of_what_holds_other_records() -> None:
    entry = DigestEntry(NODE.public_key, {1: b"m" * 8})
    bad = [
        Bundle(records=(signed(NODE),) * 1025),
        Bundle(records=(SignedRecord(b"", b"", b""),)),
        Bundle(evidence=(Evidence(signed(NODE), signed(NODE)),)),
        Digest(nodes=(entry,) * 8193),
        Digest(nodes=(msgspec.structs.replace(entry, window={1: b"m"}),)),
        Digest(nodes=(msgspec.structs.replace(entry, window={0: b"m" * 8}),)),
        Digest(nodes=(msgspec.structs.replace(entry, window=dict.fromkeys(range(1, 20), b"m" * 8)),)),
        SyncRequest(summary=b"short"),
        RevocationList(run=RUN, sequence=1, issued_at=NOW, revocations=(Revocation(b"s" * 16, b"k" * 32, NOW),)),
        RevocationList(run=RUN, sequence=1, issued_at=NOW, revocations=(Revocation(b"", b"", NOW),)),
    ]
    for record in bad:
        with pytest.raises(RecordError):
            decode(encode(record), type(record))
    good = SyncRequest(summary=b"s" * 16, digest=Digest(nodes=(entry,)), bundle=Bundle(records=(signed(NODE),)))
    assert decode(encode(good), SyncRequest) == good
    assert ROOT.public_key != NODE.public_key
