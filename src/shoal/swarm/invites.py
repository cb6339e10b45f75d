"""Join secrets: who knows one may join, so many times, until then.

A ticket carries a secret; a join request names it (`fabric.join.invitation_of`) and proves it without showing it; this
book says whether that secret still opens the door. Uses are counted in keys: a node that joined may come back with the
same ticket (it restarted, its grant ends, or the answer was lost), another node may not. So a ticket stolen after its
one use is worth nothing.

Invariants: no secret admits more distinct keys than its `max_uses`, nor a first-time key after its end; a book that
is written and read again decides as before. The coordinator writes the book before it answers the node that joined:
otherwise a crash in between would leave a spent secret unspent. Pure: time is an argument, the file is the caller's.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import msgspec

from shoal.errors import CapacityError, RecordError
from shoal.fabric.join import invitation_of
from shoal.protocol.codec import from_json, to_json
from shoal.protocol.roster import MAX_SECRETS, MAX_USES, JoinSecret, JoinSecrets, SwarmRole
from shoal.swarm.grants import Denial

SECRET_BYTES = 24


class InviteBook:
    """All join secrets of one run."""

    def __init__(self, run: str, invites: Iterable[JoinSecret] = ()) -> None:
        self.run = run
        self._invites = {invitation_of(invite.secret): invite for invite in invites}

    def issue(
        self, roles: Iterable[SwarmRole], now: float, *, life_s: float, max_uses: int = 1, secret: bytes = b""
    ) -> bytes:
        """A new secret for a ticket.

        Args:
            secret: where it is given from outside (a run's standing ticket); by default a random one is made.

        Raises:
            CapacityError: the run holds as many secrets as it can.
        """
        assert life_s > 0 and 1 <= max_uses <= MAX_USES
        if len(self._invites) >= MAX_SECRETS:
            self.sweep(now)
        if len(self._invites) >= MAX_SECRETS:
            raise CapacityError(
                f"a run keeps {MAX_SECRETS} join secrets at a time.", "Give tickets more uses or a shorter life."
            )
        invite = JoinSecret(
            secret=secret or secrets.token_bytes(SECRET_BYTES),
            roles=tuple(dict.fromkeys(roles)),
            max_uses=max_uses,
            issued_at=now,
            expires_at=now + life_s,
        )
        invite.check()
        self._invites[invitation_of(invite.secret)] = invite
        return invite.secret

    def find(self, invitation: bytes) -> JoinSecret | None:
        """The secret that a join request names, spent or expired ones too, so that the refusal can say so."""
        return self._invites.get(invitation)

    def used_by(self, key: bytes) -> list[JoinSecret]:
        """The secrets with which this key joined."""
        return [invite for invite in self._invites.values() if key in invite.used_by]

    def is_open(self, secret: bytes, now: float) -> bool:
        """Whether a node that has not joined yet still may by this secret."""
        invite = self._invites.get(invitation_of(secret))
        return invite is not None and now < invite.expires_at and len(invite.used_by) < invite.max_uses

    def keys(self) -> frozenset[bytes]:
        """All that joined by a secret that is still held."""
        return frozenset(key for invite in self._invites.values() for key in invite.used_by)

    def spend(self, secret: bytes, key: bytes, role: SwarmRole, now: float) -> Denial | None:
        """Admit `key` in `role` by this secret, or say why not. Nothing is spent by a denial."""
        invitation = invitation_of(secret)
        invite = self._invites.get(invitation)
        if invite is None:
            return Denial("secret", "the ticket's secret is not one of this run's.")
        if role not in invite.roles:
            return Denial("role", f"this ticket admits {' or '.join(invite.roles)}, not {role}.")
        if key in invite.used_by:
            return None
        if now >= invite.expires_at:
            return Denial("expired", "the ticket has expired.")
        if len(invite.used_by) >= invite.max_uses:
            times = "once" if invite.max_uses == 1 else f"{invite.max_uses} times"
            return Denial("used", f"the ticket could be used {times} and has been.")
        self._invites[invitation] = msgspec.structs.replace(invite, used_by=(*invite.used_by, key))
        return None

    def withdraw(self, invitation: bytes) -> JoinSecret | None:
        """Nobody joins by this secret any more, nor comes back by it; gives it, if it was there."""
        return self._invites.pop(invitation, None)

    def sweep(self, now: float) -> None:
        """Forget expired secrets that nobody used."""
        self._invites = {name: i for name, i in self._invites.items() if i.used_by or now < i.expires_at}

    def to_json(self) -> bytes:
        """The book for a file, which must be readable by its owner only (`swarm.keyfile`)."""
        return to_json(JoinSecrets(run=self.run, secrets=tuple(self._invites.values())))

    @classmethod
    def from_json(cls, data: bytes, run: str) -> InviteBook:
        """The book in `data`.

        Raises:
            RecordError: it is none, or another run's.
        """
        kept = from_json(data, JoinSecrets)
        if kept.run != run:
            raise RecordError(f"these join secrets are of run {kept.run!r}, not {run!r}.")
        return cls(run, kept.secrets)
