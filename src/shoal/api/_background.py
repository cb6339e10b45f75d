"""Coroutines from plain code: one event loop in a thread of its own, for all objects of the Python API.

A notebook has a running event loop in its main thread, a script has none; neither can run ours. So what the rooms do
as coroutines runs on a loop in the background, and the caller's thread waits.

Invariants: an async context is entered and left by one task (`Kept`); whatever is still open when Python ends is
closed then; a caller that is interrupted cancels what it waited for.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from functools import cache
from typing import Any, Generic, TypeVar
from weakref import finalize

from shoal.errors import RunError

T = TypeVar("T")

CLOSE_S = 60.0
"""The longest that letting go of something may take."""


@cache
def background() -> asyncio.AbstractEventLoop:
    """The loop in its thread, started when it is first needed."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="shoal-api", daemon=True).start()
    atexit.register(_close_all)
    return loop


def wait(coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
    """Run a coroutine in the background and give its result.

    Raises:
        TimeoutError: it took longer than `timeout_s`; it has been cancelled.
    """
    assert threading.current_thread().name != "shoal-api", "what the background calls may not wait for the background"
    future = asyncio.run_coroutine_threadsafe(coroutine, background())
    try:
        return future.result(timeout_s)
    except BaseException:
        future.cancel()
        raise


_OPEN: dict[Future[None], asyncio.Event] = {}
"""What is open, and what closes it. The loop itself refers to its tasks weakly only."""


class Kept(Generic[T]):
    """An async context that stays open in the background until it is closed, or nobody refers to it any more."""

    def __init__(self, context: AbstractAsyncContextManager[T]) -> None:
        """Open it; raises whatever opening it raises."""
        closing, opened = asyncio.Event(), Future[T]()
        self._held = asyncio.run_coroutine_threadsafe(_hold(context, closing, opened), background())
        _OPEN[self._held] = closing
        self._held.add_done_callback(lambda held: _OPEN.pop(held, None))
        self._let_go = finalize(self, _close, closing)
        self._let_go.atexit = False  # `_close_all` waits as well
        try:
            self._value = opened.result()
        except BaseException:
            self._held.cancel()
            raise

    @property
    def value(self) -> T:
        """What the context gave.

        Raises:
            RunError: it has been closed.
        """
        if self._held.done() or not self._let_go.alive:
            raise RunError("it has been closed.", "Make another one.")
        return self._value

    def close(self) -> None:
        """Leave the context; a second time does nothing."""
        self._let_go()
        self._held.result(CLOSE_S)


async def _hold(context: AbstractAsyncContextManager[T], closing: asyncio.Event, opened: Future[T]) -> None:
    try:
        async with context as value:
            opened.set_result(value)
            del value  # what is kept is kept by `Kept` alone
            await closing.wait()
    except BaseException as error:
        if opened.done():
            raise
        opened.set_exception(error)


def _close(closing: asyncio.Event) -> None:
    background().call_soon_threadsafe(closing.set)


def _close_all() -> None:
    for held, closing in list(_OPEN.items()):
        _close(closing)
        with contextlib.suppress(TimeoutError, RuntimeError):  # At this time Python starts no further threads.
            held.result(CLOSE_S)
