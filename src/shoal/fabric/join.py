"""Asking to take part in a run, and deciding whether to say yes. Pure: time and memory are arguments.

    proof      = BLAKE3 keyed with (a key derived from) the ticket's secret, over every field but proof and signature
    signature  = Ed25519 of the node's key, over the same fields and the proof
    invitation = the first bytes of another BLAKE3 derived from the secret: its name, which opens nothing

Invariants: only who knows the secret can make a proof, and only the key's owner a signature over it, so that a
request seen on the wire cannot be turned into another node's; a request is admitted once and only while it is young.
Of several things wrong the one named is the first that the user should mend: version, run, secret, signature, clock.
Whether the invitation still admits anybody is the caller's to decide (`swarm.invites`).
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Container

import msgspec
from blake3 import blake3

from shoal import PROTOCOL_VERSION
from shoal.errors import RecordError
from shoal.fabric.envelope import NONCE_BYTES
from shoal.fabric.identity import Identity, verify
from shoal.fabric.ticket import Ticket
from shoal.protocol.codec import decode
from shoal.protocol.node import JoinRequest, RefusalCode
from shoal.protocol.roster import SHORT_MARK_BYTES, SwarmRole

MAX_JOIN_BYTES = 4096
JOIN_WINDOW_S = 300.0
"""How far the asker's clock may be from ours. Whoever keeps the seen nonces keeps each for twice as long."""

PROOF_CONTEXT = "shoal 2025 join proof"
INVITATION_CONTEXT = "shoal 2026 invitation name"
SIGNATURE_DOMAIN = b"shoal join request 1"

REASONS: dict[RefusalCode, str] = {
    "version": "this node and the coordinator run different versions of Shoal; install the same one on both.",
    "run": "the ticket is for another run than the one this coordinator serves; ask for a fresh ticket.",
    "secret": "the ticket's secret is not one of this run's, or was taken back; ask for a fresh ticket.",
    "signature": "the request is not signed by the key it names; if this happens again, it was changed on its way.",
    "clock": f"the clocks of the two machines differ by more than {JOIN_WINDOW_S:.0f} s; set them (NTP) and try again.",
    "replay": "this very request was made before; join again.",
    "role": "the ticket does not admit nodes in this role; ask for one that does (shoal ticket RUN --role ROLE).",
    "expired": "the ticket has expired; ask for a fresh ticket.",
    "used": "the ticket has been used as often as it may be; ask for a fresh ticket.",
    "revoked": "what this node was granted has been taken back by the run's owner.",
    "full": "the run has as many nodes as it takes; try again later.",
    "ended": "the run is over.",
}
"""What each refusal says to the person who joins."""


def make_join_request(
    identity: Identity,
    ticket: Ticket,
    role: SwarmRole,
    name: str,
    *,
    now: float,
    device: str = "cpu",
    threads: int = 1,
    renews: bool = False,
) -> JoinRequest:
    """A signed request of `identity` to join the ticket's run; `now` is Unix seconds."""
    unproven = JoinRequest(
        protocol_version=PROTOCOL_VERSION,
        run=ticket.run,
        role=role,
        name=name[:256],
        public_key=identity.public_key,
        nonce=secrets.token_bytes(NONCE_BYTES),
        sent_at=now,
        proof=b"",
        signature=b"",
        device=device[:64],
        threads=threads,
        invitation=invitation_of(ticket.secret),
        renews=renews,
    )
    proven = msgspec.structs.replace(unproven, proof=_proof(unproven, ticket.secret))
    return msgspec.structs.replace(proven, signature=identity.sign(_signed(proven)))


def read_join_request(data: bytes) -> JoinRequest | RefusalCode:
    """The join request in `data`, or `"version"` if another version of Shoal made it, whatever its shape.

    Raises:
        RecordError: it is no join request at all.
    """
    if len(data) > MAX_JOIN_BYTES:
        raise RecordError(f"a join request of {len(data)} bytes exceeds the limit of {MAX_JOIN_BYTES} bytes.")
    try:
        version = msgspec.msgpack.decode(data, type=_AnyVersion).protocol_version
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"bytes that should be a join request are not: {error}.") from None
    if version != PROTOCOL_VERSION:
        return "version"
    return decode(data, JoinRequest, max_bytes=MAX_JOIN_BYTES)


def check_join_request(
    request: JoinRequest,
    *,
    run: str,
    secret: bytes,
    now: float,
    seen_nonces: Container[bytes],
    sender_key: bytes = b"",
) -> RefusalCode | None:
    """Why to refuse, or `None`. The caller then remembers `request.nonce`.

    Args:
        sender_key: who signed the envelope that brought the request, if there was one; must be the asker itself.
    """
    if request.protocol_version != PROTOCOL_VERSION:
        return "version"
    if request.run != run:
        return "run"
    if not hmac.compare_digest(request.proof, _proof(request, secret)):
        return "secret"
    if sender_key not in (b"", request.public_key):
        return "signature"
    if not verify(request.public_key, _signed(request), request.signature):
        return "signature"
    if not abs(request.sent_at - now) <= JOIN_WINDOW_S:  # Written so that a NaN is refused.
        return "clock"
    if request.nonce in seen_nonces:
        return "replay"
    return None


def invitation_of(secret: bytes) -> bytes:
    """The name of the invitation with this secret: tells it from others and does not give the secret away."""
    return blake3(secret, derive_key_context=INVITATION_CONTEXT).digest(SHORT_MARK_BYTES)


class _AnyVersion(msgspec.Struct):
    """The one field that every version's join request has."""

    protocol_version: int


def _proof(request: JoinRequest, secret: bytes) -> bytes:
    key = blake3(secret, derive_key_context=PROOF_CONTEXT).digest()
    return blake3(_canonical(request), key=key).digest()


def _signed(request: JoinRequest) -> bytes:
    return SIGNATURE_DOMAIN + request.proof + _canonical(request)


def _canonical(request: JoinRequest) -> bytes:
    return msgspec.msgpack.encode(msgspec.structs.replace(request, proof=b"", signature=b""))
