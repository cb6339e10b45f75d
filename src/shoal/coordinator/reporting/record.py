"""What a run left on disk, read for people: metrics, events, configuration, summary, some episodes.

A run directory holds
- `metrics.jsonl`: `{"kind": "step", "step": 3, ...}` for each learner step and `{"kind": "eval", "version": 3, ...}`
  for each evaluation; further numbers are allowed. Two families of keys are read where they are there:
  `staleness/K` (rollouts of this step that were K versions old) and `rollouts/NAME` (rollouts that worker NAME gave);
- `events.jsonl`: protocol events; `config.toml`: the resolved configuration;
- `summary.json`, written at the end: `accuracy_before`, `accuracy_after`, the two with `_lenient`, `gain_interval`
  and `gain_interval_lenient` ([low, high] of the paired gain), `heldout_questions`, `seconds`, `worker_rollouts`
  (name -> rollouts), `samples` ([{question, answer, before, after}]), and whatever else is worth a line;
- `episodes/*.jsonl`: protocol episodes.

Invariants: reading never fails on an unfinished, crashed, resumed or empty run. A last line without its newline is
ignored, a damaged one counted; where a resumed run repeated a step, the later line counts. Numbers that are missing
or not finite are NaN.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shoal.config.toml import NoToml, tables_of
from shoal.errors import RecordError, RunError
from shoal.protocol.codec import from_json
from shoal.protocol.episode import Episode
from shoal.protocol.event import Event

MAX_LINES = 1_000_000
"""Lines read of one file; a run that has more is reported as far as this."""

MAX_LINE_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 24
"""Largest configuration or summary read, and how much of the newest episodes."""

Point = dict[str, Any]
"""One line of metrics."""


@dataclass(frozen=True)
class RunRecord:
    """Everything the plots and the report show."""

    path: Path
    steps: tuple[Point, ...]
    """In order of `step`, one each."""
    evals: tuple[Point, ...]
    """In order of `version`, one each."""
    events: tuple[Event, ...]
    event_counts: Counter[str]
    config_text: str
    config: dict[str, Any]
    summary: dict[str, Any]
    damaged_lines: int
    """Lines that were neither empty nor readable, the unfinished last ones not counted."""

    @property
    def started_at(self) -> float:
        """Unix seconds of the first thing that was recorded, or NaN."""
        times = [number(point, "time") for point in (*self.steps, *self.evals)] + [event.time for event in self.events]
        return min((time for time in times if math.isfinite(time)), default=math.nan)

    @property
    def staleness_bound(self) -> int | None:
        """The user's S, where the configuration names one."""
        learner = self.config.get("learner")
        bound = learner.get("max_staleness") if isinstance(learner, dict) else None
        return bound if isinstance(bound, int) else None

    def column(self, key: str) -> list[float]:
        """One number of every step, NaN where it is missing."""
        return [number(point, key) for point in self.steps]

    def total(self, key: str) -> float:
        """The sum of one number over the steps that have it."""
        return math.fsum(value for value in self.column(key) if math.isfinite(value))

    def family(self, prefix: str) -> dict[str, float]:
        """Totals of all keys `prefix/NAME`, by NAME."""
        totals: dict[str, float] = {}
        for point in self.steps:
            for key in point:
                if key.startswith(f"{prefix}/") and math.isfinite(number(point, key)):
                    name = key.removeprefix(f"{prefix}/")
                    totals[name] = totals.get(name, 0.0) + number(point, key)
        return totals

    def worker_rollouts(self) -> dict[str, float]:
        """Rollouts by worker, the largest first."""
        told = self.summary.get("worker_rollouts")
        counts = {k: number(told, k) for k in told} if isinstance(told, dict) else self.family("rollouts")
        finite = {name: count for name, count in counts.items() if math.isfinite(count)}
        return dict(sorted(finite.items(), key=lambda item: (-item[1], item[0])))

    def last_episodes(self, limit: int) -> list[Episode]:
        """The newest episodes that were written, at most `limit`."""
        files = sorted(self.path.glob("episodes/**/*.jsonl"), key=lambda file: (file.stat().st_mtime, file.name))
        found: list[Episode] = []
        for file in reversed(files[-8:]):
            with file.open("rb") as stream:
                stream.seek(max(0, file.stat().st_size - MAX_FILE_BYTES))
                lines = stream.read(MAX_FILE_BYTES).split(b"\n")[:-1]
            for line in reversed(lines):
                if len(found) == limit:
                    return found
                try:
                    found.append(from_json(line, Episode))
                except RecordError:
                    continue  # the first line may be cut by the seek; episodes are an illustration, not a count
        return found


def number(point: dict[str, Any], key: str) -> float:
    """A finite number of a line, or NaN."""
    value = point.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if usable and value is not None else math.nan


def read_run(path: Path) -> RunRecord:
    """What is in a run directory so far.

    Raises:
        RunError: there is no such directory.
    """
    if not path.is_dir():
        raise RunError(f"there is no run directory {path}.", "Name a folder that `shoal train` has written.")
    damaged = 0
    steps: dict[float, Point] = {}
    evals: dict[float, Point] = {}
    for line in _lines(path / "metrics.jsonl"):
        point = _object(line)
        index, into = ("step", steps) if point.get("kind") == "step" else ("version", evals)
        if point.get("kind") in ("step", "eval") and math.isfinite(number(point, index)):
            into[number(point, index)] = point
        else:
            damaged += 1
    events: list[Event] = []
    for line in _lines(path / "events.jsonl"):
        try:
            event = from_json(line, Event)
        except RecordError:
            damaged += 1
            continue
        if math.isfinite(event.time):
            events.append(event)
    config_text = _text(path / "config.toml")
    try:
        config = tables_of(config_text)
    except NoToml:
        config = {}
    return RunRecord(
        path=path,
        steps=tuple(steps[key] for key in sorted(steps)),
        evals=tuple(evals[key] for key in sorted(evals)),
        events=tuple(sorted(events, key=lambda event: event.time)),
        event_counts=Counter(event.kind for event in events),
        config_text=config_text,
        config=config,
        summary=_object(_text(path / "summary.json").encode()),
        damaged_lines=damaged,
    )


def _lines(path: Path) -> Iterator[bytes]:
    """The finished lines of a file; none where there is no file."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for line in islice(iter(lambda: stream.readline(MAX_LINE_BYTES), b""), MAX_LINES):
            if line.endswith(b"\n") and line.strip():
                yield line


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        return stream.read(MAX_FILE_BYTES).decode("utf-8", errors="replace")


def _object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`; empty where it is none. Python's parser, because metrics may hold NaN."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
