"""All tools of a process: found by name, called within their deadline, their health and capacity kept.

Invariants: `perform` returns an outcome within the tool's deadline and `CANCEL_GRACE_S`, whatever the tool does; a call
that does not end when it is told to keeps its slot until it does, so that what runs is always what is counted; a value
that does not match its card is a failure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from shoal.agents.tools.capacity import Capacity, Slot
from shoal.agents.tools.card import ToolCard
from shoal.agents.tools.function import Progress
from shoal.agents.tools.health import Health
from shoal.agents.tools.outcome import Failure, Outcome, failure
from shoal.agents.tools.schema import Schema
from shoal.errors import ConfigError

CANCEL_GRACE_S = 2.0
"""A call that has been cancelled may take this long to end before its caller goes on without it."""

DEFAULT_TOTAL = 256
"""Calls at once, over all runs and tools of a process."""


class Callee(Protocol):
    """What stands behind a card: a Python function, or a tool of an MCP server."""

    @property
    def card(self) -> ToolCard: ...

    async def call(self, arguments: dict[str, Any], progress: Progress) -> Outcome:
        """One call; may raise whatever a stranger's code raises."""
        ...


@dataclass
class Tool:
    """A callee with its compiled schemas and its record."""

    callee: Callee
    parameters: Schema
    output: Schema | None
    health: Health = field(default_factory=Health)

    @property
    def card(self) -> ToolCard:
        return self.callee.card

    async def perform(self, arguments: dict[str, Any], slot: Slot, progress: Progress) -> Outcome:
        """Call the tool; the slot is given back when the call has really ended.

        Raises:
            asyncio.CancelledError: the caller was cancelled; the call has been told to end.
        """
        if (wait_s := self.health.wait_s(time.monotonic())) > 0:
            slot.release()
            words = f"it failed too often; it is tried again in {wait_s:.1f} s"
            return failure("unavailable", words, retryable=True, retry_after_s=wait_s)
        self.health.began()
        started_s = last_sign_s = time.monotonic()

        def sign(words: str) -> None:
            nonlocal last_sign_s
            last_sign_s = time.monotonic()
            progress(words)

        task = asyncio.ensure_future(self.callee.call(arguments, sign))
        task.add_done_callback(lambda ended: _ended(ended, slot))
        outcome: Outcome = failure("cancelled", "the call was cancelled")
        try:
            outcome = await self._awaited(task, lambda: last_sign_s)
        finally:
            now_s = time.monotonic()
            self.health.ended(outcome, now_s - started_s, now_s)
        return outcome

    async def _awaited(self, task: asyncio.Future[Outcome], last_sign_s: Callable[[], float]) -> Outcome:
        timeout_s = self.card.use.timeout_s
        try:
            while not task.done():
                left_s = last_sign_s() + timeout_s - time.monotonic()
                if left_s <= 0:
                    await _end(task)
                    return failure("timeout", f"no sign of life for {timeout_s:g} s", retryable=True)
                await asyncio.wait({task}, timeout=left_s)
        except asyncio.CancelledError:
            await _end(task)
            raise
        if task.cancelled():
            return failure("error", "the tool cancelled itself")
        if (error := task.exception()) is not None:
            return failure("error", f"{type(error).__name__}: {error}")
        outcome = task.result()
        if isinstance(outcome, Failure) or self.output is None or not (problem := self.output.problem(outcome.value)):
            return outcome
        return failure("malformed", f"the answer does not match the tool's card: {problem}", retryable=True)


class Toolbox:
    """Tools by name.

    Args:
        total: calls at once, over all runs and tools.
    """

    def __init__(self, callees: Iterable[Callee] = (), *, total: int = DEFAULT_TOTAL) -> None:
        self.capacity = Capacity(total)
        self._tools: dict[str, Tool] = {}
        for callee in callees:
            self.add(callee)

    def add(self, callee: Callee) -> None:
        """Raises `ConfigError` for a name that is taken, `RecordError` for a card that cannot be used."""
        card = callee.card
        card.check()
        if card.name in self._tools:
            raise ConfigError(f"there are two tools called {card.name}.", "Give one of them another name.")
        output = Schema(card.output, f"{card.name}'s output") if card.output is not None else None
        self._tools[card.name] = Tool(callee, Schema(card.parameters, f"{card.name}'s parameters"), output)
        self.capacity.limit(card.name, card.use.max_concurrency)

    def tool(self, name: str) -> Tool | None:
        return self._tools.get(name)

    def cards(self, names: Sequence[str] | None = None) -> dict[str, ToolCard]:
        """The cards of these tools, of all where none are named; raises `ConfigError` for a name that is not there."""
        if names is None:
            return {name: tool.card for name, tool in self._tools.items()}
        for name in names:
            if name not in self._tools:
                raise ConfigError(f"there is no tool {name!r}.", f"There are: {', '.join(self._tools) or 'none'}.")
        return {name: self._tools[name].card for name in names}

    def health(self) -> Mapping[str, dict[str, Any]]:
        """Each tool's statistics."""
        return {name: dict(tool.health.summary()) for name, tool in self._tools.items()}


def _ended(task: asyncio.Future[Outcome], slot: Slot) -> None:
    slot.release()
    if not task.cancelled():
        task.exception()  # Looked at, so that asyncio does not report what nobody waits for any more.


async def _end(task: asyncio.Future[Outcome]) -> None:
    """Tell a call to end, and wait a moment for it."""
    task.cancel()
    await asyncio.wait({task}, timeout=CANCEL_GRACE_S)
