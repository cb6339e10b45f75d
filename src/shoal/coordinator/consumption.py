"""Whose rollouts trained the policy, and how stale they were: counted once for each batch, whatever is killed when.

A batch is counted before the learner gets it, and a batch is always asked for again unless the learner has a later
checkpoint; so what a killed coordinator had not counted yet is counted when the batch is handed out again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from shoal.coordinator.rundir import RunDir
from shoal.protocol.episode import Episode

FILE = "consumed.json"


class Consumption:
    """Counts over all batches of a run, kept on disk."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        path = run.path / FILE
        kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self._num_batches = int(kept.get("batches", 0))
        self._by_node = Counter[str](kept.get("rollouts", {}))
        self._names: dict[str, str] = kept.get("names", {})
        self.max_staleness = int(kept.get("max_staleness", 0))

    def count(self, step: int, episodes: tuple[Episode, ...], name_of: Callable[[str], str]) -> dict[str, int]:
        """Count the batch of `step` unless it has been; gives what its line of metrics says of it."""
        for node_id in {e.worker for e in episodes}:
            name = name_of(node_id)
            if name != node_id:  # a coordinator that was restarted knows the name from before
                self._names[node_id] = name
        by_node = Counter(e.worker for e in episodes)
        staleness = Counter(step - e.version for e in episodes)
        if step >= self._num_batches:
            self._num_batches = step + 1
            self._by_node.update(by_node)
            self.max_staleness = max(self.max_staleness, *staleness)
            kept = {
                "batches": self._num_batches,
                "rollouts": self._by_node,
                "names": self._names,
                "max_staleness": self.max_staleness,
            }
            self._run.write_atomic(FILE, json.dumps(kept).encode())
        facts = {f"staleness/{k}": n for k, n in sorted(staleness.items())}
        return facts | {f"rollouts/{name}": n for name, n in sorted(self._named(by_node).items())}

    @property
    def by_name(self) -> Counter[str]:
        """Rollouts that trained the policy, by worker."""
        return self._named(self._by_node)

    def _named(self, by_node: Counter[str]) -> Counter[str]:
        named = Counter[str]()
        for node_id, count in by_node.items():
            named[self._names.get(node_id, node_id)] += count
        return named
