"""Who is here and what they may do: the records that nodes sign and spread.

    NodeRecord       a node about itself             signed by the node
    Grant            what a key may do in a run      signed by the run's root, the coordinator's key
    RevocationList   which grants no longer hold     signed by the same
    Evidence         two records that convict their signer of saying two things at once

Invariants: what travels is a `SignedRecord`: the exact bytes that were signed, never an encoding made anew. Every
record names its run, so that it means nothing in another. Sequence numbers only rise; two different records with the
same one are equivocation. All sizes are bounded. This room only describes; `swarm` signs and verifies.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec

from shoal.errors import RecordError
from shoal.protocol.codec import Record

KEY_BYTES = 32
SIGNATURE_BYTES = 64
MARK_BYTES = 16
SHORT_MARK_BYTES = 8
SERIAL_BYTES = 16
MIN_SECRET_BYTES = 16

MAX_SIGNED_BYTES = 256 * 1024
"""The largest signed record: a full revocation list."""

MAX_NODE_RECORD_BYTES = 12 * 1024
MAX_GRANT_BYTES = 1024
MAX_TTL_S = 600.0
"""No record outlives its last renewal by more than this."""

MAX_DELAYS = 64
"""Peers to which a record states the delay: those that matter to it, not the whole run."""

MAX_DELAY_S = 60.0
MAX_SKILLS_CHARS = 4096
MAX_REVOCATIONS = 2048
MAX_DIGEST = 8192
MAX_WINDOW = 16
MAX_BUNDLE = 1024
"""Announcements in one bundle; who lacks more asks again."""

MAX_USES = 4096
MAX_SECRETS = 4096
MAX_SEQUENCE = 2**63 - 1

SwarmRole = Literal["learner", "worker", "stage", "agent", "observer"]
Billing = Literal["per_use", "per_hour"]
"""`per_hour`: the machine costs while it is held, busy or not; `per_use`: only while it works."""

NODE_ID = re.compile(r"[0-9a-f]{16}")


class SignedRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Exact bytes, who signed them, and the signature; the domain that was signed says what kind of record it is."""

    body: bytes
    signer: bytes
    """Raw Ed25519 public key."""
    signature: bytes

    def check(self) -> None:
        if len(self.signer) != KEY_BYTES or len(self.signature) != SIGNATURE_BYTES:
            raise RecordError("a signed record's key or signature has the wrong length.")
        if not 0 < len(self.body) <= MAX_SIGNED_BYTES:
            raise RecordError(f"a signed record's body of {len(self.body)} bytes is empty or too long.")


class NodeRecord(Record, frozen=True):
    """One node about itself. Numbers it has not measured are 0."""

    run: str
    public_key: bytes
    sealing_key: bytes
    """Raw X25519 public key: to it is sealed what routers must not read."""
    sequence: int
    issued_at: float
    """Unix seconds on the node's clock."""
    ttl_s: float
    """How long the record holds without being renewed; 0 says goodbye."""
    protocol_version: int
    software: str
    """Version of Shoal."""
    roles: tuple[SwarmRole, ...] = ()
    name: str = ""
    """For people."""
    device: str = "cpu"
    memory_bytes: int = 0
    tokens_per_s: float = 0.0
    num_layers: int = 0
    """Layers of the run's model that it can hold."""
    skills: str = ""
    """What it is good at, in words; a claim, weighed as one."""
    price_usd_per_hour: float = 0.0
    billing: Billing = "per_use"
    region: str = ""
    uplink_bytes_per_s: float = 0.0
    downlink_bytes_per_s: float = 0.0
    delays: dict[str, float] = {}
    """Node id -> round-trip seconds."""

    def check(self) -> None:
        _check_run(self.run)
        if len(self.public_key) != KEY_BYTES or len(self.sealing_key) != KEY_BYTES:
            raise RecordError("a node record's key has the wrong length.")
        _check_sequence(self.sequence)
        _check_range("issued_at", self.issued_at, 1e12)
        _check_range("ttl_s", self.ttl_s, MAX_TTL_S)
        if not 0 <= self.protocol_version < 2**31 or len(self.software) > 64:
            raise RecordError("a node record's version is out of range or too long.")
        if len(set(self.roles)) != len(self.roles):
            raise RecordError("a node record names a role twice.")
        if len(self.name) > 256 or len(self.device) > 64 or len(self.region) > 64:
            raise RecordError("a node record's name, device or region is too long.")
        if len(self.skills) > MAX_SKILLS_CHARS:
            raise RecordError(f"a node record's skills exceed {MAX_SKILLS_CHARS} characters.")
        _check_range("memory_bytes", self.memory_bytes, 2**60)
        _check_range("tokens_per_s", self.tokens_per_s, 1e12)
        _check_range("num_layers", self.num_layers, 100_000)
        _check_range("price_usd_per_hour", self.price_usd_per_hour, 1e9)
        _check_range("uplink_bytes_per_s", self.uplink_bytes_per_s, 1e15)
        _check_range("downlink_bytes_per_s", self.downlink_bytes_per_s, 1e15)
        if len(self.delays) > MAX_DELAYS:
            raise RecordError(f"a node record states delays to more than {MAX_DELAYS} nodes.")
        for node_id, delay_s in self.delays.items():
            if not NODE_ID.fullmatch(node_id):
                raise RecordError("a node record states the delay to something that is no node id.")
            _check_range("a delay", delay_s, MAX_DELAY_S)


class Grant(Record, frozen=True):
    """`subject` may act in `roles` in `run`, from `not_before` until `expires_at`."""

    run: str
    subject: bytes
    """Public key of the node that may."""
    roles: tuple[SwarmRole, ...]
    issuer: bytes
    not_before: float
    expires_at: float
    serial: bytes

    def check(self) -> None:
        _check_run(self.run)
        if len(self.subject) != KEY_BYTES or len(self.issuer) != KEY_BYTES or len(self.serial) != SERIAL_BYTES:
            raise RecordError("a grant's key or serial has the wrong length.")
        if not self.roles or len(set(self.roles)) != len(self.roles):
            raise RecordError("a grant gives no role, or one twice.")
        _check_range("not_before", self.not_before, 1e12)
        _check_range("expires_at", self.expires_at, 1e12)
        if self.expires_at <= self.not_before:
            raise RecordError("a grant ends before it begins.")


class Revocation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Either one grant, by serial, or all grants of one key. Dropped from the list after `until`."""

    serial: bytes
    subject: bytes
    until: float
    """Unix seconds; when every grant that this revokes has expired by itself."""

    def check(self) -> None:
        by_serial = len(self.serial) == SERIAL_BYTES and not self.subject
        by_subject = len(self.subject) == KEY_BYTES and not self.serial
        if not (by_serial or by_subject):
            raise RecordError("a revocation names neither one serial nor one key.")
        _check_range("until", self.until, 1e12)


class RevocationList(Record, frozen=True):
    """All revocations in force; the list with the highest sequence number replaces the others."""

    run: str
    sequence: int
    issued_at: float
    revocations: tuple[Revocation, ...]

    def check(self) -> None:
        _check_run(self.run)
        _check_sequence(self.sequence)
        _check_range("issued_at", self.issued_at, 1e12)
        if len(self.revocations) > MAX_REVOCATIONS:
            raise RecordError(f"a list revokes more than {MAX_REVOCATIONS} things.")
        for revocation in self.revocations:
            revocation.check()


class Evidence(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Two different node records of one key with one sequence number, both with valid signatures."""

    first: SignedRecord
    second: SignedRecord

    def check(self) -> None:
        self.first.check()
        self.second.check()
        if self.first.signer != self.second.signer or self.first.body == self.second.body:
            raise RecordError("evidence of equivocation needs two different records of one signer.")


class Bundle(Record, frozen=True):
    """What one node tells others at once. Order within it: revocations, then grants, evidence, records."""

    records: tuple[SignedRecord, ...] = ()
    grants: tuple[SignedRecord, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    revocations: SignedRecord | None = None

    def check(self) -> None:
        if max(len(self.records), len(self.grants), len(self.evidence)) > MAX_BUNDLE:
            raise RecordError(f"a bundle holds more than {MAX_BUNDLE} records of a kind.")
        for signed in (*self.records, *self.grants):
            signed.check()
        for proof in self.evidence:
            proof.check()
        if self.revocations is not None:
            self.revocations.check()


class DigestEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a node knows of one key."""

    key: bytes
    window: dict[int, bytes]
    """The newest sequence numbers known, and the first bytes of BLAKE3 of each's record; empty for an equivocator."""

    @property
    def newest(self) -> int:
        """The highest sequence number, 0 for an equivocator."""
        return max(self.window, default=0)

    def check(self) -> None:
        if len(self.key) != KEY_BYTES or len(self.window) > MAX_WINDOW:
            raise RecordError("a digest has an entry with a wrong key, or with too many records.")
        if any(not 1 <= n <= MAX_SEQUENCE or len(mark) != SHORT_MARK_BYTES for n, mark in self.window.items()):
            raise RecordError("a digest has an entry with a wrong sequence number or mark.")


class Digest(Record, frozen=True):
    """What a node knows, in short, so that another can tell what it lacks."""

    nodes: tuple[DigestEntry, ...]
    revocations: int = 0
    """Sequence number of its revocation list; 0 for none."""

    def check(self) -> None:
        if len(self.nodes) > MAX_DIGEST:
            raise RecordError(f"a digest lists more than {MAX_DIGEST} nodes.")
        if not 0 <= self.revocations < 2**63:
            raise RecordError("a digest's revocation number is out of range.")
        for entry in self.nodes:
            entry.check()


class SyncRequest(Record, frozen=True):
    """Compare notes: with the summary alone, or with a digest and what the other is known to lack."""

    summary: bytes
    digest: Digest | None = None
    bundle: Bundle = Bundle()

    def check(self) -> None:
        if len(self.summary) != MARK_BYTES:
            raise RecordError("a sync request's summary has the wrong length.")
        if self.digest is not None:
            self.digest.check()
        self.bundle.check()


class SyncReply(Record, frozen=True):
    """What the asker's digest shows that it lacks, and the answerer's digest where the summaries differ."""

    digest: Digest | None = None
    bundle: Bundle = Bundle()

    def check(self) -> None:
        if self.digest is not None:
            self.digest.check()
        self.bundle.check()


class JoinSecret(Record, frozen=True):
    """One secret that tickets carry: how many nodes may use it, for which roles, until when."""

    secret: bytes
    roles: tuple[SwarmRole, ...]
    max_uses: int
    issued_at: float
    expires_at: float
    used_by: tuple[bytes, ...] = ()
    """Public keys of the nodes that joined with it."""

    def check(self) -> None:
        if not MIN_SECRET_BYTES <= len(self.secret) <= 64:
            raise RecordError("a join secret has the wrong length.")
        if not self.roles or not 1 <= self.max_uses <= MAX_USES or len(self.used_by) > self.max_uses:
            raise RecordError("a join secret gives no role, or its number of uses is out of range.")
        if any(len(key) != KEY_BYTES for key in self.used_by):
            raise RecordError("a join secret was used by something that is no key.")
        _check_range("issued_at", self.issued_at, 1e12)
        _check_range("expires_at", self.expires_at, 1e12)


class JoinSecrets(Record, frozen=True):
    """All join secrets of a run, as the coordinator keeps them between starts."""

    run: str
    secrets: tuple[JoinSecret, ...]

    def check(self) -> None:
        _check_run(self.run)
        if len(self.secrets) > MAX_SECRETS:
            raise RecordError(f"a run keeps more than {MAX_SECRETS} join secrets.")
        for secret in self.secrets:
            secret.check()


def _check_run(run: str) -> None:
    if not run or len(run) > 256:
        raise RecordError("a record's run is empty or too long.")


def _check_sequence(sequence: int) -> None:
    if not 1 <= sequence <= MAX_SEQUENCE:
        raise RecordError(f"a sequence number {sequence} is not between 1 and 2^63.")


def _check_range(name: str, value: float, most: float) -> None:
    if not (math.isfinite(value) and 0 <= value <= most):
        raise RecordError(f"{name} = {value} is not between 0 and {most:g}.")
