"""What is read with `async for` while the network fills it: the common part of subscriptions and of the alive watch.

    async with … as watch:
        async for item in watch: …

Invariants: what is declared on the links ends with the context; a reader's loop ends after `close`, once it has had
what was there; `_wake` may be called from the loop at any time and is never lost.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Generic, Self, TypeVar

from shoal.fabric.core import Core
from shoal.fabric.links import Declaration, Declared, Link

T = TypeVar("T")


class Watch(Generic[T]):
    """A bounded store with one reader. Subclasses say what is declared on a link and what comes next."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._changed = asyncio.Event()
        self._closed = False
        self._declaration: Declaration | None = None

    def _declare(self, link: Link) -> Declared:
        """Begin to listen on one link; its callbacks run on Zenoh's threads."""
        raise NotImplementedError

    async def _take(self) -> T | None:
        """The next item, or `None` if none is there."""
        raise NotImplementedError

    def _wake(self) -> None:
        self._changed.set()

    async def open(self) -> None:
        """Begin to listen."""
        self._declaration = await self._core.links.declare(self._declare)

    async def close(self) -> None:
        """Stop listening; a reader's loop ends after what is already here."""
        self._closed = True
        self._wake()
        if self._declaration is not None:
            await self._declaration.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while True:
            self._changed.clear()
            item = await self._take()
            if item is not None:
                return item
            if self._closed:
                raise StopAsyncIteration
            await self._changed.wait()
