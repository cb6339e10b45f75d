"""The memories that a node's events amount to, kept up to date beside them in one SQLite file.

`append` writes events and the memories they change in one transaction. A memory is taken one step further where the
new event is its latest; where an event arrives late, merges, or takes something back, the memories it touches are
folded again from their own events (`state.fold_cluster`). Opening reads nothing but the layout: the tables are the
state.

Invariants: what `append` returned from has reached the disk (WAL, `synchronous = FULL`), so `kill -9` at any moment
loses at most what was not acknowledged, and never leaves half of it; the tables equal `state.fold` of the events.
One process writes at a time; SQLite makes others wait `ledger.BUSY_S`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.errors import RecordError
from shoal.fabric.identity import Identity
from shoal.memory.admission import distinct
from shoal.memory.events import Added, AnyBody, Decided, Erased, Event, Merged, Noted, Tried
from shoal.memory.ledger import Ledger
from shoal.memory.records import Context, Scope, Trial
from shoal.memory.signing import SignedEvent, sign_event
from shoal.memory.state import Memory, fold, fold_cluster, step
from shoal.protocol.codec import decode, encode

MAX_SKEW_US = 3600 * 10**6
"""Events from further in the future are refused: they would drag everybody's clock along."""


class Store:
    """One node's memories. Close it, or use it as a context manager."""

    def __init__(self, path: Path, node: str | Identity) -> None:
        """Open the store at `path`, made on first use; events recorded here carry `node`'s name.

        Args:
            node: with an identity, events recorded here are signed, and can be shared with others.

        Raises:
            StorageError: the file cannot be used, is damaged, or folds by other rules.
        """
        self._identity = node if isinstance(node, Identity) else None
        self.node = node.node_id if isinstance(node, Identity) else node
        self._ledger = Ledger(path)
        self._db = self._ledger.db
        self._last_us: int = self._db.execute("SELECT coalesce(max(at_us), 0) FROM events").fetchone()[0]

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- writing

    def record(self, *bodies: AnyBody) -> tuple[Event, ...]:
        """Make events of what happened here, now, and append them; all or none."""
        events: list[Event] = []
        for body in bodies:
            self._last_us = max(time.time_ns() // 1000, self._last_us + 1)
            events.append(Event(at_us=self._last_us, node=self.node, body=body))
        identity = self._identity
        self.append(events if identity is None else [sign_event(identity, event) for event in events])
        return tuple(events)

    def append(self, events: Iterable[Event | SignedEvent]) -> int:
        """Add events, from here or from another node; gives how many were new. All or none.

        A signature is kept beside its event and not verified here (`signing.verified`).

        Raises:
            RecordError: an event breaks a bound, or comes from too far in the future; nothing was added.
            StorageError: the disk is full or damaged.
        """
        brought = list(events)
        signed = {one.event.id: one for one in brought if isinstance(one, SignedEvent)}
        checked = [one.event if isinstance(one, SignedEvent) else one for one in brought]
        latest = time.time_ns() // 1000 + MAX_SKEW_US
        for event in checked:
            event.check()
            if event.at_us > latest:
                raise RecordError(f"an event of node {event.node[:40]!r} comes from more than an hour in the future.")
        with self._ledger.transaction():
            added = sum(
                self._append_one(event, signed.get(event.id)) for event in sorted(checked, key=lambda e: e.order)
            )
        self._last_us = max(self._last_us, *(event.at_us for event in checked), 0)
        if any(isinstance(event.body, Erased) for event in checked):
            # What was overwritten in the file must not live on in the log beside it.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return added

    def _append_one(self, event: Event, signed: SignedEvent | None) -> bool:
        proof = (signed.signer, signed.signature) if signed else ()
        stale = self._ledger.insert(event, *proof)
        if stale is None:
            return False
        body = event.body
        if isinstance(body, Merged) or (body.entries and not self._advance(event)):
            stale |= set(body.entries)
        self._refold(stale)
        return True

    def set_vector(self, entry: str, vector: NDArray[np.float32]) -> None:
        """Keep an entry's embedding; it is this node's own, and no event."""
        data = np.ascontiguousarray(vector, dtype="<f4").tobytes()
        with self._ledger.transaction():
            self._db.execute("UPDATE memories SET vector = ? WHERE id = ?", (data, entry))

    def use_vectors_of(self, embedder: str) -> None:
        """Drop the vectors kept here if another embedder made them."""
        with self._ledger.transaction():
            if self._db.execute("SELECT value FROM meta WHERE key = 'embedder'").fetchone() != (embedder,):
                self._db.execute("UPDATE memories SET vector = NULL")
                self._db.execute("INSERT OR REPLACE INTO meta VALUES ('embedder', ?)", (embedder,))

    # -- keeping the memories up to date

    def _advance(self, event: Event) -> bool:
        """Take the one memory that `event` touches a step further; False where it must be folded again."""
        (entry,) = event.body.entries
        row = self._db.execute("SELECT representative, body FROM memories WHERE id = ?", (entry,)).fetchone()
        if not self._ledger.in_force(event.id):
            return True
        if row is None:
            return False
        data = row[1] or self._db.execute("SELECT body FROM memories WHERE id = ?", (row[0],)).fetchone()[0]
        memory = decode(data, Memory)
        if event.order < memory.last or isinstance(event.body, Added):
            return False
        after = step(memory, event)
        assert after is not None, "a memory that exists does not cease by a step"
        self._write(after)
        return True

    def _refold(self, entries: Iterable[str]) -> None:
        done: set[str] = set()
        for entry in entries:
            if entry not in done:
                cluster = self._ledger.cluster(entry)
                done |= cluster
                events = [e for e in self._ledger.touching(cluster) if not isinstance(e.body, Merged)]
                known = {e.body.entry.id for e in events if isinstance(e.body, Added)}
                for gone in cluster - known:
                    self._db.execute("DELETE FROM memories WHERE id = ?", (gone,))
                memory = fold_cluster(events)
                if memory is not None:
                    self._write(memory)

    def _write(self, memory: Memory) -> None:
        changed = self.position
        entry, scope = memory.entry, memory.entry.scope
        for member in memory.members:
            own = member == memory.id
            values = (
                memory.id,
                memory.status if own else "archived",
                entry.family,
                scope.user,
                scope.agent,
                scope.run,
                len(entry.text.encode(errors="replace")) if own else 0,
                changed,
                encode(memory) if own else None,
                member,
            )
            update = (
                "UPDATE memories SET representative = ?, status = ?, family = ?, user = ?, agent = ?, run = ?, "
                "bytes = ?, changed = ?, body = ? WHERE id = ?"
            )
            if not self._db.execute(update, values).rowcount:
                self._db.execute(
                    "INSERT INTO memories (representative, status, family, user, agent, run, bytes, changed, body, id) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    values,
                )

    # -- reading

    @property
    def position(self) -> int:
        """Number of the last event appended here; states are restored by it."""
        return self._ledger.position

    def events_since(self, position: int, limit: int = 1000) -> tuple[list[Event], int]:
        """Events appended after `position`, and the position to go on from; erased ones are passed over."""
        return self._ledger.events_since(position, limit)

    def shared_since(self, position: int, limit: int, max_bytes: int) -> tuple[list[SignedEvent], int]:
        """A page of what other nodes may have of the events after `position`, and the position to go on from."""
        return self._ledger.shared_since(position, limit, max_bytes)

    @property
    def name(self) -> str:
        """What tells this store from every other."""
        return self._ledger.name

    def ids_since(self, position: int) -> list[str]:
        """Ids of the events appended after `position`, in order of arrival."""
        return self._ledger.ids_since(position)

    def memory(self, entry: str) -> Memory | None:
        """The memory that holds `entry`."""
        row = self._db.execute(
            "SELECT m.body FROM memories AS e JOIN memories AS m ON m.id = e.representative WHERE e.id = ?", (entry,)
        ).fetchone()
        return decode(row[0], Memory) if row else None

    def memories(self, *statuses: str) -> Iterator[Memory]:
        """All memories, or those of some statuses, oldest first."""
        marks = ", ".join("?" * len(statuses))
        where = f"AND status IN ({marks})" if statuses else ""
        query = f"SELECT body FROM memories WHERE body IS NOT NULL {where} ORDER BY number"
        for (data,) in self._db.execute(query, statuses):
            yield decode(data, Memory)

    def find(self, prefix: str) -> list[str]:
        """Ids of entries that begin with `prefix`, a few at most."""
        query = "SELECT id FROM memories WHERE id >= ? AND id < ? LIMIT 5"
        return [found for (found,) in self._db.execute(query, (prefix, prefix + "g"))]

    def held(self) -> tuple[int, int]:
        """Number and bytes of the active memories: what the budget limits."""
        query = "SELECT count(*), coalesce(sum(bytes), 0) FROM memories WHERE status = 'active'"
        count, size = self._db.execute(query).fetchone()
        return count, size

    def trials(self, memory: Memory) -> dict[str, Trial]:
        """Its evidence: every trial of every member, each once."""
        bodies = (event.body for event in self._ledger.touching(memory.members, "tried"))
        return distinct(body.trial for body in bodies if isinstance(body, Tried))

    def history(self, memory: Memory) -> list[Event]:
        """The events in force that made it what it is, in their order."""
        return sorted(self._ledger.touching(self._ledger.cluster(memory.id)), key=lambda e: e.order)

    def context(self, context_id: str) -> Context | None:
        """A context kept here."""
        query = "SELECT body FROM events JOIN contexts USING (position) WHERE contexts.id = ? AND body IS NOT NULL"
        row = self._db.execute(query, (context_id,)).fetchone()
        body = self._ledger.read(row[0]).body if row else None
        return body.context if isinstance(body, Noted) else None

    def discoveries(self) -> int:
        """Candidates that this node's own tests admitted, those undone or erased since included where it knows."""
        query = (
            "SELECT body FROM events WHERE kind = 'decided' AND node = ? AND body IS NOT NULL "
            "ORDER BY position DESC LIMIT 1"
        )
        row = self._db.execute(query, (self.node,)).fetchone()
        body = self._ledger.read(row[0]).body if row else None
        if not isinstance(body, Decided):
            return 0
        return body.discoveries + (body.accepted and not body.members)

    def state_at(self, position: int) -> dict[str, Memory]:
        """The memories as they were when event number `position` had been appended (what was erased since stays so)."""
        query = "SELECT body FROM events WHERE position <= ? AND body IS NOT NULL"
        return fold(self._ledger.read(data) for (data,) in self._db.execute(query, (position,)))

    def numbers(self, changed_since: int = 0) -> Iterator[tuple[int, str, Memory | None, bytes | None]]:
        """Number, id, memory (None for archived members) and vector of entries changed after event `changed_since`."""
        query = "SELECT number, id, body, vector FROM memories WHERE changed > ? ORDER BY number"
        for number, entry, data, vector in self._db.execute(query, (changed_since,)):
            yield number, entry, decode(data, Memory) if data is not None else None, vector

    def visible(self, family: str, scope: Scope | None) -> list[int]:
        """Numbers of the active memories of a family (empty: any) that a reader may be shown (None: any)."""
        query, values = "SELECT number FROM memories WHERE status = 'active'", []
        if family:
            query, values = f"{query} AND family = ?", [family]
        if scope is not None:
            query += " AND user IN ('', ?) AND agent IN ('', ?) AND run IN ('', ?)"
            values += [scope.user, scope.agent, scope.run]
        return [number for (number,) in self._db.execute(query, values)]

    def by_number(self, number: int) -> Memory | None:
        """The memory whose representative has this number."""
        row = self._db.execute("SELECT body FROM memories WHERE number = ?", (number,)).fetchone()
        return decode(row[0], Memory) if row and row[0] is not None else None

    def number_of(self, entry: str) -> int:
        """The number of a known entry."""
        found: int = self._db.execute("SELECT number FROM memories WHERE id = ?", (entry,)).fetchone()[0]
        return found
