"""The HTTP server of a rollout worker's sessions: on loopback, for the agent programs that the worker starts.

Invariants: it listens on loopback alone, and answers nothing but the sessions that are open; it ends with the context.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn

from shoal.config import Serving
from shoal.engine.local import MAX_REQUESTS, LocalEngine
from shoal.rollout.external import Draws
from shoal.rollout.session import Session
from shoal.serving.api import Api
from shoal.serving.app import make_sessions_app
from shoal.serving.keys import Keys
from shoal.serving.server import configured, listen
from shoal.serving.sessions import Entry, House

MODEL = "policy"
"""What programs are told that the model is called."""

LOOPBACK = "127.0.0.1"

LONGEST_CALL_S = 86_400.0
"""A program's own deadline ends its calls."""

END_TIMEOUT_S = 5.0


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to the worker."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class SessionHost:
    """Where the sessions of one worker are reached; see `rollout.external.Sessions`."""

    model = MODEL

    def __init__(self, engine: LocalEngine) -> None:
        self._settings = Serving(
            host=LOOPBACK,
            port=0,
            max_sequences=MAX_REQUESTS,
            max_waiting=MAX_REQUESTS,
            request_timeout_s=LONGEST_CALL_S,
            drain_s=1.0,
            max_connections=4 * MAX_REQUESTS,
        )
        self._house = House(Keys({}), self._settings)
        self._app = make_sessions_app(Api(engine, MODEL, self._settings), self._house)
        self._url = ""

    @contextmanager
    def opened(self, session: Session, draws: Draws) -> Iterator[str]:
        """Answer this session's calls while inside."""
        entry = self._house.open[session.id] = Entry(session, draws)
        try:
            yield f"{self._url}/sessions/{session.id}"
        finally:
            self._house.forget(entry)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[SessionHost]:
        """Answer, while inside."""
        listening = listen(LOOPBACK, 0)
        self._url = f"http://{LOOPBACK}:{listening.getsockname()[1]}"
        server = _Server(configured(self._app, self._settings))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield self
        finally:
            server.should_exit = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(serving, END_TIMEOUT_S)
            listening.close()


@asynccontextmanager
async def hosting(engine: LocalEngine) -> AsyncIterator[SessionHost]:
    """A worker's sessions over its engine, while inside."""
    async with SessionHost(engine).listening() as host:
        yield host
