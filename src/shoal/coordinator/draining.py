"""The end of a run that may cost no more: nothing new starts, what runs may end, the learner's state is saved.

    begin ──▶ no more leases ──▶ the learner asks for its next batch, is told to save, reports ──▶ over

Invariant: `is_over` comes true, whatever workers and learner do: `MOST_S` after the beginning at the latest.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import RunError

USUAL_S = 60.0
"""What a drain costs is counted with at least so long: the end of a step, a checkpoint, the last rollouts."""

MOST_S = 600.0
"""A learner that has not saved by then will not."""

LAST_ROLLOUTS_S = 60.0
"""Rollouts that run when the learner has saved may take so long; later ones are leased again after a resume."""


@dataclass
class Drain:
    """A drain under way. Times are seconds on the run's monotonic clock."""

    reason: str
    began_at: float
    saved_at: float | None = None

    def saved(self, now: float) -> None:
        """The learner's state is on disk."""
        if self.saved_at is None:
            self.saved_at = now

    def is_over(self, num_running: int, now: float) -> bool:
        """Whether the run ends now.

        Args:
            num_running: rollouts under running leases.
        """
        if now >= self.began_at + MOST_S:
            return True
        return self.saved_at is not None and (num_running == 0 or now >= self.saved_at + LAST_ROLLOUTS_S)

    def error(self, step: int, steps: int) -> RunError:
        """What to tell people."""
        saved = "its state is saved" if self.saved_at is not None else "its learner did not save within ten minutes"
        return RunError(
            f"{self.reason}; the run stopped at step {step} of {steps}, and {saved}.",
            "Raise the bound in its config.toml and continue with --resume.",
        )
