"""Which key may act in which role: signed grants with an end, and a list of those that no longer hold.

The chain is one link long: a grant counts if the run's root (the coordinator's key, which every ticket pins) signed
it. So anybody can check anybody's grant without asking, and nobody but the root can make one. The root itself may do
everything.

Invariants: a key may act in a role only while some grant for that key, run and role is within its time and neither
its serial nor its key is on the newest revocation list; merging grants and lists in any order and any number of times
gives the same book. Pure: time is an argument, Unix seconds.

Not covered: a node that a revocation has not reached yet still honours the grant; lists spread within a second where
the network is whole, and expiry bounds the rest.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

from shoal.errors import CapacityError, JoinRefused, RecordError
from shoal.fabric.identity import Identity, node_id_of
from shoal.protocol.roster import (
    MAX_REVOCATIONS,
    SERIAL_BYTES,
    Grant,
    Revocation,
    RevocationList,
    SignedRecord,
    SwarmRole,
)
from shoal.swarm.signing import ForgedRecord, sign, verified

CLOCK_WINDOW_S = 300.0
"""How far two nodes' clocks may be apart; as wide as the envelopes' window, because volunteers' clocks drift."""

MAX_GRANT_LIFE_S = 30 * 86400.0
"""No grant is longer, so that a revocation need not be kept for ever."""

MAX_SUBJECTS = 8192
MAX_GRANTS_EACH = 8
"""Grants kept for one key, revoked ones too: those that end last. Renewal needs two."""

ALL_ROLES: frozenset[SwarmRole] = frozenset(get_args(SwarmRole))

Verdict = Literal[
    "new",
    "known",
    "older",
    "malformed",
    "forged",
    "run",
    "issuer",
    "clock",
    "expired",
    "revoked",
    "ungranted",
    "equivocation",
    "equivocated",
    "rate",
    "full",
]
"""What became of a signed record that arrived. `new`: it changed something; `known`, `older`: nothing to do;
`equivocation`: it convicted its signer; the others say why it was refused."""

DenialCode = Literal["ungranted", "not_yet", "expired", "revoked", "role", "secret", "used"]


class GrantExpired(JoinRefused):
    """The grant has ended, or was never heard of: a node whose invitation still holds gets another by joining again."""


class Denial(NamedTuple):
    """Why not."""

    code: DenialCode
    reason: str

    def error(self) -> JoinRefused:
        """For handlers, which refuse by raising."""
        kind = GrantExpired if self.code in ("expired", "ungranted") else JoinRefused
        return kind(self.reason, "Ask whoever started the run for a fresh ticket.")


def issue(
    root: Identity, run: str, subject: bytes, roles: Iterable[SwarmRole], now: float, life_s: float
) -> SignedRecord:
    """A grant for `subject`, valid at once, also where clocks run behind."""
    assert 0 < life_s <= MAX_GRANT_LIFE_S - CLOCK_WINDOW_S
    grant = Grant(
        run=run,
        subject=subject,
        roles=tuple(dict.fromkeys(roles)),
        issuer=root.public_key,
        not_before=max(0.0, now - CLOCK_WINDOW_S),
        expires_at=now + life_s,
        serial=secrets.token_bytes(SERIAL_BYTES),
    )
    return sign(root, grant)


class GrantBook:
    """What one node knows about who may do what in one run."""

    def __init__(self, run: str, root: bytes) -> None:
        self.run = run
        self.root = root
        self._grants: dict[bytes, dict[bytes, tuple[Grant, SignedRecord]]] = {}
        self._bodies: set[bytes] = set()
        """Bodies of the grants held, whose signatures were checked: they come again with every record."""
        self._list: RevocationList | None = None
        self._signed_list: SignedRecord | None = None
        self._serials: frozenset[bytes] = frozenset()
        self._subjects: frozenset[bytes] = frozenset()
        self._spans: dict[bytes, tuple[float, float]] = {}
        """Of keys asked about: within which times one of their grants holds. Empty after every change."""

    @property
    def revocations(self) -> SignedRecord | None:
        """The newest revocation list, to pass on and to keep between starts."""
        return self._signed_list

    @property
    def revocation_sequence(self) -> int:
        return self._list.sequence if self._list is not None else 0

    def merge_grant(self, signed: SignedRecord, now: float) -> Verdict:
        """Take in a grant, whoever brought it."""
        if signed.signer != self.root:
            return "issuer"
        if signed.body in self._bodies:
            return "known"
        try:
            grant = verified(signed, Grant)
        except ForgedRecord:
            return "forged"
        except RecordError:
            return "malformed"
        if grant.run != self.run:
            return "run"
        if grant.issuer != self.root or grant.expires_at - grant.not_before > MAX_GRANT_LIFE_S:
            return "malformed"
        if grant.expires_at <= now:
            return "expired"
        held = self._grants.get(grant.subject, {})
        if not held and len(self._grants) >= MAX_SUBJECTS:
            self.sweep(now)
            if len(self._grants) >= MAX_SUBJECTS:
                return "full"
        held[grant.serial] = (grant, signed)
        self._bodies.add(signed.body)
        self._spans.clear()
        if len(held) > MAX_GRANTS_EACH:
            self._forget(held, min(held, key=lambda serial: (held[serial][0].expires_at, serial)))
        self._grants[grant.subject] = held
        if grant.serial in self._serials or grant.subject in self._subjects:
            return "revoked"  # Kept nevertheless, so that the book does not depend on what came first.
        return "new" if grant.serial in held else "older"

    def merge_revocations(self, signed: SignedRecord, now: float) -> Verdict:
        """Take in a revocation list; the one with the highest sequence number holds."""
        if signed.signer != self.root:
            return "issuer"
        try:
            newer = verified(signed, RevocationList)
        except ForgedRecord:
            return "forged"
        except RecordError:
            return "malformed"
        if newer.run != self.run:
            return "run"
        if newer.issued_at > now + CLOCK_WINDOW_S:
            return "clock"
        if self._signed_list is not None:
            if signed.body == self._signed_list.body:
                return "known"
            # Of two lists with one number (a root that restarted in haste) the same one wins everywhere.
            if (newer.sequence, signed.body) < (self.revocation_sequence, self._signed_list.body):
                return "older"
        self._list, self._signed_list = newer, signed
        self._spans.clear()
        self._serials = frozenset(r.serial for r in newer.revocations if r.serial)
        self._subjects = frozenset(r.subject for r in newer.revocations if r.subject)
        return "new"

    def revoke(
        self, root: Identity, now: float, *, serials: Iterable[bytes] = (), subjects: Iterable[bytes] = ()
    ) -> SignedRecord:
        """The root takes back grants by serial, or all of a key's; the new list is merged here and returned to spread.

        Raises:
            CapacityError: more is revoked than a list holds.
        """
        assert root.public_key == self.root, "only the root revokes"
        until = now + MAX_GRANT_LIFE_S
        old = self._list.revocations if self._list is not None else ()
        kept = {(r.serial, r.subject): r for r in old if r.until > now}
        kept |= {(serial, b""): Revocation(serial, b"", until) for serial in serials}
        kept |= {(b"", subject): Revocation(b"", subject, until) for subject in subjects}
        if len(kept) > MAX_REVOCATIONS:
            raise CapacityError(
                f"a run can hold {MAX_REVOCATIONS} revocations at a time.",
                "Start a new run with a new coordinator key.",
            )
        sequence = max(self.revocation_sequence + 1, int(now * 1000))
        record = RevocationList(run=self.run, sequence=sequence, issued_at=now, revocations=tuple(kept.values()))
        signed = sign(root, record)
        verdict = self.merge_revocations(signed, now)
        assert verdict == "new"
        return signed

    def roles(self, key: bytes, now: float) -> frozenset[SwarmRole]:
        """All roles in which `key` may act now."""
        if key == self.root:
            return ALL_ROLES
        return frozenset(role for grant in self._valid(key, now) for role in grant.roles)

    def is_granted(self, key: bytes, now: float) -> bool:
        """Whether `key` may act in any role now."""
        start, end = self._spans.get(key, (0.0, 0.0))
        if key == self.root or start <= now < end:
            return True
        for grant in self._valid(key, now):
            self._spans[key] = (grant.not_before, grant.expires_at)
            return True
        return False

    def is_revoked(self, key: bytes) -> bool:
        """Whether everything that `key` was granted, and will be, is taken back."""
        return key in self._subjects

    def authorise(self, key: bytes, role: SwarmRole, now: float) -> Denial | None:
        """Why `key` may not act in `role` now, or `None` if it may."""
        if role in self.roles(key, now):
            return None
        name = f"node {node_id_of(key)}"
        grants = [grant for grant, _ in self._grants.get(key, {}).values()]
        if key in self._subjects or any(grant.serial in self._serials for grant in grants):
            return Denial("revoked", f"what {name} was granted has been taken back.")
        if self._valid(key, now):
            return Denial("role", f"{name} may not act as {role} in this run.")
        if any(grant.not_before > now for grant in grants):
            return Denial("not_yet", f"the grant of {name} has not begun; check this machine's clock.")
        if grants:
            return Denial("expired", f"the grant of {name} has ended.")
        return Denial("ungranted", f"{name} has no grant in this run.")

    def require(self, key: bytes, role: SwarmRole, now: float) -> None:
        """As `authorise`, for handlers.

        Raises:
            JoinRefused: it may not.
        """
        denial = self.authorise(key, role, now)
        if denial is not None:
            raise denial.error()

    def until(self, key: bytes, roles: frozenset[SwarmRole], now: float) -> float:
        """Until when `key` may act in all of these roles by one grant, in Unix seconds; 0 where it may not now."""
        return max((grant.expires_at for grant in self._valid(key, now) if roles <= set(grant.roles)), default=0.0)

    def presentable(self, key: bytes, now: float) -> SignedRecord | None:
        """The grant that a key shows to others: of its valid ones that which ends last."""
        held = self._grants.get(key, {})
        valid = [held[grant.serial] for grant in self._valid(key, now)]
        return max(valid, key=lambda pair: (pair[0].expires_at, pair[0].serial))[1] if valid else None

    def sweep(self, now: float) -> None:
        """Forget grants that ended long enough ago for nobody to ask why."""
        for subject in list(self._grants):
            held = self._grants[subject]
            for serial in [s for s, (grant, _) in held.items() if grant.expires_at + CLOCK_WINDOW_S <= now]:
                self._forget(held, serial)
            if not held:
                del self._grants[subject]

    def _forget(self, held: dict[bytes, tuple[Grant, SignedRecord]], serial: bytes) -> None:
        self._bodies.discard(held.pop(serial)[1].body)
        self._spans.clear()

    def _valid(self, key: bytes, now: float) -> list[Grant]:
        if key in self._subjects:
            return []
        return [
            grant
            for grant, _ in self._grants.get(key, {}).values()
            if grant.not_before <= now < grant.expires_at and grant.serial not in self._serials
        ]
