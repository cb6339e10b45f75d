"""A worker's patience with a coordinator that does not answer: name its silence, wait for it, and at last give up.

    answered()                        every answer, whatever it says
    await unanswered(error)           a request failed: wait a moment, or give up
    tell()                            a task: says in the log that the coordinator is silent, and when it is back

Invariant: however the coordinator goes (killed, stopped, cut off), whoever reads the worker's log learns of it within
`SILENT_AFTER_S` and a second, and the worker ends within `LOST_AFTER_S` and one request's deadline.
"""

from __future__ import annotations

import asyncio
import logging
import time

from shoal.errors import NetworkError

log = logging.getLogger("shoal.rollout")

LOST_AFTER_S = 120.0
"""A coordinator that has not answered for this long is taken for gone. Its restart takes less."""

SILENT_AFTER_S = 5.0
"""A coordinator that has not answered for this long is named: it answers every heartbeat at once."""

TOLD_EVERY_S = 15.0

RETRY_S = 1.0
"""Between tries when the coordinator does not answer."""


class Patience:
    """When the coordinator answered last, and what follows from it."""

    def __init__(self) -> None:
        self._last_answer = time.monotonic()

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self._last_answer

    @property
    def is_tried(self) -> bool:
        """Whether the coordinator is silent for longer than it ever is where all is well."""
        return self.silent_s > SILENT_AFTER_S

    def answered(self) -> None:
        """The coordinator has answered."""
        self._last_answer = time.monotonic()

    async def unanswered(self, error: NetworkError) -> None:
        """Wait before the next try.

        Raises:
            NetworkError: it has been silent for too long.
        """
        silent_s = self.silent_s
        if silent_s > LOST_AFTER_S:
            raise NetworkError(
                f"the coordinator has not answered for {silent_s:.0f} s ({error.problem}).",
                "See whether the run still lives; the worker can join again with the same ticket.",
            )
        await asyncio.sleep(RETRY_S)

    async def tell(self) -> None:
        """Name the coordinator's silence in the log while it lasts."""
        silent_since, told_at = 0.0, 0.0
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            if not self.is_tried:
                if silent_since:
                    log.warning("the coordinator answers again, after %.0f s", self._last_answer - silent_since)
                silent_since = 0.0
            elif not silent_since or now - told_at >= TOLD_EVERY_S:
                silent_since, told_at = silent_since or self._last_answer, now
                log.warning(
                    "the coordinator has been silent for %.0f s: stopped, cut off or ended; "
                    "this worker gives up in %.0f s unless it comes back",
                    self.silent_s,
                    max(0.0, LOST_AFTER_S - self.silent_s),
                )
