"""Who is there: a token per session that vanishes with it, and a watch on everyone's.

A process killed with -9 is seen at once (its sockets close), a silent machine after the lease.

Invariants: a node is alive while any of its sessions is (a restarted node's old token may outlive its new one's
birth, and a node has a session on each of its links); tokens that vanish together with the watcher's own connection
prove nothing and count for `RETURN_S` more; a watch yields every node's latest state, the present ones first, and
holds one entry a node however slow its reader is: a change undone before it was read is not reported. Tokens are not
signed: liveliness is a hint for giving up early, never a proof; leases and deadlines decide.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import NamedTuple

import zenoh

from shoal.fabric.core import KEY_PATTERN, Core
from shoal.fabric.links import LISTENER, Declaration, Link
from shoal.fabric.watch import Watch

TOKEN = re.compile(r"alive/([0-9a-f]{16})/([0-9a-f]{1,32})")
MAX_TOKENS = 1 << 16
"""Tokens kept track of at once; the rest are counted and ignored."""

SETTLE_S = 0.1
"""When a connection breaks, tokens and the news of it come in any order within this time."""

RETURN_S = 5.0
"""How long nodes behind a lost connection count as present: a router that was restarted is back by then."""


class Change(NamedTuple):
    """A node came or went."""

    node_id: str
    alive: bool


class _Token(NamedTuple):
    node_id: str
    session: str
    link: str


async def declare_alive(core: Core) -> Declaration:
    """Show this node to every watch, until the declaration or the node ends."""

    def declare(link: Link) -> zenoh.LivelinessToken:
        key = core.full_key(f"alive/{core.identity.node_id}/{link.session.info.zid()}")
        return link.session.liveliness().declare_token(key)

    return await core.links.declare(declare)


class AliveWatch(Watch[Change]):
    """Changes of who is there: `async with fabric.watch_alive() as watch: async for change in watch: …`."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self._sessions: dict[str, set[_Token]] = {}
        self._num_tokens = 0
        self._doubtful: dict[_Token, asyncio.TimerHandle] = {}
        self._reported: dict[str, bool] = {}
        self._unread: dict[str, bool] = {}

    def _declare(self, link: Link) -> zenoh.Subscriber[None]:
        def receive(sample: zenoh.Sample) -> None:
            appeared = sample.kind == zenoh.SampleKind.PUT
            self._core.post(self._note, link, self._core.local_key(sample.key_expr), appeared, time.monotonic())

        key = self._core.full_key("alive/*/*", KEY_PATTERN)
        callback = zenoh.handlers.Callback(receive, indirect=False)
        return link.session.liveliness().declare_subscriber(key, callback, history=True)

    async def close(self) -> None:
        """Stop watching; a reader's loop ends."""
        for timer in self._doubtful.values():
            timer.cancel()
        self._doubtful.clear()
        await super().close()

    @property
    def present(self) -> frozenset[str]:
        """Ids of the nodes that are there now, whether or not the change was read."""
        return frozenset(self._sessions)

    async def _take(self) -> Change | None:
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
        return None

    def _note(self, link: Link, key: str, appeared: bool, when: float) -> None:
        match = TOKEN.fullmatch(key)
        if match is None:
            self._core.counters["alive_ignored"] += 1
            return
        token = _Token(match[1], match[2], link.name)
        timer = self._doubtful.pop(token, None)
        if timer is not None:
            timer.cancel()
        if appeared:
            self._appeared(token)
        elif link.rank == LISTENER:
            self._vanished(token)
        elif not self._closed:
            self._doubtful[token] = self._core.loop.call_later(SETTLE_S, self._judge, link, token, when)

    def _judge(self, link: Link, token: _Token, when: float) -> None:
        """A token went: was it its node, or this node's own connection?"""
        if link.up and link.up_since <= when:
            self._vanished(token)
        else:
            self._doubtful[token] = self._core.loop.call_later(RETURN_S, self._vanished, token)

    def _appeared(self, token: _Token) -> None:
        tokens = self._sessions.get(token.node_id, set())
        if token not in tokens:
            if self._num_tokens >= MAX_TOKENS:
                self._core.counters["alive_ignored"] += 1
                return
            self._num_tokens += 1
            self._sessions.setdefault(token.node_id, set()).add(token)
        self._report(token.node_id)

    def _vanished(self, token: _Token) -> None:
        self._doubtful.pop(token, None)
        tokens = self._sessions.get(token.node_id, set())
        if token in tokens:
            self._num_tokens -= 1
            tokens.remove(token)
            if not tokens:
                del self._sessions[token.node_id]
        self._report(token.node_id)

    def _report(self, node_id: str) -> None:
        self._unread[node_id] = node_id in self._sessions
        self._wake()
