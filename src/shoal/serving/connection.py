"""Connections that cost little: a deadline for the head of each request, and a bound on how many are open.

uvicorn has a deadline for idle connections only: one that sends a byte of its head a minute would stay for ever.

Invariant: a connection is open because a request is being answered, or for at most `HEAD_TIMEOUT_S` otherwise.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 15.0
"""Time for a whole request head, from the connection or from the previous answer on."""

MAX_HEAD_BYTES = 32 * 1024


def bounded(max_connections: int) -> type[H11Protocol]:
    """uvicorn's protocol with these bounds."""

    class Bounded(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.abort()
                return
            self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle is not None and not self.cycle.response_complete:
                self._disarm()

        def on_response_complete(self) -> None:
            # The rest of a body that nobody wanted to read counts as idleness too. A request that is there already
            # begins within the next call, and disarms this.
            self._arm()
            super().on_response_complete()

        def _arm(self) -> None:
            self._disarm()
            self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

        def _disarm(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Bounded
