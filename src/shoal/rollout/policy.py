"""The policy that a worker holds: which version is in the engine, who relies on it, when it may change.

Newer snapshots are fetched and verified while the engine samples (*staged*) and swapped in between two decode steps.
A lease that asks for an exact version (pull mode, evaluation) pins it: nothing is swapped until its pins are gone.
Going back to an older version, which only such a lease may ask for, waits until nobody acts at all.

Invariants: a lease acts under no version older than it asks for, and under exactly the asked one where it says so;
only tensors that `Source` has verified reach the engine. Whether a swap is allowed is decided when the tensors are
here, because what was true before the fetch may not be true after it; and nobody begins to act during a swap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from shoal.broadcast.fetch import SnapshotGone
from shoal.broadcast.tensors import TensorView
from shoal.fabric.waits import waiting

USUAL_WAIT_S = 60.0
"""Rollouts that pin a version end within this where all is well; what a fetch waits for tells of itself."""

Source = Callable[[int], Awaitable[Mapping[str, TensorView]]]
"""Fetches and verifies all tensors of a version."""


class Loads(Protocol):
    """An engine, as far as its weights go."""

    async def load_weights(self, version: int, tensors: Mapping[str, TensorView]) -> float:
        """Put a version in place; gives the pause in seconds. What fails raises `ModelError`."""
        ...


class Policy:
    """Owns the engine's weights.

    Args:
        source: gives a version's tensors.
        on_swap: told (version, seconds to fetch, seconds of pause) after each change.
    """

    def __init__(
        self,
        engine: Loads,
        source: Source,
        on_swap: Callable[[int, float, float], None] = lambda *_: None,
    ) -> None:
        self._engine = engine
        self._source = source
        self._on_swap = on_swap
        self._changed = asyncio.Event()
        self._fetching = asyncio.Lock()
        self._loading = False
        self._active = 0
        self._pinned = 0
        self.version = -1
        """-1 until the first snapshot is in: the engine's own initial weights are never acted with."""
        self.newest = -1
        """The newest version heard of."""

    def heard_of(self, version: int) -> None:
        """Note that a version has been published."""
        self.newest = max(self.newest, version)

    async def reach(self, version: int, *, exact: bool) -> None:
        """Wait until a lease may act under at least (or exactly) `version`; `acting` must follow without a wait.

        Raises:
            SnapshotGone, RecordError, NetworkError, StorageError: it cannot be fetched.
            ModelError: the engine does not take it.
        """
        self.heard_of(version)
        what = f"policy version {version}{' exactly' if exact else ''}"
        with waiting(what, until="it is here and may be swapped in", usual_s=USUAL_WAIT_S):
            await self._reach(version, exact=exact)

    async def _reach(self, version: int, *, exact: bool) -> None:
        while not self._serves(version, exact=exact):
            if self._loading or not self._may_become(version):
                await self._changed.wait()
                continue
            async with self._fetching:
                if self._serves(version, exact=exact):
                    continue
                wanted = version if exact else max(version, self.newest)
                try:
                    await self._swap(wanted)
                except SnapshotGone:
                    # Pruned while it was on its way. Unless it must be that one, a newer version does as well.
                    if exact or self.newest <= wanted:
                        raise

    @contextmanager
    def acting(self, *, exact: bool) -> Iterator[None]:
        """Count the caller as acting under the present version, which it has reached."""
        self._active += 1
        self._pinned += exact
        try:
            yield
        finally:
            self._active -= 1
            self._pinned -= exact
            self._tell()

    async def follow(self) -> None:
        """Swap in the newest version heard of, if nothing pins the present one; a no-op otherwise."""
        async with self._fetching:
            if self.newest > self.version and not self._pinned:
                await self._swap(self.newest)

    def _serves(self, version: int, *, exact: bool) -> bool:
        return not self._loading and (self.version == version or (self.version > version and not exact))

    def _may_become(self, version: int) -> bool:
        """Whether those who act now allow a swap."""
        return not (self._active if version < self.version else self._pinned)

    async def _swap(self, version: int) -> None:
        """Fetch a version and put it in place, if that is (still) allowed; by the holder of `_fetching`."""
        if version == self.version:
            return
        loop = asyncio.get_running_loop()
        started = loop.time()
        tensors = await self._source(version)
        fetched_s = loop.time() - started
        if not self._may_become(version):
            return
        self._loading = True
        load = asyncio.ensure_future(self._engine.load_weights(version, tensors))
        try:
            await asyncio.shield(load)
        finally:
            # Also where the caller was cancelled: the engine swaps all the same, and this must say so.
            await asyncio.wait([load])
            if load.exception() is None:
                self.version = version
            self._loading = False
            self._tell()
        self._on_swap(version, fetched_s, load.result())

    def _tell(self) -> None:
        """Wake all who wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()
