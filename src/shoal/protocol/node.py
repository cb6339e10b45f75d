"""How a node joins a run, and what its owner may ask of the coordinator: requests and answers.

    JoinRequest ──▶ JoinReply             any node with a ticket: may I, and what is there to do?
    TicketRequest ──▶ TicketReply         the run's owner: another invitation
    RevokeRequest ──▶ RevokeReply         the run's owner: take back what nodes were granted, or an invitation

Invariants: a join request proves two things, possession of an invitation's secret (`proof`, a keyed BLAKE3 over the
fields before it) and of the node's private key (`signature` over all fields before it); it names its own protocol
version first, so that a mismatch can be answered in words. What a node says of itself afterwards is the roster's
NodeRecord.
"""

from __future__ import annotations

from typing import Literal

from shoal.errors import RecordError
from shoal.protocol.codec import Record
from shoal.protocol.roster import MAX_USES, SHORT_MARK_BYTES, SignedRecord, SwarmRole

RefusalCode = Literal[
    "version", "secret", "signature", "run", "clock", "replay", "role", "expired", "used", "revoked", "full", "ended"
]

MAX_NAMES = 1024
"""Nodes or invitations named in one request of the owner."""


class JoinRequest(Record, frozen=True):
    """A node asks to take part in a run."""

    protocol_version: int
    run: str
    role: SwarmRole
    name: str
    """For people: host name and process id, or what the user chose."""
    public_key: bytes
    nonce: bytes
    """16 random bytes, so that a recorded request is worth nothing later."""
    sent_at: float
    """Unix seconds on the asker's clock; rises with each request of a key."""
    proof: bytes
    signature: bytes
    device: str = "cpu"
    threads: int = 1
    invitation: bytes = b""
    """Which secret the proof is made with (`fabric.join.invitation_of`), so that it need not be searched for."""
    renews: bool = False
    """The same process asks again, because its grant ends or the coordinator was restarted: what it holds is kept."""

    def check(self) -> None:
        if len(self.public_key) != 32 or len(self.nonce) != 16 or len(self.proof) != 32 or len(self.signature) != 64:
            raise RecordError("a join request's key, nonce, proof or signature has the wrong length.")
        if len(self.name) > 256 or len(self.device) > 64 or len(self.run) > 256:
            raise RecordError("a join request's name, device or run is too long.")
        if len(self.invitation) != SHORT_MARK_BYTES:
            raise RecordError("a join request does not say which invitation it was made with.")


class JoinReply(Record, frozen=True):
    """Admission, or a refusal that says why."""

    accepted: bool
    code: RefusalCode | None = None
    reason: str = ""
    node_id: str = ""
    learner_key: bytes = b""
    """Raw public key that signs this run's snapshots."""
    spec: bytes = b""
    """MessagePack of the `WorkSpec` the worker acts by."""
    grants: tuple[SignedRecord, ...] = ()
    """What the node may do, and what the learner may, so that its snapshots can be believed at once."""
    revocations: SignedRecord | None = None

    def check(self) -> None:
        if len(self.grants) > 2:
            raise RecordError("an answer to a join request carries more than two grants.")
        for signed in (*self.grants, *([self.revocations] if self.revocations is not None else [])):
            signed.check()


class TicketRequest(Record, frozen=True):
    """The owner asks for a ticket."""

    roles: tuple[SwarmRole, ...]
    uses: int
    life_s: float

    def check(self) -> None:
        if not self.roles or not 1 <= self.uses <= MAX_USES:
            raise RecordError("a ticket is asked for that admits nobody, or too many.")


class TicketReply(Record, frozen=True):
    """The secret that the ticket carries."""

    secret: bytes
    expires_at: float


class RevokeRequest(Record, frozen=True):
    """The owner takes back everything that these nodes were granted, and these invitations."""

    nodes: tuple[str, ...] = ()
    """Node ids, or names as the run shows them."""
    invitations: tuple[bytes, ...] = ()

    def check(self) -> None:
        if max(len(self.nodes), len(self.invitations)) > MAX_NAMES:
            raise RecordError(f"more than {MAX_NAMES} nodes or invitations are revoked at once.")
        if any(len(name) > 256 for name in self.nodes) or any(len(i) != SHORT_MARK_BYTES for i in self.invitations):
            raise RecordError("something that is no node and no invitation is revoked.")


class RevokeReply(Record, frozen=True):
    """What was taken back."""

    nodes: tuple[str, ...] = ()
    """Ids of the nodes."""
    num_invitations: int = 0
    admitted: tuple[str, ...] = ()
    """Ids of nodes that joined by the invitations taken back; what they were granted holds until it ends."""
    open_invitations: int = 0
    """Invitations by which the revoked nodes joined and others may still join: with a new key, so may their owners."""
