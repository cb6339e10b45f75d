"""A trainer on several ranks: the leader's says what is done next, the others do it with theirs.

    leader     step(episodes) ──▶ "step", episodes ──▶ all     every rank packs the whole step and computes its rows
               tensors(), trained(), checkpoint(), restore() ──▶ the same by name
    others     follow(): until "end"

A step's episodes go to every rank whole: they are token ids, a thousandth of what the ranks exchange for one layer's
weights, and each rank then comes to the same rows, denominators and metrics by itself.

Invariants: an order is announced once for each call, before anything of it is done; checkpoints are read by each rank
from the run's folder, which all must reach, and only whole ones of the announced version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from shoal.errors import RunError
from shoal.learner.checkpoint import Checkpoint, load, load_latest, path_of
from shoal.learner.ranks import Ranks
from shoal.learner.trainer import StepMetrics, Trainer
from shoal.protocol.codec import decode, encode
from shoal.protocol.episode import Episode
from shoal.protocol.work import BatchReply

MAX_STEP_BYTES = 2**31
"""Of a step's episodes; the coordinator's own bound on a batch is far below it."""


class LeadingTrainer(Trainer):
    """The leader's: each call is everybody's."""

    def __init__(self, *given: Any, ranks: Ranks, **named: Any) -> None:
        super().__init__(*given, ranks=ranks, **named)
        self._announce = ranks.announce

    def step(self, episodes: Sequence[Episode]) -> StepMetrics:
        self._announce("step", encode(BatchReply(version=self.version, episodes=tuple(episodes))))
        return super().step(episodes)

    def tensors(self) -> dict[str, Tensor]:
        self._announce("tensors")
        return super().tensors()

    def trained(self) -> dict[str, Tensor]:
        self._announce("trained")
        return super().trained()

    def checkpoint(self, extra: Mapping[str, bytes] | None = None) -> Checkpoint:
        self._announce("checkpoint")
        return super().checkpoint(extra)

    def restore(self, checkpoint: Checkpoint) -> None:
        self._announce("restore", str(checkpoint.version).encode())
        super().restore(checkpoint)

    def end(self) -> None:
        """Let the others go."""
        self._announce("end")


def follow(trainer: Trainer, ranks: Ranks, checkpoints: Path) -> None:
    """Do what the leader says, until it says that this is all."""
    orders: dict[str, Callable[[bytes], object]] = {
        "step": lambda payload: trainer.step(_episodes(payload)),
        "tensors": lambda _: trainer.tensors(),
        "trained": lambda _: trainer.trained(),
        "checkpoint": lambda _: trainer.checkpoint(),
        "restore": lambda payload: trainer.restore(load(path_of(checkpoints, int(payload)))),
    }
    while True:
        order, payload = ranks.told()
        if order == "end":
            return
        if order not in orders:
            raise RunError(f"the learner's leader says '{order}', which this process does not know.")
        orders[order](payload)


def continue_from(trainer: Trainer, checkpoints: Path) -> int | None:
    """Restore the newest whole checkpoint, if there is one; gives its version. By the leader, or a learner alone."""
    newest = load_latest(checkpoints)
    if newest is None:
        return None
    trainer.restore(newest)
    return newest.version


def _episodes(payload: bytes) -> tuple[Episode, ...]:
    return decode(payload, BatchReply, max_bytes=MAX_STEP_BYTES).episodes or ()
