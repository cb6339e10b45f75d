"""How a node presents itself: join request and answer.

Invariants: a join request proves two things, possession of the run's join secret (`proof`, a keyed BLAKE3 over the
fields before it) and of the node's private key (`signature` over all fields before it); it names its own protocol
version first, so that a mismatch can be answered in words. The roster's full NodeRecord builds on this.
"""

from __future__ import annotations

from typing import Literal

from shoal.errors import RecordError
from shoal.protocol.codec import Record

NodeRole = Literal["worker", "learner", "observer"]

RefusalCode = Literal["version", "secret", "signature", "run", "clock", "replay", "role", "full", "ended"]


class JoinRequest(Record, frozen=True):
    """A node asks to take part in a run."""

    protocol_version: int
    run: str
    role: NodeRole
    name: str
    """For people: host name and process id, or what the user chose."""
    public_key: bytes
    nonce: bytes
    """16 random bytes, so that a recorded request is worth nothing later."""
    sent_at: float
    """Unix seconds on the asker's clock."""
    proof: bytes
    signature: bytes
    device: str = "cpu"
    threads: int = 1

    def check(self) -> None:
        if len(self.public_key) != 32 or len(self.nonce) != 16 or len(self.proof) != 32 or len(self.signature) != 64:
            raise RecordError("a join request's key, nonce, proof or signature has the wrong length.")
        if len(self.name) > 256 or len(self.device) > 64 or len(self.run) > 256:
            raise RecordError("a join request's name, device or run is too long.")


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
