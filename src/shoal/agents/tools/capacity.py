"""Slots: how many calls run at once, of each tool, of each run, and in all.

A call takes its tool's, its run's and the common slot together or none, so one that waits for a busy tool keeps
nothing from others. Calls of one run and tool are served in order; among these queues the longest waiting head that
fits goes first.

Invariants: no counter ever exceeds its limit, whatever asks; every slot taken is given back exactly once, by whoever
took it or by the work that outlived its caller; a cancelled wait leaves no trace.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

TOTAL = ""
"""The key that every call counts against."""


@dataclass
class Slot:
    """A place taken; `release` gives it back, once."""

    _give_back: Callable[[], None]
    _held: bool = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._give_back()


@dataclass
class _Waiting:
    order: int
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Capacity:
    """Counts what runs.

    Args:
        total: calls at once, over all tools and runs.
    """

    def __init__(self, total: int) -> None:
        self._limits: dict[str, int] = {TOTAL: total}
        self._taken: dict[str, int] = {}
        self._queues: dict[tuple[str, str], deque[_Waiting]] = {}
        self._order = 0
        self.exceeded = 0
        """How often a limit was found exceeded; anything but 0 is a defect, and benchmarks look at it."""

    def limit(self, key: str, count: int) -> None:
        """Allow `count` at once for a tool or a run."""
        self._limits[key] = count

    def forget(self, key: str) -> None:
        """A run has ended."""
        self._limits.pop(key, None)

    def taken(self, key: str = TOTAL) -> int:
        return self._taken.get(key, 0)

    def take_at_once(self, tool: str, run: str) -> Slot | None:
        """A slot, if one is free and nobody waits for the same."""
        if self._queues.get((tool, run)) or not self._fits(tool, run):
            return None
        return self._take(tool, run)

    async def take(self, tool: str, run: str) -> Slot:
        """A slot, when there is one."""
        if (slot := self.take_at_once(tool, run)) is not None:
            return slot
        self._order += 1
        waiting = _Waiting(self._order)
        queue = self._queues.setdefault((tool, run), deque())
        queue.append(waiting)
        try:
            await waiting.granted
        except asyncio.CancelledError:
            if waiting.granted.done() and not waiting.granted.cancelled():
                self._release(tool, run)  # Granted and cancelled in the same moment.
            else:
                with suppress(ValueError):  # `_grant` has passed over it already.
                    queue.remove(waiting)
                self._drop_if_empty(tool, run)
            raise
        return self._slot(tool, run)

    def _fits(self, tool: str, run: str) -> bool:
        return all(self._taken.get(key, 0) < self._limits.get(key, 1 << 30) for key in (tool, run, TOTAL))

    def _take(self, tool: str, run: str) -> Slot:
        for key in (tool, run, TOTAL):
            self._taken[key] = self._taken.get(key, 0) + 1
            self.exceeded += self._taken[key] > self._limits.get(key, 1 << 30)
        return self._slot(tool, run)

    def _slot(self, tool: str, run: str) -> Slot:
        return Slot(lambda: self._release(tool, run))

    def _release(self, tool: str, run: str) -> None:
        for key in (tool, run, TOTAL):
            self._taken[key] -= 1
            if not self._taken[key]:
                del self._taken[key]
        self._grant()

    def _grant(self) -> None:
        """Hand free places to the longest waiting heads that fit."""
        while True:
            fitting = [(queue[0].order, key) for key, queue in self._queues.items() if self._fits(*key)]
            if not fitting:
                return
            _, key = min(fitting)
            waiting = self._queues[key].popleft()
            self._drop_if_empty(*key)
            if not waiting.granted.done():
                self._take(*key)
                waiting.granted.set_result(None)

    def _drop_if_empty(self, tool: str, run: str) -> None:
        if not self._queues.get((tool, run), True):
            del self._queues[tool, run]
