"""Tells open pages what has changed, by server-sent events; a page then asks for its parts again.

Each change has a number; an event says which views changed since the one before. A page that comes back names the last
event it had (`Last-Event-ID`): it is told of all views that have changed since, or of all there are if the number is of
another life of the server. So nothing is kept for anybody, and nothing can be missed.

Invariants: a watcher costs one waiting task; at most `MAX_WATCHERS` watch; a watcher hears at least every `BEAT_S`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterable

from shoal.errors import CapacityError
from shoal.serving.events import frame

MAX_WATCHERS = 64
BEAT_S = 10.0
RETRY_MS = 1000
"""What browsers are told to wait before they come back."""

PAUSE_S = 0.5
"""Changes within this time are told together."""


class Live:
    """The changes of all views."""

    def __init__(self, views: Iterable[str]) -> None:
        self._life = secrets.token_hex(4)
        self._number = 0
        self._changed = dict.fromkeys(views, 0)
        self._wake = asyncio.Event()
        self._is_closed = False
        self.num_watchers = 0

    def touch(self, *views: str) -> None:
        """These have changed."""
        if views:
            self._number += 1
            self._changed |= dict.fromkeys(views, self._number)
            self._wake.set()
            self._wake = asyncio.Event()

    def close(self) -> None:
        """The server ends: so do all streams, and pages come back when there is one again."""
        self._is_closed = True
        self._wake.set()

    @property
    def now(self) -> str:
        """The id of an event sent now."""
        return f"{self._life}-{self._number}"

    def since(self, last: str) -> list[str]:
        """The views that have changed since the event `last`; all of them where it is none of this life."""
        life, _, number = last.partition("-")
        if life != self._life or not number.isdecimal() or len(number) > 18:
            return list(self._changed)
        return [view for view, at in self._changed.items() if at > int(number)]

    async def frames(self, last: str) -> AsyncGenerator[bytes]:
        """Events from behind `last` on, until the watcher goes.

        Raises:
            CapacityError: too many watch.
        """
        if self.num_watchers >= MAX_WATCHERS:
            raise CapacityError(f"{MAX_WATCHERS} pages are open already.", "Close some.")
        self.num_watchers += 1
        try:
            yield f"retry: {RETRY_MS}\n\n".encode()
            while not self._is_closed:
                wake, views, now = self._wake, self.since(last), self.now
                yield f"id: {now}\n".encode() + frame({"views": views})
                last = now
                while not await _woken(wake):
                    yield b": still here\n\n"
                if not self._is_closed:
                    await asyncio.sleep(PAUSE_S)
        finally:
            self.num_watchers -= 1


async def _woken(wake: asyncio.Event) -> bool:
    """Whether it is set within `BEAT_S`."""
    try:
        async with asyncio.timeout(BEAT_S):
            await wake.wait()
    except TimeoutError:
        return False
    return True
