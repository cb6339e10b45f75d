"""A run's folder: where everything lies, and writers that a kill cannot corrupt.

    config.toml      resolved configuration            metrics.jsonl   one line a step or evaluation
    events.jsonl     what happened, for people         episodes/       consumed rollouts, readable, one file a step
    batches/         batches the learner may replay    buffer/         accepted groups not yet consumed
    journal.jsonl    the queue's history               checkpoints/    the learner's
    snapshots/       published versions                model/          the trained model, Hugging Face format
    logs/            one file a process                summary.json, report.html, plots/
    secrets.json     join secret and port, mode 0600   identity/       the coordinator's key

Invariants: a file written by `write_atomic` is whole or absent; an appended line is whole or the last.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from pathlib import Path
from typing import Any, BinaryIO

from shoal.errors import RunError, StorageError
from shoal.protocol.codec import Record, to_json
from shoal.protocol.event import Event


class RunDir:
    """Paths and writers of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._appending: dict[str, BinaryIO] = {}

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
            for part in ("batches", "buffer", "episodes", "logs", "identity", "snapshots", "checkpoints"):
                (run.path / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _storage_error(run.path, error) from None
        return run

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run's folder; raises `RunError` if there is none."""
        run = cls(path)
        if not (run.path / "config.toml").exists():
            raise RunError(f"there is no run in {run.path}.", "List the folder 'runs' to see which there are.")
        for part in ("batches", "buffer", "episodes", "logs", "identity", "snapshots", "checkpoints"):
            (run.path / part).mkdir(parents=True, exist_ok=True)
        return run

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
            scratch.unlink(missing_ok=True)
            raise _storage_error(self.path, error) from None

    def append(self, name: str, line: bytes) -> None:
        """Add one line to a file, at once visible to others and safe against a kill of this process."""
        try:
            file = self._appending.get(name)
            if file is None:
                file = self._appending[name] = (self.path / name).open("ab", buffering=0)
                if file.tell() and not (self.path / name).read_bytes().endswith(b"\n"):
                    file.write(b"\n")  # a killed writer left half a line: it stays alone
            file.write(line + b"\n")
        except OSError as error:
            raise _storage_error(self.path, error) from None

    def append_record(self, name: str, record: Record) -> None:
        self.append(name, to_json(record))

    def event(self, kind: str, node: str = "", **data: Any) -> Event:
        """Note what happened; gives the event."""
        event = Event(time=time.time(), node=node, kind=kind, data=data)
        self.append_record("events.jsonl", event)
        return event

    def metric(self, **values: Any) -> None:
        """Add a line to `metrics.jsonl`, with the time."""
        self.append("metrics.jsonl", json.dumps({"time": time.time(), **values}, separators=(",", ":")).encode())

    def close(self) -> None:
        """Close what was appended to."""
        for file in self._appending.values():
            file.close()
        self._appending.clear()


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
