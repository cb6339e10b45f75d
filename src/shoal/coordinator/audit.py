"""Did a run keep its promises, whatever was killed on the way? Judged from its folder alone.

    started  = accepted + lost + running        (groups; lost: void, rejected or expired, and drawn again)
    accepted = consumed + swept + buffered

Responsibilities: follow every group of rollouts through the journal, and every episode into the step that consumed it.

Invariants: reads only; a run that goes on or was killed at any moment can be audited (what is written in two moves,
the journal's line last, counts from its line). What a checkpoint made superfluous (old batches) is not missed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.coordinator.journal import JOURNAL, Entry
from shoal.errors import RunError
from shoal.protocol.codec import read_jsonl
from shoal.protocol.episode import Episode

MAX_PROBLEMS = 50
"""Sentences kept; the rest are only counted."""

GROUP = re.compile(r"g(\d+)")
"""Names of groups for training; those of evaluations are others."""

ALLOWED: dict[str, tuple[str, ...]] = {
    "start": ("new", "lost"),
    "lost": ("start",),
    "accept": ("start",),
    "batch": ("accept",),
    "sweep": ("accept",),
}
"""What may happen to a group after what."""


@dataclass
class Audit:
    """What was found. A run that kept its promises has zeros in the last four."""

    steps: int = 0
    started: int = 0
    accepted: int = 0
    lost_leases: int = 0
    """Leases of groups that came to nothing: the groups were drawn again."""
    consumed: int = 0
    swept: int = 0
    buffered: int = 0
    running: int = 0
    max_staleness: int = 0
    lost: int = 0
    """Accepted groups, or steps, that are nowhere."""
    duplicated: int = 0
    """Groups, episodes or steps that count twice."""
    staleness_violations: int = 0
    """Episodes consumed by a step that is more than S versions later, or earlier, than their oldest token's."""
    disorder: int = 0
    """Lines of the journal that cannot follow those before them, and sums that do not add up."""
    problems: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not (self.lost or self.duplicated or self.staleness_violations or self.disorder)


def audit(run: Path, *, max_staleness: int, acknowledged: Collection[str] = ()) -> Audit:
    """Judge a run's folder.

    Args:
        max_staleness: S.
        acknowledged: groups that workers know to have been accepted: they must not be missing.

    Raises:
        RunError: there is no run.
        RecordError: a file in the middle of which something cannot be read.
    """
    if not (run / "config.toml").exists():
        raise RunError(f"there is no run in {run}.", "Give the folder of a run.")
    found = Audit()
    where = _follow_groups(run, found)
    _follow_steps(run, where, found, max_staleness)
    for group in sorted(set(acknowledged)):
        match = GROUP.fullmatch(group)
        if match and where.get(int(match[1]), "new") not in ("accept", "batch", "sweep"):
            _tell(found, "lost", f"group {group} was acknowledged to its worker and is nowhere")
    return found


def _follow_groups(run: Path, found: Audit) -> dict[int, str]:
    """Where each group has got to, from the journal."""
    where: dict[int, str] = {}
    ends: Counter[str] = Counter()
    for entry in read_jsonl(run / JOURNAL, Entry) if (run / JOURNAL).exists() else ():
        for number in entry.numbers:
            before = where.get(number, "new")
            if before not in ALLOWED[entry.what]:
                twice = before in ("batch", "sweep") and entry.what == "batch"
                kind = "duplicated" if twice else "disorder"
                _tell(found, kind, f"group {number}: '{entry.what}' after '{before}'")
            where[number] = entry.what
            ends[entry.what] += 1
    left = Counter(where.values())
    found.started, found.accepted, found.lost_leases = ends["start"], ends["accept"], ends["lost"]
    found.consumed, found.swept = ends["batch"], ends["sweep"]
    found.running, found.buffered = left["start"], left["accept"]
    if found.started != found.accepted + found.lost_leases + found.running:
        _tell(found, "disorder", "started is not accepted + lost + running")
    if found.accepted != found.consumed + found.swept + found.buffered:
        _tell(found, "disorder", "accepted is not consumed + swept + buffered")
    for number in sorted(n for n, what in where.items() if what == "accept"):
        if not (run / f"buffer/{number:06d}").exists():
            _tell(found, "lost", f"group {number} was accepted, and its episodes are gone")
    return where


def _follow_steps(run: Path, where: dict[int, str], found: Audit, max_staleness: int) -> None:
    """Whether each step was done once, with whole groups that nothing else consumed, and fresh ones."""
    done = [line["step"] for line in _metrics(run) if line.get("kind") == "step"]
    found.steps = len(set(done))
    for step, times in Counter(done).items():
        if times > 1:
            _tell(found, "duplicated", f"step {step} has {times} lines")
    for step in sorted(set(range(1, max(done, default=0) + 1)) - set(done)):
        _tell(found, "lost", f"step {step} has no line")
    by_group: dict[str, int] = {}
    seen: set[str] = set()
    kept = sorted((run / "episodes").glob("*.jsonl"))
    for path in kept:
        step = int(path.stem)
        for episode in read_jsonl(path, Episode):
            if episode.id in seen:
                _tell(found, "duplicated", f"episode {episode.id} was consumed twice")
            seen.add(episode.id)
            if by_group.setdefault(episode.group, step) != step:
                _tell(found, "duplicated", f"group {episode.group} was consumed by two steps")
            staleness = step - episode.version
            found.max_staleness = max(found.max_staleness, staleness)
            if not 0 <= staleness <= max_staleness:
                _tell(found, "staleness_violations", f"episode {episode.id} has staleness {staleness} at step {step}")
    if not kept:
        return  # This run was told to keep none (`output.keep_episodes`).
    consumed = {f"g{number}" for number, what in where.items() if what == "batch"}
    for group in sorted(by_group.keys() - consumed):
        _tell(found, "disorder", f"group {group} was consumed, and the journal does not say so")
    for step in sorted(set(range(found.steps)) - set(by_group.values())):
        _tell(found, "lost", f"the episodes of step {step + 1} are gone")


def _metrics(run: Path) -> Iterator[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)


def _tell(found: Audit, kind: str, sentence: str) -> None:
    setattr(found, kind, getattr(found, kind) + 1)
    if len(found.problems) < MAX_PROBLEMS:
        found.problems.append(sentence)
