"""Who is there: a token per session that vanishes with it, and a watch on everyone's.

A process killed with -9 is seen at once (its sockets close), a silent machine after the lease.

Invariants: a node is alive while any of its sessions is (a restarted node's old token may outlive its new one's
birth); a watch yields every node's latest state, the present ones first, and holds one entry a node however slow its
reader is: a change undone before it was read is not reported. Tokens are not signed: liveliness is a hint for giving
up early, never a proof; leases and deadlines decide.
"""

from __future__ import annotations

import asyncio
import re
from types import TracebackType
from typing import NamedTuple, Self

import zenoh

from shoal.fabric.core import KEY_PATTERN, Core, full_key, local_key

TOKEN = re.compile(r"alive/([0-9a-f]{16})/([0-9a-f]{1,32})")
MAX_TOKENS = 1 << 16
"""Tokens kept track of at once; the rest are counted and ignored."""


class Change(NamedTuple):
    """A node came or went."""

    node_id: str
    alive: bool


async def declare_alive(core: Core) -> zenoh.LivelinessToken:
    """Show this session to every watch, until the token or the session ends."""
    key = full_key(f"alive/{core.identity.node_id}/{core.session.info.zid()}")

    def declare() -> zenoh.LivelinessToken:
        return core.session.liveliness().declare_token(key)

    return await core.blocking(declare)


class AliveWatch:
    """Changes of who is there: `async with fabric.watch_alive() as watch: async for change in watch: …`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._sessions: dict[str, set[str]] = {}
        self._num_tokens = 0
        self._reported: dict[str, bool] = {}
        self._unread: dict[str, bool] = {}
        self._changed = asyncio.Event()
        self._closed = False
        self._subscriber: zenoh.Subscriber[None] | None = None

    async def open(self) -> None:
        """Begin to watch; nodes that are there already are reported first."""
        receive = zenoh.handlers.Callback(self._receive, indirect=False)

        def declare() -> zenoh.Subscriber[None]:
            key = full_key("alive/*/*", KEY_PATTERN)
            return self._core.session.liveliness().declare_subscriber(key, receive, history=True)

        self._subscriber = await self._core.blocking(declare)

    async def close(self) -> None:
        """Stop watching; a reader's loop ends."""
        self._closed = True
        self._changed.set()
        subscriber, self._subscriber = self._subscriber, None
        if subscriber is not None:
            await self._core.blocking(subscriber.undeclare)

    @property
    def present(self) -> frozenset[str]:
        """Ids of the nodes that are there now, whether or not the change was read."""
        return frozenset(self._sessions)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        while True:
            while self._unread:
                node_id = next(iter(self._unread))
                alive = self._unread.pop(node_id)
                if self._reported.get(node_id, False) == alive:
                    continue
                if alive:
                    self._reported[node_id] = True
                else:
                    del self._reported[node_id]
                return Change(node_id, alive)
            if self._closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()

    def _receive(self, sample: zenoh.Sample) -> None:
        self._core.post(self._note, local_key(sample.key_expr), sample.kind == zenoh.SampleKind.PUT)

    def _note(self, key: str, appeared: bool) -> None:
        token = TOKEN.fullmatch(key)
        if token is None:
            self._core.counters["alive_ignored"] += 1
            return
        node_id, session = token.groups()
        sessions = self._sessions.get(node_id, set())
        if appeared and session not in sessions:
            if self._num_tokens >= MAX_TOKENS:
                self._core.counters["alive_ignored"] += 1
                return
            self._num_tokens += 1
            self._sessions.setdefault(node_id, set()).add(session)
        elif not appeared and session in sessions:
            self._num_tokens -= 1
            sessions.remove(session)
            if not sessions:
                del self._sessions[node_id]
        self._unread[node_id] = node_id in self._sessions
        self._changed.set()
