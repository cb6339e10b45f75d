"""What a node did for a collective, kept as episodes: JSON Lines that `shoal sft` learns and `environment` plays again.

    step or plan done ──▶ verdict: what the chain's answer was worth ──▶ reward ──▶ one line

An episode of which nobody said what it was worth is `void`, with that reason: it is never reward 0.

Invariant: a line is whole or the last; what was drawn is kept token by token.
"""

from __future__ import annotations

import logging
from pathlib import Path

from msgspec.structs import replace

from shoal.agents.collective.work import Plan, Work
from shoal.errors import StorageError
from shoal.protocol.codec import to_json
from shoal.protocol.collective import Place
from shoal.protocol.episode import Episode

log = logging.getLogger("shoal.collective")

UNJUDGED = "nobody said what it was worth"


class EpisodeFile:
    """Adds a node's parts to a file. Its methods are what `CollectiveNode` takes as `on_work` and `on_plan`.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(self, path: Path, worker: str) -> None:
        self.path = path
        self.num_kept = 0
        self._worker = worker
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
        except OSError as error:
            raise _unwritable(path, error) from None

    def on_work(self, place: Place, work: Work, score: float | None) -> None:
        """Keep a step."""
        self._keep(work.episode, score)

    def on_plan(self, chain: str, plan: Plan, score: float | None) -> None:
        """Keep a chain's writing."""
        self._keep(plan.episode, score)

    def _keep(self, episode: Episode | None, score: float | None) -> None:
        if episode is None:
            return  # An endpoint's text is no token.
        if score is None:
            kept = replace(episode, outcome="void", void_reason=UNJUDGED, worker=self._worker)
        else:
            kept = replace(episode, reward=score, reward_parts={"chain": score}, worker=self._worker)
        try:
            with self.path.open("ab") as lines:
                lines.write(to_json(kept) + b"\n")
        except OSError as error:
            log.warning("an episode is lost: %s", _unwritable(self.path, error))
            return
        self.num_kept += 1


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be written: {error.strerror}.", "Name another file.")
