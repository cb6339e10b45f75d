"""The loop's own folder in its run's folder, and how far it is: what `--resume` goes on from.

    RUN/loop/   state.json            the stage, what runs, seconds by stage
                before.jsonl, after.jsonl               held-out answers, a line each
                problems-before.jsonl, -after.jsonl     held-out problems of the collective, a line each
                practice.jsonl        exercises and problems while training, a line each
                requests.jsonl        a client's requests to the server, a line each
                steps.jsonl           what experts did, as episodes: trained on
                memory/, collective/  memories; the collective's door
                *-ticket.txt          for other machines, mode 0600

Invariants: one process at a time works on a loop; a stage that ended does not begin again; what a stage has measured is
on disk line by line, so that a stage that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import replace

from shoal.coordinator.rundir import RunDir
from shoal.errors import RecordError, RunError, StorageError
from shoal.protocol.codec import Record, from_json, to_json

FOLDER, STATE = "loop", "state.json"

Stage = Literal["before", "train", "after", "done"]
When = Literal["before", "after"]


class LoopState(Record, frozen=True):
    """How far a loop is."""

    minutes: float
    memory: bool
    collective: bool
    left_out: dict[str, str] = {}
    stage: Stage = "before"
    seconds: dict[str, float] = {}
    """Stage -> seconds spent in it."""
    most_processes: int = 0
    """Seen at once."""
    learnt: int = 0
    """Steps whose episodes memory has looked at."""
    restarts: dict[str, int] = {}
    """Process -> how often it died and was started again."""

    def check(self) -> None:
        if self.minutes <= 0:
            raise RecordError("a loop has no time.")


class LoopFolder:
    """One loop's folder, kept to this process while it is open.

    Raises:
        RunError: another process has it.
    """

    def __init__(self, run: Path, fresh: LoopState | None = None) -> None:
        """
        Args:
            fresh: the state of a loop that begins; None: it is there.

        Raises:
            RunError: there is none, or another process works on it.
            StorageError: its state is damaged.
        """
        self.run = run
        self.files = RunDir(run / FOLDER)
        self.path = self.files.path
        if fresh is not None:
            self.path.mkdir(parents=True, exist_ok=True)
        elif not (self.path / STATE).exists():
            raise RunError(f"the run in {run} was not begun by shoal loop.", "Continue it by shoal train --resume.")
        self.files.lock()
        try:
            self.state = fresh or from_json((self.path / STATE).read_bytes(), LoopState)
        except RecordError as error:
            self.files.close()
            raise StorageError(f"{self.path / STATE} is damaged: {error.problem}", "Begin a new loop.") from None
        if fresh is not None:
            self._write()

    def set(self, **changes: Any) -> None:
        """Change the state, on disk too."""
        self.state = replace(self.state, **changes)
        self._write()

    def spent(self, stage: str, seconds: float) -> None:
        """Add to a stage's time."""
        self.set(seconds={**self.state.seconds, stage: self.state.seconds.get(stage, 0.0) + seconds})

    def restarted(self, name: str) -> None:
        """A process died and is started again."""
        self.set(restarts={**self.state.restarts, name: self.state.restarts.get(name, 0) + 1})

    def add(self, name: str, **values: Any) -> None:
        """Add a line to one of the files."""
        self.files.append(name, json.dumps(values, ensure_ascii=False).encode())

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of one of the files."""
        return list(lines_of(self.path / name))

    def close(self) -> None:
        self.files.close()

    def _write(self) -> None:
        self.files.write_atomic(STATE, to_json(self.state))


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; half a line that a killed writer left is passed over."""
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)
