"""Who is here: signed records from anywhere, merged into one view that all nodes come to share.

    state of one key  =  its newest records (a window of `WINDOW` sequence numbers)  or  evidence that it equivocated
    merge             =  union of the windows, cut to the newest; evidence once found stays

Invariants, tested by random walks:
- merging is commutative, associative and idempotent while a fork is no older than the window; whatever the order,
  loss or repetition of messages, nodes that compare notes (digest, missing) end with the same records;
- a key with two different records under one sequence number is refused for good, with the evidence kept to pass on;
  a fork is found by whoever gets both records, and at the latest when two who hold one each compare digests;
- a record replayed never displaces a newer one; one from beyond the clock window, of another run, or unsigned by its
  own key never enters; one key enters no oftener than its rate;
- the table holds at most `max_nodes` keys, and a key without a grant never displaces one with a grant;
- no record of an honest granted node is lost but to its own newer one.

A pure state machine: it owns no clock and no socket. Times are Unix seconds; `now` never decides which of two records
is newer, only whether one still counts. Expiry runs from when a record was first heard, so that a sender's clock that
is wrong within the window shortens nothing; a stale copy is not passed on, so that it cannot go round for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from blake3 import blake3

from shoal.errors import RecordError
from shoal.fabric.identity import node_id_of
from shoal.protocol.roster import (
    MARK_BYTES,
    MAX_TTL_S,
    SHORT_MARK_BYTES,
    Bundle,
    Digest,
    DigestEntry,
    Evidence,
    NodeRecord,
    SignedRecord,
    SwarmRole,
)
from shoal.swarm.grants import CLOCK_WINDOW_S, GrantBook, Verdict
from shoal.swarm.rate import RateLimiter
from shoal.swarm.signing import ForgedRecord, mark, verified

WINDOW = 8
"""Newest sequence numbers kept of each key: how far back a fork is still recognised."""

MAX_NODES = 4096

RECORDS_PER_S = 1.0
RECORD_BURST = 16.0
"""How often one key's view may change: changes cost everybody a signature check and a message."""

SEARCH_S = 1.0
"""A full table is searched for room no oftener than this for keys without a grant: a flood is cheap to refuse."""

ARRIVAL_GRACE_S = 2.0
"""A node that has just spoken itself is here, though its sign of life may still be under way."""


class Node(NamedTuple):
    """One node as the others see it."""

    id: str
    record: NodeRecord
    roles: frozenset[SwarmRole]
    """Those it offers and may act in."""
    alive: bool
    heard_at: float
    """When this record was first heard here."""


@dataclass
class Entry:
    """One key's newest records."""

    record: NodeRecord
    signed: SignedRecord
    window: dict[int, SignedRecord]
    marks: dict[int, bytes]
    """Of the records in the window: every comparison of notes needs all of them."""
    heard_at: float
    spoke_at: float = 0.0
    """When the node itself, not another, brought this record."""

    def remember(self, sequence: int, signed: SignedRecord) -> None:
        """Keep one more record in the window, and the newest of too many."""
        self.window[sequence], self.marks[sequence] = signed, mark(signed)
        for old in sorted(self.window)[:-WINDOW]:
            del self.window[old], self.marks[old]

    def digest(self, deep: bool) -> dict[int, bytes]:
        """Sequence numbers and short marks, of the whole window or of the newest record."""
        chosen = self.marks if deep else {self.record.sequence: self.marks[self.record.sequence]}
        return {number: found[:SHORT_MARK_BYTES] for number, found in chosen.items()}

    def is_current(self, now: float) -> bool:
        return now < min(self.heard_at, self.record.issued_at + CLOCK_WINDOW_S) + self.record.ttl_s


@dataclass
class Roster:
    """The view of one node."""

    run: str
    grants: GrantBook
    open_to_all: bool = False
    """Admit keys without a grant: a run on one machine, or a swarm that anybody may join."""
    max_nodes: int = MAX_NODES
    counters: Counter[str] = field(default_factory=Counter)
    """Verdicts by name, for metrics and tests."""
    revision: int = 0
    """Rises with every change that a reader of `nodes` could notice."""
    entries: dict[bytes, Entry] = field(default_factory=dict)
    evidence: dict[bytes, Evidence] = field(default_factory=dict)
    _alive: set[str] = field(default_factory=set)
    _gone_at: dict[str, float] = field(default_factory=dict)
    _next_search: float = 0.0
    _rate: RateLimiter = field(default_factory=lambda: RateLimiter(RECORDS_PER_S, RECORD_BURST))

    def merge(self, signed: SignedRecord, now: float, *, directly: bool = False) -> Verdict:
        """Take in a node record, whoever brought it.

        Args:
            directly: the node itself brought it, just now.
        """
        verdict = self._merge(signed, now, directly)
        self.counters[verdict] += 1
        self.revision += verdict in ("new", "equivocation")
        return verdict

    def merge_evidence(self, evidence: Evidence, now: float) -> Verdict:
        """Take in a proof that a node equivocated."""
        key = evidence.first.signer
        if key in self.evidence:
            return "equivocated"
        try:
            evidence.check()
            first, second = verified(evidence.first, NodeRecord), verified(evidence.second, NodeRecord)
        except ForgedRecord:
            return self._count("forged")
        except RecordError:
            return self._count("malformed")
        if {first.public_key, second.public_key} != {key} or first.sequence != second.sequence:
            return self._count("malformed")
        if {first.run, second.run} != {self.run}:
            return self._count("run")
        refusal = self._admit(key, now)
        if refusal is not None:
            return self._count(refusal)
        return self._convict(key, evidence.first, evidence.second)

    def note_alive(self, node_id: str, alive: bool, now: float) -> None:
        """The fabric saw a node come or go. A hint: it hides a node at once and never removes its record."""
        if alive:
            self._alive.add(node_id)
            self._gone_at.pop(node_id, None)
        else:
            self._alive.discard(node_id)
            self._gone_at[node_id] = now
            while len(self._gone_at) > 2 * self.max_nodes:
                del self._gone_at[next(iter(self._gone_at))]
        self.revision += 1

    def nodes(self, now: float, role: SwarmRole | None = None, *, absent: bool = False) -> list[Node]:
        """Nodes whose record holds now, in order of their ids.

        Args:
            role: only those that offer this role and may act in it.
            absent: also those that the fabric no longer sees.
        """
        found = [node for node in self._current(now) if role is None or role in node.roles]
        return sorted((node for node in found if node.alive or absent), key=lambda node: node.id)

    def node(self, node_id: str, now: float) -> Node | None:
        """The node with this id, seen or not, if its record holds now."""
        return next((node for node in self._current(now) if node.id == node_id), None)

    def newest_sequence(self, key: bytes) -> int:
        """The highest sequence number known of a key; 0 for none. A node that restarts goes on from its own."""
        return self.entries[key].record.sequence if key in self.entries else 0

    def digest(self, now: float, *, deep: bool = True) -> Digest:
        """What is known here, in short.

        Args:
            deep: all records of the windows, which finds old forks; otherwise each node's newest alone.
        """
        known = [DigestEntry(key, entry.digest(deep)) for key, entry in self.entries.items()]
        convicted = [DigestEntry(key, {}) for key in self._convicted(now)]
        return Digest(nodes=tuple(known + convicted), revocations=self.grants.revocation_sequence)

    def summary(self, now: float) -> bytes:
        """Equal for two nodes that agree on every newest record (older ones, only digests compare)."""
        lines = [
            key + entry.record.sequence.to_bytes(8, "big") + entry.marks[entry.record.sequence]
            for key, entry in self._held(now)
        ]
        lines += [key + b"equivocated" for key in self._convicted(now)]
        hasher = blake3(self.grants.revocation_sequence.to_bytes(8, "big"))
        for line in sorted(lines):
            hasher.update(line)
        return hasher.digest(MARK_BYTES)

    def missing(self, digest: Digest, now: float, limit: int) -> Bundle:
        """What the sender of `digest` lacks: at most `limit` records, and some proofs of equivocation."""
        theirs = {entry.key: entry for entry in digest.nodes}
        proven = {entry.key for entry in digest.nodes if not entry.window}
        convicted = [key for key in self._convicted(now) if key not in proven][: max(1, limit // 8)]
        records: list[SignedRecord] = []
        told_of = list(convicted)
        for key, entry in self.entries.items():
            told = theirs.get(key)
            # A goodbye is told to those who know the node.
            held = self._is_held(key, entry, now) or (told is not None and entry.record.ttl_s == 0)
            if len(records) >= limit or not held or (told is not None and not told.window):
                continue
            if told is None or told.newest < entry.record.sequence:
                records.append(entry.signed)
                told_of.append(key)
            for number, theirs_short in told.window.items() if told is not None else ():
                ours = entry.window.get(number)
                if ours is not None and entry.marks[number][:SHORT_MARK_BYTES] != theirs_short:
                    records.append(ours)  # They hold another record under this number: with ours they can prove it.
                    break
        grants = [self.grants.presentable(key, now) for key in told_of]
        newer = self.grants.revocation_sequence > digest.revocations
        return Bundle(
            records=tuple(records[:limit]),
            grants=tuple(grant for grant in grants if grant is not None),
            evidence=tuple(self.evidence[key] for key in convicted),
            revocations=self.grants.revocations if newer else None,
        )

    def sweep(self, now: float) -> None:
        """Forget keys so old that no record of theirs could be taken for a fresh one."""
        for key in [k for k, e in self.entries.items() if e.record.issued_at + MAX_TTL_S + CLOCK_WINDOW_S < now]:
            del self.entries[key]
            self.revision += 1

    def _merge(self, signed: SignedRecord, now: float, directly: bool) -> Verdict:
        key = signed.signer
        if key in self.evidence:
            return "equivocated"
        entry = self.entries.get(key)
        if entry is not None and any(signed.body == kept.body for kept in entry.window.values()):
            # Known to the byte, so its signature was checked already.
            if signed.body != entry.signed.body:
                return "older"
            entry.spoke_at = now if directly else entry.spoke_at
            return "known"
        try:
            record = verified(signed, NodeRecord)
        except ForgedRecord:
            return "forged"
        except RecordError:
            return "malformed"
        if record.public_key != key:
            return "forged"
        if record.run != self.run:
            return "run"
        rival = entry.window.get(record.sequence) if entry is not None else None
        if rival is not None:
            return self._convict(key, rival, signed)
        if record.issued_at > now + CLOCK_WINDOW_S:
            return "clock"
        if entry is not None and record.sequence <= entry.record.sequence:
            entry.remember(record.sequence, signed)
            return "older"
        if record.issued_at + record.ttl_s + CLOCK_WINDOW_S < now:
            return "expired"
        refusal = self._admit(key, now)
        if refusal is not None:
            return refusal
        if not self._rate.take(key, now):
            return "rate"
        window, marks = (dict(entry.window), dict(entry.marks)) if entry is not None else ({}, {})
        newer = Entry(record, signed, window, marks, heard_at=now, spoke_at=now if directly else 0.0)
        newer.remember(record.sequence, signed)
        self.entries[key] = newer
        return "new"

    def _admit(self, key: bytes, now: float) -> Verdict | None:
        """Why `key` gets no place in the table, or `None`, and then there is one."""
        granted = self.grants.is_granted(key, now)
        if not granted and not self.open_to_all:
            return "ungranted"
        if key in self.entries or len(self.entries) + len(self.evidence) < self.max_nodes:
            return None
        self.sweep(now)
        if len(self.entries) + len(self.evidence) < self.max_nodes:
            return None
        if not granted and now < self._next_search:
            return "full"
        self._next_search = now + SEARCH_S
        for victim in self._victims(granted, now):
            self.entries.pop(victim, None)
            self.evidence.pop(victim, None)
            self.counters["evicted"] += 1
            self.revision += 1
            return None
        return "full"

    def _victims(self, for_granted: bool, now: float) -> Iterator[bytes]:
        """Keys that may make room, the most dispensable first."""
        ungranted = [k for k in self.entries if not self.grants.is_granted(k, now)]
        lapsed = [k for k in self.entries if not self.entries[k].is_current(now)]
        yield from (k for k in ungranted if not self.entries[k].is_current(now))
        if for_granted:
            yield from ungranted
            yield from (k for k in self.evidence if not self.grants.is_granted(k, now))
            yield from lapsed

    def _convict(self, key: bytes, one: SignedRecord, other: SignedRecord) -> Verdict:
        first, second = sorted((one, other), key=lambda signed: signed.body)
        self.evidence[key] = Evidence(first, second)
        self.entries.pop(key, None)
        self.revision += 1
        return "equivocation"

    def _held(self, now: float) -> list[tuple[bytes, Entry]]:
        """Entries that are shown and passed on: current, and of keys that may be here."""
        return [(key, entry) for key, entry in self.entries.items() if self._is_held(key, entry, now)]

    def _is_held(self, key: bytes, entry: Entry, now: float) -> bool:
        return entry.is_current(now) and (self.open_to_all or self.grants.is_granted(key, now))

    def _convicted(self, now: float) -> list[bytes]:
        """Equivocators that could still take part; the others need no proof against them."""
        return [key for key in self.evidence if self.open_to_all or self.grants.is_granted(key, now)]

    def _current(self, now: float) -> Iterator[Node]:
        for key, entry in self._held(now):
            node_id = node_id_of(key)
            granted = self.grants.roles(key, now)
            offered = frozenset(entry.record.roles)
            roles = offered if self.open_to_all and not granted else offered & granted
            yield Node(node_id, entry.record, roles, self._is_alive(node_id, entry, now), entry.heard_at)

    def _is_alive(self, node_id: str, entry: Entry, now: float) -> bool:
        if node_id in self._alive:
            return True
        fresh = now - entry.spoke_at < ARRIVAL_GRACE_S
        return fresh and entry.spoke_at > self._gone_at.get(node_id, 0.0)

    def _count(self, verdict: Verdict) -> Verdict:
        self.counters[verdict] += 1
        return verdict
