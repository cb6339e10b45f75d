"""What the folder of a run that nobody runs says of it: how far it came, how it ended, how to go on."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import RecordError
from shoal.protocol.codec import from_json
from shoal.protocol.event import Event

TAIL_BYTES = 256 * 1024
"""Read from the end of the events and metrics."""


PAID_FOR = ("usd_idle", "usd_lost_", "usd_per_heldout_point")
"""How the names of costs begin."""


@dataclass(frozen=True)
class Ended:
    """A run that is not running."""

    name: str
    path: Path
    how: str
    """`finished`, `stopped` (in order, before its last step), `killed` (without a word), or `never began`."""
    step: int
    steps: int
    last_event: Event | None
    costs: dict[str, float]
    """Dollars by what they went to (`coordinator.costs`), as told last; empty where nothing had a price."""

    @property
    def next(self) -> str:
        """What to do now."""
        if self.how == "finished":
            return f"shoal chat {self.path}/model"
        return f"shoal train --resume {self.path}"

    @property
    def sentence(self) -> str:
        """For people."""
        ended = {
            "finished": "It finished",
            "stopped": "It was stopped",
            "killed": "It was killed or lost its machine",
            "never began": "It never began",
        }[self.how]
        when = f", {_ago(time.time() - self.last_event.time)} ago" if self.last_event is not None else ""
        return f"run {self.name} is not running. {ended} at step {self.step} of {self.steps}{when}."

    def as_json(self) -> dict[str, Any]:
        event = self.last_event
        last = None if event is None else {"time": event.time, "kind": event.kind, "node": event.node, **event.data}
        return {
            "run": self.name,
            "running": False,
            "how": self.how,
            "step": self.step,
            "steps": self.steps,
            "last_event": last,
            "costs": self.costs,
            "next": self.next,
        }


def read_ended(path: Path) -> Ended:
    """What is in the folder; nothing in it, however damaged, makes this fail."""
    events = _events(path / "events.jsonl")
    kinds = [event.kind for event in events]
    began = max((at for at, kind in enumerate(kinds) if kind == "run.started"), default=-1)
    if (path / "summary.json").exists() and "run.ended" in kinds[began + 1 :]:
        how = "finished"
    elif "run.ended" in kinds[began + 1 :]:
        how = "stopped"
    else:
        how = "killed" if kinds else "never began"
    lines = _tail(path / "metrics.jsonl")
    wanted = _steps_wanted(path / "config.toml")
    last = events[-1] if events else None
    return Ended(path.name, path, how, _object(lines, "step"), wanted, last, _costs(path / "summary.json", lines))


def _events(path: Path) -> list[Event]:
    found = []
    for line in _tail(path):
        try:
            found.append(from_json(line, Event))
        except RecordError:
            continue  # cut by the seek, or the half line of a killed writer
    return found


def _tail(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            return file.read().splitlines()
    except OSError:
        return []


def _object(lines: list[bytes], key: str) -> int:
    """The largest value of a key."""
    most = 0
    for line in lines:
        try:
            value = json.loads(line)[key]
            most = max(most, int(value))
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return most


def _costs(summary: Path, lines: list[bytes]) -> dict[str, float]:
    """Of the summary; where there is none, of the last step that told them."""
    whole = b"".join(_tail(summary))
    for line in (whole, *reversed(lines)):
        try:
            told = json.loads(line)
            found = {key: float(told[key]) for key in told if key == "usd" or key.startswith(PAID_FOR)}
        except (ValueError, TypeError, RecursionError):
            continue
        if "usd" in found:
            return found
    return {}


def _steps_wanted(path: Path) -> int:
    import tomllib

    try:
        return int(tomllib.loads(path.read_text(encoding="utf-8"))["run"]["steps"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
