"""What one node says to others is signed: its events, and the trials that it ran for somebody.

An event's node is the id of the key that signs it; a trial's signature names the entry that was tried, so that evidence
for one entry cannot be handed in for another.

Invariants: the domain text keeps an event's signature from being one of anything else; what is verified is the
canonical encoding of what was decoded, the very bytes of which the event's id is the hash; an event that `verified`
returns says who recorded it.
"""

from __future__ import annotations

import msgspec

from shoal.errors import RecordError
from shoal.fabric.identity import Identity, node_id_of, verify
from shoal.memory.events import Event
from shoal.memory.records import Trial
from shoal.protocol.codec import Record
from shoal.protocol.roster import KEY_BYTES, SIGNATURE_BYTES

EVENT_DOMAIN = b"shoal memory event 1:"
TRIAL_DOMAIN = b"shoal memory trial 1:"


class ForgedEvent(RecordError):
    """An event or a trial that was not signed by the key it speaks for."""


class SignedEvent(Record, frozen=True):
    """An event with the signature of the node that recorded it."""

    event: Event
    signer: bytes
    """Raw Ed25519 public key."""
    signature: bytes

    def check(self) -> None:
        self.event.check()
        _check_sizes(self.signer, self.signature)


class SignedTrial(Record, frozen=True):
    """A trial with the signature of the node that ran it."""

    trial: Trial
    signer: bytes
    signature: bytes

    def check(self) -> None:
        self.trial.check()
        _check_sizes(self.signer, self.signature)


def sign_event(identity: Identity, event: Event) -> SignedEvent:
    """The event with the identity's signature."""
    signature = identity.sign(EVENT_DOMAIN + _canonical(event))
    return SignedEvent(event=event, signer=identity.public_key, signature=signature)


def verified(signed: SignedEvent) -> Event:
    """The event, if its own node signed it.

    Raises:
        ForgedEvent: it did not.
        RecordError: the event breaks a bound.
    """
    signed.check()
    if node_id_of(signed.signer) != signed.event.node:
        raise ForgedEvent(f"an event of node {signed.event.node[:40]!r} is signed by another.")
    if not verify(signed.signer, EVENT_DOMAIN + _canonical(signed.event), signed.signature):
        raise ForgedEvent(f"an event's signature is not that of node {signed.event.node[:40]!r}.")
    return signed.event


def sign_trial(identity: Identity, entry: str, trial: Trial) -> SignedTrial:
    """A trial of the entry with this id, signed by whoever ran it."""
    signature = identity.sign(_trial_bytes(entry, trial))
    return SignedTrial(trial=trial, signer=identity.public_key, signature=signature)


def check_trial(entry: str, trial: Trial, signer: bytes, signature: bytes) -> None:
    """Raise `ForgedEvent` unless `signer` says that it ran this trial of this entry."""
    if not verify(signer, _trial_bytes(entry, trial), signature):
        raise ForgedEvent("a trial's signature is not its runner's.")


def _trial_bytes(entry: str, trial: Trial) -> bytes:
    return TRIAL_DOMAIN + _canonical((entry, trial))


def _canonical(value: object) -> bytes:
    return msgspec.msgpack.encode(value, order="sorted")


def _check_sizes(signer: bytes, signature: bytes) -> None:
    if len(signer) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        raise RecordError("a signer's key or signature has the wrong length.")
