"""The policy that a worker holds: which version is in the engine, who relies on it, when it may change.

Newer snapshots are fetched and verified while the engine samples (*staged*) and swapped in between two decode steps.
A lease that asks for an exact version (pull mode, evaluation) pins it: nothing is swapped until its pins are gone, and
going back to an older version waits until nobody acts at all.

Invariants: a lease acts under no version older than it asks for, and under exactly the asked one where it says so;
only tensors that `Source` has verified reach the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from shoal.broadcast.tensors import TensorView
from shoal.engine.local import LocalEngine

Source = Callable[[int], Awaitable[Mapping[str, TensorView]]]
"""Fetches and verifies all tensors of a version."""


class Policy:
    """Owns the engine's weights.

    Args:
        source: gives a version's tensors.
        on_swap: told (version, seconds to fetch, seconds of pause) after each change.
    """

    def __init__(
        self,
        engine: LocalEngine,
        source: Source,
        on_swap: Callable[[int, float, float], None] = lambda *_: None,
    ) -> None:
        self._engine = engine
        self._source = source
        self._on_swap = on_swap
        self._changed = asyncio.Condition()
        self._swapping = asyncio.Lock()
        self._active = 0
        self._pinned = 0
        self.version = -1
        """-1 until the first snapshot is in: the engine's own initial weights are never acted with."""
        self.newest = -1
        """The newest version heard of."""

    def heard_of(self, version: int) -> None:
        """Note that a version has been published."""
        self.newest = max(self.newest, version)

    @asynccontextmanager
    async def acting(self, version: int, *, exact: bool) -> AsyncIterator[None]:
        """Hold the policy while a lease acts under at least (or exactly) `version`."""
        self.heard_of(version)
        await self._reach(version, exact=exact)
        try:
            yield
        finally:
            async with self._changed:
                self._active -= 1
                self._pinned -= exact
                self._changed.notify_all()

    async def follow(self) -> None:
        """Swap in the newest version heard of, if nothing pins the present one; a no-op otherwise."""
        if self.newest > self.version and not self._pinned and not self._swapping.locked():
            async with self._swapping:
                await self._swap(self.newest)

    async def _reach(self, version: int, *, exact: bool) -> None:
        """Returns with the version in place and the caller counted as acting."""
        while True:
            async with self._changed:
                if self.version == version or (self.version > version and not exact):
                    self._active += 1
                    self._pinned += exact
                    return
                # An exact version never mixes with others at work; a newer one only has to wait for pins.
                blocked = self._active if exact else self._pinned
                if blocked:
                    await self._changed.wait()
                    continue
            async with self._swapping:
                if self.version < version or exact:
                    await self._swap(version if exact else max(version, self.newest))

    async def _swap(self, version: int) -> None:
        if version == self.version:
            return
        loop = asyncio.get_running_loop()
        started = loop.time()
        tensors = await self._source(version)
        fetched_s = loop.time() - started
        async with self._changed:
            if self._pinned and version != self.version:
                return  # somebody pinned the old version while the new one was on its way
            pause_s = await self._engine.load_weights(version, tensors)
            self.version = version
            self._changed.notify_all()
        self._on_swap(version, fetched_s, pause_s)
