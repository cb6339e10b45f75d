"""A run's folder: where everything lies, and writers that a kill cannot corrupt.

    config.toml      resolved configuration            metrics.jsonl   one line a step or evaluation
    events.jsonl     what happened, for people         episodes/       consumed rollouts, readable, one file a step
    batches/         batches the learner may replay    buffer/         accepted groups not yet consumed
    journal.jsonl    the queue's history               checkpoints/    the learner's
    snapshots/       published versions                model/          the trained model, Hugging Face format
    logs/            one file a process                summary.json, report.html, plots/
    secrets.json     tickets' secrets and the port     identity/       keys of the run's own processes
    ticket.txt       for others to join with           own-ticket.txt  for the run's own processes
    invites.json     who may still join                revocations.bin what was taken back: all these mode 0600
    evals/           answers to held-out questions     consumed.json   whose rollouts trained, and how stale

Invariants: a file written by `write_atomic` is whole or absent; an appended line is whole or the last, and half a line
that a killed writer left is cut off before anything is read or appended; after a line that could not be appended none
is, until the run is opened again: it could follow half a line, or tell what came of something that is not told; one
process at a time runs a run (`lock`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from shoal.errors import RunError, StorageError
from shoal.protocol.codec import Record, to_json
from shoal.protocol.event import Event

FOLDERS = ("batches", "buffer", "episodes", "evals", "logs", "identity", "snapshots", "checkpoints")

SCAN_BYTES = 1 << 16
"""Read at once while looking back for the last line's end."""


class RunDir:
    """Paths and writers of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._appending: dict[str, FileIO] = {}
        self.on_metric: Callable[[dict[str, Any]], None] | None = None
        """Given each line of metrics as well."""
        self._lock: FileIO | None = None
        self._refusal: StorageError | None = None
        """Why nothing is appended any more."""
        self._is_new = not self.path.exists()

    @classmethod
    def create(cls, path: Path) -> RunDir:
        """A new run's folder; raises `RunError` if there is a run in it already."""
        run = cls(path)
        try:
            if (run.path / "config.toml").exists():
                raise RunError(
                    f"there is a run in {run.path} already.",
                    "Continue it with --resume, or choose another run.name.",
                )
        except OSError as error:
            raise _storage_error(run.path, error) from None
        run._make_folders()
        return run

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run's folder; raises `RunError` if there is none."""
        run = cls(path)
        if not (run.path / "config.toml").exists():
            raise RunError(f"there is no run in {run.path}.", "List the folder 'runs' to see which there are.")
        run._make_folders()
        return run

    def _make_folders(self) -> None:
        try:
            for part in FOLDERS:
                (self.path / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _storage_error(self.path, error) from None

    def lock(self) -> None:
        """Keep the run to this process until it ends or closes the run, however it ends.

        Raises:
            RunError: another process runs it.
        """
        try:
            self._lock = (self.path / "lock").open("ab", buffering=0)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise RunError(
                f"the run in {self.path} is going on in another process.", "Wait for it, or end it first."
            ) from None
        except OSError as error:
            raise _storage_error(self.path, error) from None

    def discard_unstarted(self) -> None:
        """Remove the folder if this object made it and nothing ever happened in it."""
        if self._is_new and not (self.path / "events.jsonl").exists():
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def name(self) -> str:
        return self.path.name

    def write_atomic(self, name: str, data: bytes, *, mode: int = 0o644) -> None:
        """Replace a file as a whole."""
        target = self.path / name
        scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, target)
        except OSError as error:
            with contextlib.suppress(OSError):  # on a disk that is read-only not even that can be done
                scratch.unlink(missing_ok=True)
            raise _storage_error(self.path, error) from None

    def append(self, name: str, line: bytes) -> None:
        """Add one line to a file, at once visible to others and safe against a kill of this process."""
        if self._refusal is not None:
            raise StorageError(self._refusal.problem, self._refusal.remedy)
        try:
            file = self._appending.get(name)
            if file is None:
                self.cut_half_line(name)
                file = self._appending[name] = (self.path / name).open("ab", buffering=0)
            rest = memoryview(line + b"\n")
            while rest:  # a disk that is nearly full takes a part without complaint
                rest = rest[file.write(rest) :]
        except OSError as error:
            self._refusal = _storage_error(self.path, error)
            raise self._refusal from None

    def cut_half_line(self, name: str) -> None:
        """Remove the unfinished last line that a killed writer left."""
        path = self.path / name
        if not path.exists():
            return
        with path.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            whole = end
            while whole:
                start = max(0, whole - SCAN_BYTES)
                file.seek(start)
                newline = file.read(whole - start).rfind(b"\n")
                if newline >= 0:
                    whole = start + newline + 1
                    break
                whole = start
            if whole < end:
                file.truncate(whole)

    def append_record(self, name: str, record: Record) -> None:
        self.append(name, to_json(record))

    def event(self, kind: str, node: str = "", **data: Any) -> Event:
        """Note what happened; gives the event."""
        event = Event(time=time.time(), node=node, kind=kind, data=data)
        self.append_record("events.jsonl", event)
        return event

    def metric(self, **values: Any) -> None:
        """Add a line to `metrics.jsonl`, with the time."""
        line = {"time": time.time(), **values}
        self.append("metrics.jsonl", json.dumps(line, separators=(",", ":")).encode())
        if self.on_metric is not None:
            self.on_metric(line)

    def last_logged_step(self) -> int:
        """The newest step in `metrics.jsonl`; 0 for none."""
        path = self.path / "metrics.jsonl"
        last = 0
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                last = max(last, int(json.loads(line).get("step", 0)))
            except ValueError:
                continue  # the half line of a killed writer
        return last

    def close(self) -> None:
        """Close what was appended to, and give up the lock."""
        for file in self._appending.values():
            file.close()
        self._appending.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _storage_error(path: Path, error: OSError) -> StorageError:
    try:
        stat = os.statvfs(path)
        free = f"{stat.f_bavail * stat.f_frsize / 2**20:.0f} MiB free"
    except OSError:
        free = "free space unknown"
    return StorageError(
        f"the run's folder {path} cannot be written: {error.strerror} ({free}).",
        "Free some space or choose another run.dir; then continue with --resume.",
    )
