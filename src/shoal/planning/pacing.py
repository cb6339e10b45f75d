"""When a group may start so that it is as fresh as it can be without making the learner wait.

Admission (`planning/staleness`) says how early a group may start at most; workers that are faster than the learner go
to that limit, and nearly everything is consumed S versions old. The pacer adds the opposite question: how *late* may a
group start? Step t asks for its batch at τ(t), predicted from the last steps; a rollout takes L (a high quantile of
those measured), workers together finish Λ groups a second, and n of the step's groups are still to start, the asked
one included. So it may wait until

    opens_at = τ(t) − L − margin − n / Λ

Where workers cannot keep up (R/Λ > T_train), waiting for step t would cost a later step its batch: the latest step that
admission could open decides instead, and the pacer never closes.

`margin` is learnt: a learner that waited w seconds raises it by w; if each of the last `KEPT_STEPS` batches lay ready
for s seconds at least, it shrinks by `EASE`·(s − `RESERVE_SHARE`·T_train). So a rare late batch (a pause for a
snapshot, every κ steps) keeps its margin, and only slack that is always there is used up, whatever the estimates are
worth. The reserve is for what no estimate knows: workers that ask only now and then, machines that others use as well.

Invariants: the pacer only ever delays what admission allows; a group of the step that the learner waits for is never
delayed; what was lost is never delayed (`admits`); with nothing measured, nothing is delayed.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from shoal.planning.queue import GroupQueue

EASE = 0.1
"""Share of the smallest recent slack, less the reserve, by which the margin shrinks each step."""

RESERVE_SHARE = 0.25
"""A batch should lie ready for this share of a step before it is asked for; rollouts are as much staler."""

SHORT_SHARE = 0.8
"""Workers that make no more than a batch in this share of a step have no time to wait for anything."""

KEPT_STEPS = 9
"""T_train is the median of this many steps, so that one with a checkpoint does not count; slack is their smallest."""

KEPT_ROLLOUTS = 256
"""Durations remembered."""

DURATION_QUANTILE = 0.9
"""L: this share of the groups is done within it. Slower ones are what the margin learns."""


@dataclass
class Pacer:
    """The learner's rhythm and the groups' durations, as they were measured.

    Args:
        groups_per_step: R.
        max_staleness: S.
        rate: Λ, groups a second of all active workers; the caller keeps it current, 0 is unknown.
    """

    groups_per_step: int
    max_staleness: int
    rate: float = 0.0
    margin_s: float = 0.0
    train_s: float | None = None
    """T_train, once a step was measured."""
    lead_s: float = 0.0
    """L."""
    _trains: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    _slacks: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    """For how long each of the last batches had been ready; 0 where the learner waited."""
    _durations: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_ROLLOUTS))
    _finished_at: deque[float] = field(default_factory=deque)
    _step: int = -1
    _asked_at: float = 0.0
    _served_at: float | None = None

    def __post_init__(self) -> None:
        self._finished_at = deque(maxlen=(self.max_staleness + 2) * self.groups_per_step)

    def asked(self, step: int, now: float) -> None:
        """The learner, free again, asks for the batch of `step`; asking again changes nothing."""
        if step == self._step:
            return
        if step == self._step + 1 and self._served_at is not None:
            self._trains.append(now - self._served_at)
            self.train_s = statistics.median(self._trains)
        self._step, self._asked_at, self._served_at = step, now, None

    def served(self, step: int, buffered: int, now: float) -> None:
        """The learner got the batch of `step`; `buffered` groups had been ready, those of the batch included."""
        if step != self._step or self._served_at is not None:
            return
        self._served_at = now
        if self._durations:
            ordered = sorted(self._durations)
            self.lead_s = ordered[int(DURATION_QUANTILE * (len(ordered) - 1))]
        if self.train_s is None:
            return
        wait_s = now - self._asked_at
        self._slacks.append(0.0 if wait_s > 0 else self._slack_s(buffered, now))
        if wait_s > 0:
            self.margin_s += min(wait_s, self.train_s)
        elif len(self._slacks) == KEPT_STEPS:
            self.margin_s -= EASE * max(0.0, min(self._slacks) - RESERVE_SHARE * self.train_s)
        self.margin_s = min(max(self.margin_s, -self.lead_s), (self.max_staleness + 1) * self.train_s)

    def _slack_s(self, buffered: int, now: float) -> float:
        """A batch was complete when the last group but the surplus ones came in."""
        surplus = max(0, buffered - self.groups_per_step)
        return now - self._finished_at[-1 - surplus] if surplus < len(self._finished_at) else 0.0

    def finished(self, duration_s: float, now: float) -> None:
        """A group was accepted, `duration_s` after it was started."""
        self._durations.append(duration_s)
        self._finished_at.append(now)

    def opens_at(self, ahead: int) -> float:
        """The time from which a group may start that has `ahead` groups before it (`GroupQueue.ahead`)."""
        step = ahead // self.groups_per_step
        if self.max_staleness == 0 or self.train_s is None or self.rate <= 0 or step <= self._step:
            return -math.inf
        if self.groups_per_step > self.rate * self.train_s:
            step = max(step, self._step + self.max_staleness)
        if self._served_at is not None:
            due = self._served_at + (step - self._step) * self.train_s
        else:
            due = self._asked_at + (step - self._step) * self.train_s
        to_start = (step + 1) * self.groups_per_step - ahead
        return due - self.lead_s - self.margin_s - to_start / self.rate

    @property
    def is_short(self) -> bool:
        """Whether the workers can hardly keep up with the learner, as far as is known."""
        return self.train_s is not None and self.groups_per_step > SHORT_SHARE * self.rate * self.train_s

    def admits(self, queue: GroupQueue, now: float) -> bool:
        """Whether pacing lets `queue` start its next group now; admission is the queue's own business."""
        return bool(queue.pending) or now >= self.opens_at(queue.ahead)
