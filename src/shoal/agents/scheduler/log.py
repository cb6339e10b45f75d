"""The log of all runs in one SQLite file: append-only, so a run is what its events say.

Invariants: an event that `append` has returned from survives a killed process (WAL; a power cut may cost the newest);
events are never changed nor deleted, which triggers enforce; one process at a time works on a run (`claim`), by a lock
that the kernel takes back when the process dies; the bytes that a follower is sent are those stored.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shoal.agents.scheduler.records import RunEvent
from shoal.errors import RunError, StorageError

BUSY_TIMEOUT_S = 10.0
PAGE_EVENTS = 512

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events(
    run TEXT NOT NULL, seq INTEGER NOT NULL, time REAL NOT NULL, kind TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (run, seq)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS sessions ON events(kind, run) WHERE kind IN ('run', 'final', 'error');
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""


@dataclass(frozen=True)
class Stored:
    """One event with its data as the bytes that were written."""

    run: str
    seq: int
    time: float
    kind: str
    data: bytes


class EventLog:
    """A file of runs.

    Args:
        path: made where it does not exist.

    Raises:
        StorageError: it cannot be opened, or is no log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"{path} cannot be used as a log of runs: {error}.", "Name another file.") from None

    def close(self) -> None:
        self._db.close()

    def append(self, events: Sequence[RunEvent]) -> None:
        """Store events, all or none.

        Raises:
            StorageError: the disk is full, or an event of this number is there already.
        """
        rows = [(e.run, e.seq, e.time, e.kind, msgspec.json.encode(e.data)) for e in events]
        try:
            if len(rows) == 1:
                self._db.execute("INSERT INTO events VALUES(?,?,?,?,?)", rows[0])
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany("INSERT INTO events VALUES(?,?,?,?,?)", rows)
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise StorageError(f"the log {self.path} takes no event: {error}.", "Is the disk full?") from None

    def stored(self, run: str, after: int = 0, limit: int = PAGE_EVENTS) -> list[Stored]:
        """Up to `limit` events of a run from behind number `after`."""
        rows = self._query(
            "SELECT run, seq, time, kind, data FROM events WHERE run=? AND seq>? ORDER BY seq LIMIT ?",
            (run, after, limit),
        )
        return [Stored(*row) for row in rows]

    def event(self, run: str, seq: int) -> RunEvent:
        """One event; raises `StorageError` where it is damaged or missing."""
        for row in self.stored(run, seq - 1, 1):
            if row.seq == seq:
                return self._read(row)
        raise StorageError(f"event {seq} of run {run} is missing from {self.path}.")

    def events(self, run: str, *, until: int | None = None) -> Iterator[RunEvent]:
        """A run's events in order, up to number `until`.

        Raises:
            RunError: there is no such run.
            StorageError: an event is damaged or missing.
        """
        seq = 0
        while until is None or seq < until:
            page = self.stored(run, seq)
            if not page and seq == 0:
                raise RunError(f"there is no run {run!r} in {self.path}.", "See the log's runs: shoal agent --list.")
            for row in page:
                seq += 1
                if until is not None and seq > until:
                    return
                if row.seq != seq:
                    raise StorageError(f"event {seq} of run {run} is missing from {self.path}.")
                yield self._read(row)
            if len(page) < PAGE_EVENTS:
                return

    def _read(self, row: Stored) -> RunEvent:
        try:
            data = msgspec.json.decode(row.data, type=dict[str, Any])
            fields = {"run": row.run, "seq": row.seq, "time": row.time, "kind": row.kind, "data": data}
            return msgspec.convert(fields, RunEvent)
        except msgspec.DecodeError as error:
            raise StorageError(f"event {row.seq} of run {row.run} in {self.path} is damaged: {error}.") from None

    def runs(self) -> list[tuple[str, Stored, Stored | None]]:
        """Every run with its first event and, where it has ended, its last one; newest first."""
        firsts = [Stored(*row) for row in self._query("SELECT run,seq,time,kind,data FROM events WHERE kind='run'", ())]
        lasts = {
            row[0]: Stored(*row)
            for row in self._query("SELECT run,seq,time,kind,data FROM events WHERE kind IN ('final','error')", ())
        }
        return [(one.run, one, lasts.get(one.run)) for one in sorted(firsts, key=lambda one: -one.time)]

    @contextmanager
    def claim(self, run: str) -> Iterator[None]:
        """Be the only process that works on a run for as long as the block lasts.

        Raises:
            RunError: another one does.
        """
        folder = self.path.with_name(f"{self.path.name}.locks")
        folder.mkdir(exist_ok=True)
        file = os.open(folder / run, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"the run {run} is being worked on.", "Wait until it has ended.") from None
            yield
        finally:
            os.close(file)

    def _query(self, sql: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"the log {self.path} cannot be read: {error}.") from None
