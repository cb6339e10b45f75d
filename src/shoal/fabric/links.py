"""A node's connections: its own listener, the coordinator's direct address, each router; one Zenoh session each.

    coordinator ══ listener ══ local children            what is declared is declared on every link
         ╚═════ router A ══════╗                          a request goes down the list until one link knows the key
         ╚═════ router B ══════╩═ worker                  a publication goes out on all; readers drop what comes twice

No session relays between links, so a run's machines carry nobody else's traffic and learn of no other run; and a node
whose router dies has its other links already open. Zenoh dials a lost link again by itself, for ever.

Invariants: every link accepts exactly one key (`fabric.tls`) and speaks in its run's namespace; whatever is declared
is declared on each link there is and on each that opens later, once; a router that cannot be reached yet is dialled
until `close`. `Link.up` follows the transport, so that nobody waits for a link known to be down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol

import zenoh

from shoal.errors import NetworkError

log = logging.getLogger("shoal.fabric")

REDIAL_S = 0.5
REDIAL_MAX_S = 2.0
"""A link that never opened is tried again after this long; it doubles between the two."""

LISTENER, DIRECT, ROUTER = 0, 1, 2
"""Ranks of links. A listener needs no connection and is always up; the second router of a ticket is `ROUTER + 1`."""


class Declared(Protocol):
    """What Zenoh gives for a declaration."""

    def undeclare(self) -> object: ...


class Link:
    """One open session. Made on any thread, then used on the loop."""

    def __init__(self, session: zenoh.Session, name: str, rank: int) -> None:
        self.session = session
        self.name = name
        """Where it leads, for people."""
        self.rank = rank
        """`LISTENER`, `DIRECT`, or from `ROUTER` on: requests try lower ranks first."""
        self.up_since = time.monotonic()
        self.num_losses = 0
        """Times that the connection was lost."""
        self._lock = threading.Lock()
        self._transports: set[str] = set()
        self._listener: object = None
        if rank != LISTENER:
            self._transports = {str(zid) for zid in session.info.routers_zid()}
            receive = zenoh.handlers.Callback(self._changed, indirect=False)
            self._listener = session.info.declare_transport_events_listener(receive, history=True)

    @property
    def up(self) -> bool:
        return self.rank == LISTENER or bool(self._transports)

    def _changed(self, event: zenoh.TransportEvent) -> None:
        # On Zenoh's thread.
        opened, zid = event.kind == zenoh.SampleKind.PUT, str(event.transport.zid)
        with self._lock:
            was_up = self.up
            (self._transports.add if opened else self._transports.discard)(zid)
            if self.up and not was_up:
                self.up_since = time.monotonic()
            elif was_up and not self.up:
                self.num_losses += 1


Declare = Callable[[Link], Declared]
Dial = Callable[[], Awaitable[zenoh.Session]]
"""Opens a session or raises NetworkError."""


class Declaration:
    """One thing declared on every link. Made by `Links.declare`."""

    def __init__(self, links: Links, declare: Declare) -> None:
        self._links = links
        self.declare = declare
        self.handles: list[Declared] = []

    async def close(self) -> None:
        """Take it back everywhere; a second time it does nothing."""
        await self._links.undeclare(self)


class Links:
    """All links of one node, preferred ones first.

    Args:
        blocking: runs a call that may wait for a link in a pool.
    """

    def __init__(self, blocking: Callable[..., Awaitable[Any]]) -> None:
        self._blocking = blocking
        self._links: list[Link] = []
        self._declarations: set[Declaration] = set()
        self._changing = asyncio.Lock()
        self._dialling: dict[str, asyncio.Task[None]] = {}
        self._trouble: dict[str, str] = {}

    def __iter__(self) -> Iterator[Link]:
        return iter(tuple(self._links))

    @property
    def up(self) -> list[Link]:
        """Links that have a connection, the preferred first."""
        return [link for link in self._links if link.up]

    @property
    def down(self) -> dict[str, str]:
        """Links without a connection, and what is wrong where it is known."""
        lost = {link.name: "the connection was lost" for link in self._links if not link.up}
        return lost | {name: self._trouble.get(name, "not reached yet") for name in self._dialling}

    @property
    def dialling(self) -> list[asyncio.Task[None]]:
        """One task for each link that has not opened yet; it ends when the link is open."""
        return list(self._dialling.values())

    async def settled(self, patience_s: float) -> None:
        """Wait until every link has opened once, but no longer than this."""
        if self._dialling and patience_s:
            await asyncio.wait(self.dialling, timeout=patience_s)

    async def add(self, link: Link) -> None:
        """Use one more link: everything declared so far is declared on it."""
        async with self._changing:
            for declaration in self._declarations:
                declaration.handles.append(await self._blocking(declaration.declare, link))
            self._links.append(link)
            self._links.sort(key=lambda link: link.rank)

    def dial(self, name: str, rank: int, dial: Dial) -> None:
        """Open a link in the background, however long that takes."""
        self._dialling[name] = asyncio.create_task(self._dial(name, rank, dial))

    async def _dial(self, name: str, rank: int, dial: Dial) -> None:
        pause_s = REDIAL_S
        while True:
            try:
                await self.add(Link(await dial(), name, rank))
                break
            except (NetworkError, zenoh.ZError) as error:
                self._trouble[name] = error.problem if isinstance(error, NetworkError) else str(error)
                log.info("%s is not connected yet: %s", name, self._trouble[name])
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, REDIAL_MAX_S)
        del self._dialling[name]

    async def declare(self, declare: Declare) -> Declaration:
        """Declare something on every link, now and later."""
        declaration = Declaration(self, declare)
        async with self._changing:
            made = await asyncio.gather(*(self._blocking(declare, link) for link in self._links))
            declaration.handles.extend(made)
            self._declarations.add(declaration)
        return declaration

    async def undeclare(self, declaration: Declaration) -> None:
        """Take a declaration back."""
        async with self._changing:
            self._declarations.discard(declaration)
            handles, declaration.handles = declaration.handles, []
        await asyncio.gather(*(self._blocking(handle.undeclare) for handle in handles))

    async def close(self) -> None:
        """Stop dialling and close every session; one that hangs is for the caller's deadline."""
        for task in self._dialling.values():
            task.cancel()
        await asyncio.gather(*self._dialling.values(), return_exceptions=True)
        await asyncio.gather(*(run_detached(link.session.close) for link in self._links))


async def run_detached(call: Callable[[], object]) -> None:
    """Run a call that may hang on a thread that may be left behind: the interpreter does not wait for daemons."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(problem: str) -> None:
        if done.done():
            return
        if problem:
            done.set_exception(NetworkError(f"the connection could not be closed: {problem}."))
        else:
            done.set_result(None)

    def run() -> None:
        problem = ""
        try:
            call()
        except zenoh.ZError as error:
            problem = str(error)
        with contextlib.suppress(RuntimeError):  # The loop has gone: nobody waits any more.
            loop.call_soon_threadsafe(finish, problem)

    threading.Thread(target=run, daemon=True, name="shoal-fabric-close").start()
    await done
