"""What a run's folder tells, read on as it grows: curves, held-out accuracy, staleness, who fed whom, what happened.

Invariants: `read` takes at most `READ_BYTES` of each file, so that a run of a million events opens at once and fills
up over the next looks; what is kept is bounded (`Series`, counters of at most `MAX_NAMES` names, the newest
`MAX_EVENTS` events, `MAX_EVALS` evaluations); a step that a resumed run repeated counts once, its later line for the
curves. Damaged lines are counted and otherwise passed over.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.coordinator.reporting.record import Point, number
from shoal.errors import RecordError
from shoal.protocol.codec import from_json
from shoal.protocol.event import Event
from shoal.serving.console.series import Series
from shoal.serving.console.tail import MAX_LINE_BYTES, Tail

READ_BYTES = 8 * 2**20
"""Read of one file at one look: some hundred milliseconds."""

MAX_EVENTS = 500
MAX_EVALS = 1000
MAX_NAMES = 256
MAX_FILE_BYTES = 1 << 22
"""Of the configuration and the summary."""

CHARTED = frozenset({
    "reward", "reward_std", "loss", "grad_norm", "entropy", "mismatch_kl", "clip_fraction", "staleness_mean",
    "staleness_max", "utilisation", "rollout_tokens_per_s", "tokens_per_s", "response_tokens_mean", "train_s", "wait_s",
    "publish_s", "broadcast_s", "workers", "usd", "usd_per_hour", "capacity/predicted_utilisation",
})  # fmt: skip
"""Numbers of a step that become curves."""


@dataclass(frozen=True)
class Evaluation:
    """One measurement on held-out questions."""

    version: int
    strict: float
    lenient: float
    questions: int


@dataclass
class RunState:
    """What has been read so far."""

    curves: dict[str, Series] = field(default_factory=dict)
    evals: dict[int, Evaluation] = field(default_factory=dict)
    staleness: Counter[int] = field(default_factory=Counter)
    """Rollouts that were trained on, by their age in versions."""
    rollouts: Counter[str] = field(default_factory=Counter)
    """By the worker that gave them."""
    fed: dict[str, Counter[str]] = field(default_factory=dict)
    """Worker -> source -> bytes of new weights."""
    arrivals: dict[str, Point] = field(default_factory=dict)
    """Worker -> what came to it last."""
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    kinds: Counter[str] = field(default_factory=Counter)
    last: Point = field(default_factory=dict)
    """The newest step's line."""
    started_at: float = math.nan
    newest_at: float = math.nan
    num_damaged: int = 0
    counted: float = 0.0
    """The newest step that was counted: one that a resumed run repeats is not counted again."""

    @property
    def step(self) -> int:
        """The newest learner step; 0 before the first."""
        return int(number(self.last, "step")) if self.last else 0

    def metric(self, point: Point) -> None:
        """Take in one line of metrics."""
        self._seen(number(point, "time"))
        if point.get("kind") == "eval":
            version, strict = number(point, "version"), number(point, "strict")
            if math.isfinite(version) and len(self.evals) < MAX_EVALS:
                questions = number(point, "questions")
                self.evals[int(version)] = Evaluation(
                    int(version), strict, number(point, "lenient"), int(questions) if math.isfinite(questions) else 0
                )
            return
        step = number(point, "step")
        if point.get("kind") != "step" or not math.isfinite(step):
            self.num_damaged += 1
            return
        for key in CHARTED & point.keys():
            self.curves.setdefault(key, Series()).add(step, number(point, key))
        if step > self.counted:
            self.counted = step
            self._count(point)
        self.last = point

    def _count(self, point: Point) -> None:
        for key in point:
            family, _, name = key.partition("/")
            count = number(point, key)
            if not name or not 0 <= count < 1e12:
                continue
            if family == "staleness" and name.isdecimal() and len(name) < 6:
                self.staleness[int(name)] += int(count)
            elif family == "rollouts" and (name in self.rollouts or len(self.rollouts) < MAX_NAMES):
                self.rollouts[name] += int(count)

    def event(self, event: Event) -> None:
        """Take in one event."""
        self._seen(event.time)
        self.events.append(event)
        if event.kind in self.kinds or len(self.kinds) < MAX_NAMES:
            self.kinds[event.kind] += 1
        if event.kind == "snapshot.arrived":
            self._arrived(event)

    def _arrived(self, event: Event) -> None:
        taker, sources = str(event.data.get("name", event.node)), event.data.get("by_source")
        if not isinstance(sources, dict) or (taker not in self.fed and len(self.fed) >= MAX_NAMES):
            return
        self.arrivals[taker] = event.data
        row = self.fed.setdefault(taker, Counter())
        for source in sources:
            amount = number(sources, source)
            if 0 <= amount < 1e15 and (source in row or len(row) < MAX_NAMES):
                row[source] += int(amount)

    def _seen(self, time: float) -> None:
        if math.isfinite(time):
            self.started_at = min(time, self.started_at) if math.isfinite(self.started_at) else time
            self.newest_at = max(time, self.newest_at) if math.isfinite(self.newest_at) else time


class RunFolder:
    """One run's folder, read on and on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = RunState()
        self.config: dict[str, Any] = {}
        self.config_text = ""
        self.summary: dict[str, Any] = {}
        self._metrics, self._events = Tail(path / "metrics.jsonl"), Tail(path / "events.jsonl")
        self._seen: dict[str, tuple[int, int]] = {}

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def share_read(self) -> float:
        """Of its files."""
        return min(self._metrics.share_read, self._events.share_read)

    @property
    def num_behind(self) -> int:
        """Bytes that wait to be read; an unfinished line is none of them."""
        behind = self._metrics.behind_bytes, self._events.behind_bytes
        return sum(count for count in behind if count > MAX_LINE_BYTES)

    @property
    def steps_wanted(self) -> int:
        """What the configuration asks for; 0 where it does not say."""
        run = self.config.get("run")
        steps = run.get("steps") if isinstance(run, dict) else None
        return steps if isinstance(steps, int) else 0

    @property
    def staleness_bound(self) -> int | None:
        """The user's S."""
        learner = self.config.get("learner")
        bound = learner.get("max_staleness") if isinstance(learner, dict) else None
        return bound if isinstance(bound, int) else None

    @property
    def has_ended(self) -> bool:
        """Whether its newest life came to its end; one that was killed has not."""
        for event in reversed(self.state.events):
            if event.kind in ("run.started", "run.ended"):
                return event.kind == "run.ended"
        return False

    def read(self) -> bool:
        """Read on; whether there was anything new."""
        metrics, events = self._metrics.read(READ_BYTES), self._events.read(READ_BYTES)
        changed = self._read_small()
        if metrics.anew or events.anew:
            # Another run under this name: all of it is read again.
            self.state, changed = RunState(), True
            self._metrics, self._events = Tail(self.path / "metrics.jsonl"), Tail(self.path / "events.jsonl")
            metrics, events = self._metrics.read(READ_BYTES), self._events.read(READ_BYTES)
        for line in metrics.lines:
            self.state.metric(_object(line))
        for line in events.lines:
            try:
                event = from_json(line, Event)
            except RecordError:
                self.state.num_damaged += 1
                continue
            self.state.event(event)
        return bool(metrics.lines or events.lines or changed)

    def _read_small(self) -> bool:
        """The configuration and the summary, where they have changed."""
        changed = False
        for name in ("config.toml", "summary.json"):
            path = self.path / name
            try:
                stat = path.stat()
                if (mark := (stat.st_mtime_ns, stat.st_size)) == self._seen.get(name):
                    continue
                with path.open("rb") as file:
                    text = file.read(MAX_FILE_BYTES).decode("utf-8", errors="replace")
            except OSError:
                continue
            self._seen[name], changed = mark, True
            if name == "summary.json":
                self.summary = _object(text.encode())
            else:
                self.config_text, self.config = text, _toml(text)
        return changed


def _object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`; empty where it is none. Python's parser, because metrics may hold NaN."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}
