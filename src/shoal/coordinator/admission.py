"""Who may take part in a run: invitations, grants, and what was taken back; kept in the run's folder.

    ticket's secret ──▶ join request ──▶ admit ──▶ a grant, signed by the root (the coordinator's key)
    owner ──▶ invite, revoke ──▶ invites.json, revocations.bin (mode 0600)

Invariants: an invitation is noted as used, on disk, before the node hears that it is admitted, and what is revoked
stays so over restarts; a request of a key is admitted only if it is younger than the key's last one, so that an old
one played again does nothing, not even after a restart once the node itself is back; only the learner's own key is
ever granted `learner`, and it cannot be revoked.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import NamedTuple, TypeVar

from shoal.coordinator.rundir import RunDir
from shoal.errors import RecordError, RunError, StorageError
from shoal.fabric.identity import Identity, node_id_of
from shoal.fabric.join import check_join_request, invitation_of
from shoal.protocol.codec import decode, encode
from shoal.protocol.node import MAX_NAMES, JoinRequest, RefusalCode, RevokeReply, RevokeRequest
from shoal.protocol.roster import Bundle, JoinSecret, SignedRecord, SwarmRole
from shoal.swarm.grants import GrantBook, issue
from shoal.swarm.invites import InviteBook
from shoal.swarm.keyfile import read_private, write_private

INVITES, REVOCATIONS = "invites.json", "revocations.bin"

GRANT_LIFE_S = 24 * 3600.0
"""Nodes renew their grants by themselves; one that a revocation did not reach acts no longer than this."""

T = TypeVar("T")

KEPT_NONCES = 4096
KEPT_TIMES = 8192
"""Keys whose last request's time is remembered."""


class Revoked(NamedTuple):
    """What was taken back, and the list to spread if it changed."""

    reply: RevokeReply
    revocations: SignedRecord | None


class Admission:
    """One run's door.

    Args:
        root: the coordinator's identity.
        learner_key: public key of the one node that may train and publish.
        colocated: the learner samples, too.
    """

    def __init__(
        self,
        run: RunDir,
        root: Identity,
        learner_key: bytes,
        *,
        colocated: bool = False,
        grant_life_s: float = GRANT_LIFE_S,
    ) -> None:
        """
        Raises:
            StorageError: what was kept cannot be read, is damaged, or could be read by others.
        """
        self.learner_key = learner_key
        self.root = root
        self.grants = GrantBook(run.name, root.public_key)
        self._run = run
        self._learner_roles: tuple[SwarmRole, ...] = ("learner", "worker") if colocated else ("learner",)
        self._grant_life_s = grant_life_s
        self._nonces: dict[bytes, None] = {}
        self._last_sent: dict[bytes, float] = {}
        self.invites = self._read_invites()
        self._read_revocations()

    @classmethod
    def of(cls, run: RunDir, *, colocated: bool = False) -> Admission:
        """The door of the run in this folder, with the keys that lie there; they are made where there are none."""
        identities = run.path / "identity"
        root = Identity.load_or_create(identities / "coordinator")
        learner = Identity.load_or_create(identities / "learner")
        return cls(run, root, learner.public_key, colocated=colocated)

    # Joining

    def admit(self, asked: JoinRequest, sender_key: bytes, now: float) -> RefusalCode | None:
        """Admit who asks and write it down, or say why not. What it was granted: `grants_for`.

        Args:
            sender_key: who signed the envelope that brought the request.

        Raises:
            StorageError: it cannot be written down, so nobody was admitted.
        """
        invite = self.invites.find(asked.invitation)
        code = check_join_request(
            asked,
            run=self._run.name,
            secret=invite.secret if invite is not None else b"",
            now=now,
            seen_nonces=self._nonces,
            sender_key=sender_key,
        )
        if code in ("version", "run"):
            return code
        if invite is None:
            return "secret"
        key = asked.public_key
        if code is None and asked.sent_at <= self._last_sent.get(key, -1.0):
            code = "replay"
        if code is None and self.grants.is_revoked(key):
            code = "revoked"
        if code is None and asked.role == "learner" and key != self.learner_key:
            code = "role"
        if code is not None:
            return code
        known = key in invite.used_by
        denial = self.invites.spend(invite.secret, key, asked.role, now)
        if denial is not None:
            return denial.code if denial.code in ("expired", "used", "role") else "secret"
        if not known:
            self._write_invites()
        _remember(self._nonces, asked.nonce, None, KEPT_NONCES)
        _remember(self._last_sent, key, asked.sent_at, KEPT_TIMES)
        self._grant(key, self._learner_roles if asked.role == "learner" else (asked.role,), now)
        return None

    def grants_for(self, key: bytes, now: float) -> tuple[SignedRecord, ...]:
        """The node's own grant and the learner's."""
        self._grant(self.learner_key, self._learner_roles, now)
        found = [self.grants.presentable(each, now) for each in dict.fromkeys((key, self.learner_key))]
        return tuple(signed for signed in found if signed is not None)

    def _grant(self, key: bytes, roles: tuple[SwarmRole, ...], now: float) -> None:
        """Issue a grant, unless the key holds one that is good for half a life yet."""
        held = self.grants.until(key, frozenset(roles), now)
        if held - now < self._grant_life_s / 2:
            self.grants.sweep(now)
            self.grants.merge_grant(issue(self.root, self._run.name, key, roles, now, self._grant_life_s), now)

    # What the owner does

    def invite(self, roles: Iterable[SwarmRole], now: float, *, life_s: float, uses: int) -> JoinSecret:
        """A new invitation, written down.

        Raises:
            CapacityError: the run holds as many as it can.
            StorageError: it cannot be written down.
        """
        secret = self.invites.issue(roles, now, life_s=life_s, max_uses=uses)
        self._write_invites()
        invite = self.invites.find(invitation_of(secret))
        assert invite is not None
        return invite

    def withdraw(self, invitation: bytes) -> JoinSecret | None:
        """Take an invitation back, written down; gives it, if it was there."""
        invite = self.invites.withdraw(invitation)
        if invite is not None:
            self._write_invites()
        return invite

    def revoke(self, asked: RevokeRequest, names: Mapping[str, Collection[bytes]], now: float) -> Revoked:
        """Take back what nodes were granted, and invitations, for good.

        Args:
            names: public keys by the names that the run shows, which nodes choose themselves.

        Raises:
            RunError: a node or invitation is not this run's, or could be several, or the node is the learner; nothing
                was changed.
            CapacityError: more is revoked than a list holds.
            StorageError: it cannot be written down.
        """
        by_id = {node_id_of(key): key for key in (*self.invites.keys(), *chain.from_iterable(names.values()))}
        keys = {by_id.get(name) or _only(name, names.get(name, ())) for name in asked.nodes}
        if self.learner_key in keys:
            raise RunError("the learner's grant cannot be taken back.", "To end the run, interrupt `shoal train`.")
        unknown = [name.hex() for name in asked.invitations if self.invites.find(name) is None]
        if unknown:
            raise RunError(f"this run has no invitation {unknown[0]}.", "It may have been taken back already.")
        signed = None
        if keys:
            signed = self.grants.revoke(self.root, now, subjects=sorted(keys))
            write_private(self._run.path / REVOCATIONS, encode(Bundle(revocations=signed)))
        withdrawn = [invite for name in asked.invitations if (invite := self.invites.withdraw(name)) is not None]
        if withdrawn:
            self._write_invites()
        used = {invite.secret for key in keys for invite in self.invites.used_by(key)}
        admitted = {key for invite in withdrawn for key in invite.used_by} - keys
        reply = RevokeReply(
            nodes=tuple(sorted(map(node_id_of, keys))),
            num_invitations=len(withdrawn),
            admitted=tuple(sorted(map(node_id_of, admitted)))[:MAX_NAMES],
            open_invitations=sum(self.invites.is_open(secret, now) for secret in used),
        )
        return Revoked(reply, signed)

    # The folder

    def _read_invites(self) -> InviteBook:
        path = self._run.path / INVITES
        data = read_private(path)
        try:
            return InviteBook(self._run.name) if data is None else InviteBook.from_json(data, self._run.name)
        except RecordError as error:
            raise StorageError(
                f"the invitations in {path} cannot be read: {error.problem}",
                "Restore the file, or delete it: nodes then need new tickets.",
            ) from None

    def _write_invites(self) -> None:
        write_private(self._run.path / INVITES, self.invites.to_json())

    def _read_revocations(self) -> None:
        path = self._run.path / REVOCATIONS
        data = read_private(path)
        if data is None:
            return
        try:
            kept = decode(data, Bundle).revocations
            verdict = "malformed" if kept is None else self.grants.merge_revocations(kept, time.time())
        except RecordError:
            verdict = "malformed"
        if verdict != "new":
            raise StorageError(
                f"the revocations in {path} cannot be read ({verdict}).",
                "Restore the file; deleting it would let revoked nodes join again.",
            )


def _only(name: str, keys: Collection[bytes]) -> bytes:
    """The key of the one node of this name."""
    if len(keys) != 1:
        problem = f"several nodes call themselves {name}." if keys else f"this run knows no node {name}."
        raise RunError(problem, "Name it by its id: 16 hexadecimal digits, as in events.jsonl.")
    return next(iter(keys))


def _remember(known: dict[bytes, T], key: bytes, value: T, most: int) -> None:
    """Note the newest; forget the oldest of too many."""
    known.pop(key, None)
    known[key] = value
    while len(known) > most:
        del known[next(iter(known))]
