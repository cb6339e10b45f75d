"""What can happen to memories: immutable events, each with an id that is the hash of its content.

A store is a set of events; two stores are merged by the union of their sets. Events are ordered by time (a hybrid
clock: never behind an event already seen), then node, then id, so that every holder of a set folds it in one order.

Invariants: events name entries by id and are meaningful in any company: one that does not apply (a use of an entry
nobody added, a merge of what is gone) changes nothing, and applies once what it lacks arrives; an event's cause
(`Undone`'s targets) has another hash than its effect, so undoing cannot be circular.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal

from shoal.errors import RecordError
from shoal.memory.records import Context, Entry, Trial, check_hash, check_name, content_hash, settle_floats
from shoal.protocol.codec import Record
from shoal.protocol.roster import KEY_BYTES, SIGNATURE_BYTES

MAX_TARGETS = 4096
MAX_TIME_US = 1 << 60
MAX_REASON_CHARS = 200


class Body(Record, frozen=True, tag=True, tag_field="kind"):
    """Base of what an event says."""

    @property
    def entries(self) -> tuple[str, ...]:
        """Ids of the entries it touches."""
        return ()


class Noted(Body, frozen=True, tag="noted"):
    """A context was kept; touches no entry."""

    context: Context

    def check(self) -> None:
        self.context.check()


class Added(Body, frozen=True, tag="added"):
    """A candidate was written down."""

    entry: Entry

    def check(self) -> None:
        self.entry.check()

    @property
    def entries(self) -> tuple[str, ...]:
        return (self.entry.id,)


class Tried(Body, frozen=True, tag="tried"):
    """A trial ended."""

    entry: str
    trial: Trial
    runner: bytes = b""
    """Public key of the node that ran it; empty where the recording node did."""
    signature: bytes = b""
    """The runner's (`signing.check_trial`)."""

    def check(self) -> None:
        check_hash(self.entry, "an entry's id")
        self.trial.check()
        if (len(self.runner), len(self.signature)) not in ((0, 0), (KEY_BYTES, SIGNATURE_BYTES)):
            raise RecordError("a trial's runner or signature has the wrong length.")

    @property
    def entries(self) -> tuple[str, ...]:
        return (self.entry,)


class Decided(Body, frozen=True, tag="decided"):
    """Admission ended: with the numbers that an audit recomputes."""

    entry: str
    accepted: bool
    reason: str
    weight: float
    """w0 = max(0, S); 0 where it was rejected."""
    candidate: int
    """Its number among all entries that the deciding node ever knew, from 1: fixed before its first trial."""
    discoveries: int
    """Admissions of the deciding node until then."""
    num_trials: int
    log_e: float
    members: tuple[str, ...] = ()
    """Where this follows from earlier admissions (a merge, an abstract form) and is no test of its own: of which."""

    def __post_init__(self) -> None:
        settle_floats(self, "weight", "log_e")

    def check(self) -> None:
        for entry in (self.entry, *self.members):
            check_hash(entry, "an entry's id")
        if len(self.reason) > MAX_REASON_CHARS or len(self.members) > MAX_TARGETS:
            raise RecordError("a decision's reason or list of members is too long.")
        if not 0 <= self.weight <= 1 or not math.isfinite(self.log_e):
            raise RecordError("a decision's weight is not in 0..1, or its evidence not finite.")
        if self.candidate < 1 or self.discoveries < 0 or self.num_trials < 0:
            raise RecordError("a decision's numbers are out of range.")

    @property
    def entries(self) -> tuple[str, ...]:
        return (self.entry,)


class Vouched(Body, frozen=True, tag="vouched"):
    """The recording node has replayed an admission of somebody's, and stands by it."""

    entry: str
    admission: str
    """Id of the decision; another one for the same entry is not vouched for by this."""
    num_trials: int
    """Replays that the node made for it."""

    def check(self) -> None:
        check_hash(self.entry, "an entry's id")
        check_hash(self.admission, "an event's id")
        if self.num_trials < 0:
            raise RecordError("a node vouches with fewer than no trials.")

    @property
    def entries(self) -> tuple[str, ...]:
        return (self.entry,)


class Used(Body, frozen=True, tag="used"):
    """An entry was shown to an agent, and this is what came of it."""

    entry: str
    utility: float
    """Reward less what its tasks earn without it, over the reward's span: in [-1, 1]."""
    share: float
    """f_use: the share of the node's latest retrievals that showed this entry."""

    def __post_init__(self) -> None:
        settle_floats(self, "utility", "share")

    def check(self) -> None:
        check_hash(self.entry, "an entry's id")
        if not -1 <= self.utility <= 1 or not 0 <= self.share <= 1:
            raise RecordError("a use's utility is not in -1..1, or its share not in 0..1.")

    @property
    def entries(self) -> tuple[str, ...]:
        return (self.entry,)


class Faded(Body, frozen=True, tag="faded"):
    """An entry was passed over while others of its family were shown, and use had not confirmed it."""

    entry: str
    factor: float
    """What its weight is multiplied by."""

    def __post_init__(self) -> None:
        settle_floats(self, "factor")

    def check(self) -> None:
        check_hash(self.entry, "an entry's id")
        if not 0 <= self.factor <= 1:
            raise RecordError("a fading is not in 0..1.")

    @property
    def entries(self) -> tuple[str, ...]:
        return (self.entry,)


class Merged(Body, frozen=True, tag="merged"):
    """Two entries say the same: they become one, whose representative is the older."""

    first: str
    second: str

    def check(self) -> None:
        check_hash(self.first, "an entry's id")
        check_hash(self.second, "an entry's id")

    @property
    def entries(self) -> tuple[str, ...]:
        return (self.first, self.second)


class Removed(Body, frozen=True, tag="removed"):
    """An entry is no longer retrieved; it stays as evidence."""

    entry: str
    reason: Literal["pruned", "expired", "harmful", "by hand"]

    def check(self) -> None:
        check_hash(self.entry, "an entry's id")

    @property
    def entries(self) -> tuple[str, ...]:
        return (self.entry,)


class Erased(Body, frozen=True, tag="erased"):
    """Everything a user's scope held until now is gone, its text too; the one event that cannot be undone."""

    user: str

    def check(self) -> None:
        check_name(self.user, "a user", optional=False)


class Undone(Body, frozen=True, tag="undone"):
    """The targets count as if they had never happened; undoing this brings them back."""

    targets: tuple[str, ...]

    def check(self) -> None:
        if not 1 <= len(self.targets) <= MAX_TARGETS:
            raise RecordError(f"an undo has {len(self.targets)} targets, not 1 to {MAX_TARGETS}.")
        for target in self.targets:
            check_hash(target, "an event's id")


AnyBody = Noted | Added | Tried | Decided | Vouched | Used | Faded | Merged | Removed | Erased | Undone


class Event(Record, frozen=True, dict=True):
    """One change, as a node recorded it."""

    at_us: int
    """Microseconds since 1970 on a hybrid clock."""
    node: str
    body: AnyBody

    def check(self) -> None:
        if not 0 <= self.at_us < MAX_TIME_US:
            raise RecordError("an event's time is out of range.")
        check_name(self.node, "a node", optional=False)
        self.body.check()

    @cached_property
    def id(self) -> str:
        """Hash of everything in it."""
        return content_hash("event", self)

    @property
    def order(self) -> tuple[int, str, str]:
        """Where it stands among all events."""
        return (self.at_us, self.node, self.id)


class EventFile(Record, frozen=True):
    """Events that travel together."""

    events: tuple[Event, ...]

    def check(self) -> None:
        for event in self.events:
            event.check()
