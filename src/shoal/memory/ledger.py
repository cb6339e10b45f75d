"""The events on disk: each stored once, whoever brings it, and which of them are in force.

Responsibilities: the file's layout and transactions; inserting events; what undos take back, down through undone undos;
overwriting what a user's erasure covers, late arrivals included; which entries merges connect.

Invariants: an event's `void` mark equals membership in `state.void_events`; a body that an erasure covers is gone from
the file once the transaction is over (`secure_delete`), its id stays, so that it is not taken in again; everything
here runs inside the caller's transaction.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shoal.errors import StorageError
from shoal.memory.events import Added, Erased, Event, Noted, Undone
from shoal.memory.evolution import RULES
from shoal.memory.signing import SignedEvent
from shoal.protocol.codec import decode, encode

BUSY_S = 10.0
MAX_EVENT_BYTES = 32 * 2**20

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
    position INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, at_us INTEGER NOT NULL, node TEXT NOT NULL,
    kind TEXT NOT NULL, void INTEGER NOT NULL DEFAULT 0, body BLOB, signer BLOB, signature BLOB);
CREATE INDEX events_by_time ON events (at_us);
CREATE INDEX events_by_kind ON events (kind, position) WHERE kind IN ('erased', 'decided');
CREATE TABLE touches (entry TEXT NOT NULL, position INTEGER NOT NULL, PRIMARY KEY (entry, position)) WITHOUT ROWID;
CREATE INDEX touches_by_position ON touches (position);
CREATE TABLE undoes (target TEXT NOT NULL, position INTEGER NOT NULL, PRIMARY KEY (target, position)) WITHOUT ROWID;
CREATE TABLE contexts (id TEXT PRIMARY KEY, position INTEGER NOT NULL, user TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX contexts_by_position ON contexts (position);
CREATE TABLE owners (entry TEXT PRIMARY KEY, user TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE memories (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, representative TEXT NOT NULL,
    status TEXT NOT NULL, family TEXT NOT NULL, user TEXT NOT NULL, agent TEXT NOT NULL, run TEXT NOT NULL,
    bytes INTEGER NOT NULL, changed INTEGER NOT NULL, body BLOB, vector BLOB);
CREATE INDEX memories_by_change ON memories (changed);
CREATE INDEX memories_by_status ON memories (status);
CREATE INDEX memories_by_owner ON memories (user) WHERE user != '';
"""


class Ledger:
    """The event tables of one store, and the connection that its memories share."""

    def __init__(self, path: Path) -> None:
        """Open the file at `path`, made on first use.

        Raises:
            StorageError: the file cannot be used, is damaged, or folds by other rules.
        """
        self.path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("PRAGMA synchronous = FULL")
            self.db.execute("PRAGMA secure_delete = ON")
            if not self.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'memories'").fetchone():
                self._create()
            rules = self.db.execute("SELECT value FROM meta WHERE key = 'rules'").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"the memory store {path} cannot be opened: {error}.", "Name another file.") from None
        if rules != (RULES,):
            raise StorageError(f"the memory store {path} was kept by other rules ({rules}).", "Start a new store.")

    def _create(self) -> None:
        with self.transaction():
            # Another process may have been quicker.
            if not self.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'memories'").fetchone():
                for statement in SCHEMA.split(";"):
                    self.db.execute(statement)
                self.db.execute("INSERT INTO meta VALUES ('rules', ?)", (RULES,))
                self.db.execute("INSERT INTO meta VALUES ('store', ?)", (secrets.token_hex(8),))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing of what is done within.

        Raises:
            StorageError: the disk is full, the file damaged, or another process keeps it busy.
        """
        try:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StorageError(
                f"the memory store {self.path} cannot be written: {error}.", "Make room, or end its other user."
            ) from None

    def insert(self, event: Event, signer: bytes = b"", signature: bytes = b"") -> set[str] | None:
        """Add an event with its marks; gives the entries whose events in force changed by it, None if it was known.

        Those that it touches itself are not among them.
        """
        body = event.body
        row = (event.id, event.at_us, event.node, type(body).__name__.lower(), encode(event), signer, signature)
        columns = "id, at_us, node, kind, body, signer, signature"
        made = self.db.execute(f"INSERT OR IGNORE INTO events ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        if not made.rowcount:
            return None
        position = made.lastrowid
        for entry in dict.fromkeys(body.entries):
            self.db.execute("INSERT INTO touches VALUES (?, ?)", (entry, position))
        if isinstance(body, Added):
            self.db.execute("INSERT OR IGNORE INTO owners VALUES (?, ?)", (body.entry.id, body.entry.scope.user))
        elif isinstance(body, Noted):
            owner = body.context.scope.user
            self.db.execute("INSERT OR IGNORE INTO contexts VALUES (?, ?, ?)", (body.context.id, position, owner))
        elif isinstance(body, Undone):
            for target in dict.fromkeys(body.targets):
                self.db.execute("INSERT INTO undoes VALUES (?, ?)", (target, position))
        void = not isinstance(body, Erased) and self._is_void(event.id, event.order)
        self.db.execute("UPDATE events SET void = ? WHERE position = ?", (void, position))
        if isinstance(body, Undone):
            return self._revoid(body.targets)
        if isinstance(body, Erased):
            return self._erase(body.user, event.order)
        self._redact_if_erased(event)
        return set()

    def in_force(self, event_id: str) -> bool:
        """Whether a known event counts: neither undone nor erased."""
        query = "SELECT NOT void AND body IS NOT NULL FROM events WHERE id = ?"
        return bool(self.db.execute(query, (event_id,)).fetchone()[0])

    def cluster(self, entry: str) -> set[str]:
        """All entries that merges in force connect with `entry`, known here or not."""
        found, queue = {entry}, [entry]
        while queue:
            rows = self.db.execute(
                "SELECT body FROM events JOIN touches USING (position) "
                "WHERE entry = ? AND kind = 'merged' AND NOT void",
                (queue.pop(),),
            ).fetchall()
            for (data,) in rows:
                for other in self.read(data).body.entries:
                    if other not in found:
                        found.add(other)
                        queue.append(other)
        return found

    def touching(self, entries: Iterable[str], kind: str = "%") -> Iterator[Event]:
        """Events in force that touch `entries`, each once, in their order of arrival."""
        query = (
            "SELECT DISTINCT position, body FROM touches CROSS JOIN events USING (position) "
            "WHERE entry IN (SELECT value FROM json_each(?)) AND kind LIKE ? AND NOT void AND body IS NOT NULL "
            "ORDER BY position"
        )
        for _, data in self.db.execute(query, (json.dumps(sorted(entries)), kind)):
            yield self.read(data)

    @property
    def position(self) -> int:
        """Number of the last event appended here; states are restored by it."""
        found: int = self.db.execute("SELECT coalesce(max(position), 0) FROM events").fetchone()[0]
        return found

    def events_since(self, position: int, limit: int = 1000) -> tuple[list[Event], int]:
        """Events appended after `position`, and the position to go on from; erased ones are passed over."""
        query = "SELECT position, body FROM events WHERE position > ? ORDER BY position LIMIT ?"
        rows = self.db.execute(query, (position, limit)).fetchall()
        return [self.read(data) for _, data in rows if data is not None], rows[-1][0] if rows else position

    def shared_since(self, position: int, limit: int, max_bytes: int) -> tuple[list[SignedEvent], int]:
        """Signed events after `position` that others may have, a page of them, and the position to go on from.

        Not among them: what touches a user's entries or is a user's context, what nobody signed, and single events
        of more than `max_bytes`.
        """
        query = (
            "SELECT position, body, signer, signature, "
            "EXISTS (SELECT 1 FROM touches JOIN owners USING (entry) "
            "WHERE touches.position = events.position AND user != '') "
            "OR EXISTS (SELECT 1 FROM contexts WHERE contexts.position = events.position AND user != '') "
            "FROM events WHERE position > ? ORDER BY position LIMIT ?"
        )
        found: list[SignedEvent] = []
        room = max_bytes
        for number, data, signer, signature, private in self.db.execute(query, (position, limit)).fetchall():
            if data is not None and signature and not private and len(data) <= max_bytes:
                event = self.read(data)
                if not isinstance(event.body, Erased):
                    if len(data) > room:
                        break
                    room -= len(data)
                    found.append(SignedEvent(event=event, signer=signer, signature=signature))
            position = number
        return found, position

    @property
    def name(self) -> str:
        """What tells this file from every other store: positions mean nothing in another one."""
        found: str = self.db.execute("SELECT value FROM meta WHERE key = 'store'").fetchone()[0]
        return found

    def ids_since(self, position: int) -> list[str]:
        """Ids of the events appended after `position`, in order of arrival."""
        query = "SELECT id FROM events WHERE position > ? ORDER BY position"
        return [i for (i,) in self.db.execute(query, (position,))]

    def _is_void(self, event_id: str, order: tuple[int, str, str]) -> bool:
        """Whether an undo in force takes the event back."""
        query = "SELECT at_us, node, id FROM events JOIN undoes USING (position) WHERE target = ? AND NOT void"
        return any(tuple(row) > order for row in self.db.execute(query, (event_id,)))

    def _revoid(self, targets: Sequence[str]) -> set[str]:
        """Settle anew which events are void, from `targets` down through undone undoes; gives the entries to refold."""
        stale: set[str] = set()
        queue = list(targets)
        while queue:
            query = "SELECT position, at_us, node, kind, void, body FROM events WHERE id = ?"
            target = queue.pop()
            row = self.db.execute(query, (target,)).fetchone()
            if row is None or row[3] == "erased":
                continue
            position, at_us, node, kind, was, data = row
            void = self._is_void(target, (at_us, node, target))
            if void == bool(was):
                continue
            self.db.execute("UPDATE events SET void = ? WHERE position = ?", (void, position))
            if kind == "undone":
                undone = self.read(data).body
                assert isinstance(undone, Undone), "the table says what it is"
                queue += undone.targets
            rows = self.db.execute("SELECT entry FROM touches WHERE position = ?", (position,))
            stale |= {entry for (entry,) in rows}
        return stale

    def _erase(self, user: str, before: tuple[int, str, str]) -> set[str]:
        """Overwrite what a user's scope held before; gives the entries to refold."""
        stale: set[str] = set()
        for (entry,) in self.db.execute("SELECT entry FROM owners WHERE user = ?", (user,)).fetchall():
            stale.add(entry)
            self._redact(self._positions_of(entry), before)
            self.db.execute("UPDATE memories SET vector = NULL WHERE id = ?", (entry,))
        contexts = self.db.execute("SELECT position FROM contexts WHERE user = ?", (user,)).fetchall()
        self._redact([position for (position,) in contexts], before)
        return stale

    def _positions_of(self, entry: str) -> list[int]:
        return [p for (p,) in self.db.execute("SELECT position FROM touches WHERE entry = ?", (entry,))]

    def _redact(self, positions: Iterable[int], before: tuple[int, str, str]) -> None:
        for position in positions:
            self.db.execute(
                "UPDATE events SET body = NULL "
                "WHERE position = ? AND kind != 'merged' AND (at_us, node, id) < (?, ?, ?)",
                (position, *before),
            )

    def _redact_if_erased(self, event: Event) -> None:
        """An event that arrives after the erasure that covers it leaves its id alone."""
        body = event.body
        query = "SELECT user FROM owners WHERE entry = ? AND user != ''"
        owned = {entry: row[0] for entry in body.entries if (row := self.db.execute(query, (entry,)).fetchone())}
        noted = body.context.scope.user if isinstance(body, Noted) else ""
        if not owned and not noted:
            return
        for (data,) in self.db.execute("SELECT body FROM events WHERE kind = 'erased'").fetchall():
            erasure = self.read(data)
            assert isinstance(erasure.body, Erased), "the table says what it is"
            user = erasure.body.user
            # Only the user's own entries: a merge also names others'.
            positions = [p for entry, owner in owned.items() if owner == user for p in self._positions_of(entry)]
            if noted == user:
                positions.append(self.position)
            self._redact(positions, erasure.order)

    @staticmethod
    def read(data: bytes) -> Event:
        return decode(data, Event, max_bytes=MAX_EVENT_BYTES)
