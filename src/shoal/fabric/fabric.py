"""`Fabric`: one node's connection to the others.

One node listens (the coordinator) and relays; the rest connect to it with a ticket, also from behind NAT, and reach
each other through it:

    worker ──▶ listener ◀── worker            request(key) ──▶ serve(key)         answered, signed both ways
                  ▲                           publish(topic) ──▶ subscribe(topic)  bounded, oldest dropped
                learner                       open_stream ──▶ accept_streams       ordered, flow-controlled
                                              declare_alive ──▶ watch_alive        who is there

Invariants: everything declared through a fabric ends with `close`, which keeps its own deadline; after it no thread
of this room keeps the interpreter from exiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

import zenoh

from shoal import PROTOCOL_VERSION
from shoal.errors import NetworkError
from shoal.fabric.alive import AliveWatch, declare_alive
from shoal.fabric.call import ABSENT_GRACE_S, Answer, call
from shoal.fabric.core import Core, log
from shoal.fabric.endpoint import Endpoint, is_loopback, reachable_addresses, resolve
from shoal.fabric.identity import Identity
from shoal.fabric.service import Handler, Service
from shoal.fabric.session import LEASE_S, find_reachable, open_connector, open_listener
from shoal.fabric.stream import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    MAX_STREAMS,
    MAX_WINDOW,
    STALL_S,
    WINDOW,
    OutStream,
    StreamAcceptor,
    StreamHandler,
    stream_key,
)
from shoal.fabric.ticket import Ticket
from shoal.fabric.topic import Subscription, publish

MAX_REPLY_BYTES = 17 * 2**20
"""Default limit of an answer: a chunk of 16 MiB and its wrapping."""

MAX_REQUEST_BYTES = 17 * 2**20
MAX_PUBLICATION_BYTES = 2**20

CLOSE_DEADLINE_S = 3.0


class Fabric:
    """An open connection. Made by `listen` or `connect`; an async context manager that closes itself."""

    def __init__(self, core: Core, endpoints: tuple[str, ...]) -> None:
        self._core = core
        self._services: dict[str, Service] = {}
        self._parts: weakref.WeakSet[Subscription | AliveWatch | OutStream | StreamAcceptor] = weakref.WeakSet()
        self._token: zenoh.LivelinessToken | None = None
        self.identity = core.identity
        self.endpoints = endpoints
        """Where others can connect to; empty for a node that does not listen."""

    @classmethod
    async def listen(
        cls,
        identity: Identity,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tls: bool | None = None,
        lease_s: float = LEASE_S,
    ) -> Fabric:
        """Accept connections on `host` and relay between those who connect.

        Args:
            port: 0 takes any free port.
            tls: by default, TLS unless `host` is loopback. Plain TCP to other machines is refused.

        Raises:
            NetworkError: the host is unknown, the port is taken, or plain TCP was asked for beyond loopback.
        """
        address = await asyncio.to_thread(resolve, host)
        loopback = is_loopback(address)
        if tls is False and not loopback:
            raise NetworkError(
                f"plain TCP on {host} would send everything in the clear.", "Use TLS, or listen on 127.0.0.1 only."
            )
        scheme = "tls" if tls or not loopback else "tcp"
        session, bound = await asyncio.to_thread(open_listener, identity, scheme, address, port, lease_s)
        endpoints = tuple(f"{scheme}/{f'[{a}]' if ':' in a else a}:{bound}" for a in reachable_addresses(address))
        return cls(Core(session, identity, asyncio.get_running_loop()), endpoints)

    @classmethod
    async def connect(
        cls, identity: Identity, ticket: Ticket, deadline_s: float = 10.0, *, lease_s: float = LEASE_S
    ) -> Fabric:
        """Connect to the listener that `ticket` names. Zenoh reconnects by itself if the link is lost later.

        Raises:
            NetworkError: it cannot be reached before the deadline, or is not the ticket's coordinator.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        endpoints = [Endpoint.parse(text) for text in ticket.endpoints]
        endpoint = await find_reachable(endpoints, ticket.coordinator_key, deadline_s)
        remaining = max(0.5, deadline_s - (loop.time() - started))
        session = await asyncio.to_thread(open_connector, ticket.coordinator_key, endpoint, remaining, lease_s)
        return cls(Core(session, identity, loop), ())

    def ticket(self, run: str, secret: bytes) -> Ticket:
        """The ticket with which others connect to this listener."""
        assert self.endpoints, "a node that does not listen gives no tickets"
        return Ticket(PROTOCOL_VERSION, run, self.endpoints, self.identity.public_key, secret)

    @property
    def counters(self) -> Counter[str]:
        """What went wrong and was survived, by name (`refused.busy`, `answer_ignored.signature`, …)."""
        return self._core.counters

    async def request(
        self,
        key: str,
        body: bytes,
        deadline_s: float,
        *,
        to: bytes = b"",
        max_reply_bytes: int = MAX_REPLY_BYTES,
        absent_grace_s: float = ABSENT_GRACE_S,
    ) -> bytes:
        """Ask whoever serves `key` and return the answer's body.

        Args:
            to: public key of the node that must act and answer; empty believes any node that signs its answer.
            absent_grace_s: how long to go on asking while nobody serves the key.

        Raises:
            RemoteError: the request arrived and was refused; `kind` says why.
            NetworkError: nobody serves the key, or no answer came before the deadline.
        """
        return (await self.ask(key, body, deadline_s, to, max_reply_bytes, absent_grace_s)).body

    async def ask(
        self,
        key: str,
        body: bytes,
        deadline_s: float,
        to: bytes = b"",
        max_reply_bytes: int = MAX_REPLY_BYTES,
        absent_grace_s: float = ABSENT_GRACE_S,
    ) -> Answer:
        """As `request`, but the answer says who signed it."""
        return await call(
            self._core,
            key,
            body,
            deadline_s,
            to=to,
            max_reply_bytes=max_reply_bytes,
            absent_grace_s=absent_grace_s,
        )

    async def serve(
        self,
        key: str,
        handler: Handler,
        *,
        max_bytes: int = MAX_REQUEST_BYTES,
        concurrency: int = 16,
        backlog: int = 64,
        allow: Callable[[bytes], bool] | None = None,
    ) -> Service:
        """Answer requests on `key` (its parts may be `*`) with `handler` until the service or the fabric is closed.

        Args:
            max_bytes: larger requests are refused unread.
            concurrency: handlers that run at once; `backlog` more may wait, and the next is told `busy`.
            allow: takes the sender's public key; senders it rejects are refused as strangers.
        """
        service = Service(
            self._core,
            key,
            handler,
            max_bytes=max_bytes,
            concurrency=concurrency,
            backlog=backlog,
            allow=allow,
        )
        assert key not in self._services or self._services[key].closed, f"{key!r} is served already"
        await service.start()
        self._services[key] = service
        return service

    async def publish(self, topic: str, body: bytes, *, wait: bool = False) -> None:
        """Tell everyone who subscribes to `topic`, best effort.

        Args:
            wait: under congestion, wait for the link rather than lose the message; a stuck reader then slows us down.
        """
        await publish(self._core, topic, body, wait=wait)

    def subscribe(
        self,
        topic: str,
        capacity: int = 256,
        *,
        max_bytes: int = MAX_PUBLICATION_BYTES,
        allow: Callable[[bytes], bool] | None = None,
    ) -> Subscription:
        """Hear `topic` (its parts may be `*`, its end `**`) inside `async with`; the oldest of too many is dropped.

        Args:
            allow: takes the sender's public key; messages of senders it rejects are not delivered.
        """
        subscription = Subscription(self._core, topic, capacity, max_bytes, allow)
        self._parts.add(subscription)
        return subscription

    def open_stream(self, to: bytes, name: str, *, window: int = WINDOW, stall_s: float = STALL_S) -> OutStream:
        """A stream of frames to the node with public key `to`, which must accept streams called `name`.

        Args:
            window: frames under way or waiting at the reader before `send` waits.
            stall_s: a reader that takes no frame for so long breaks the stream.
        """
        stream = OutStream(self._core, to, name, window, stall_s)
        self._parts.add(stream)
        return stream

    async def accept_streams(
        self,
        name: str,
        handler: StreamHandler,
        *,
        max_streams: int = MAX_STREAMS,
        allow: Callable[[bytes], bool] | None = None,
    ) -> None:
        """Run `handler` for every stream called `name` that another node opens to this one."""
        acceptor = StreamAcceptor(self._core, handler, max_streams)
        self._parts.add(acceptor)
        await self.serve(
            stream_key(self.identity.node_id, name),
            acceptor.receive,
            max_bytes=FRAME_HEADER.size + MAX_FRAME_BYTES,
            concurrency=max_streams * (MAX_WINDOW + 1),
            backlog=MAX_WINDOW,
            allow=allow,
        )

    async def declare_alive(self) -> None:
        """Show this node to every `watch_alive` until it closes or dies."""
        if self._token is None:
            self._token = await declare_alive(self._core)

    def watch_alive(self) -> AliveWatch:
        """Who comes and goes, starting with who is there, inside `async with`."""
        watch = AliveWatch(self._core)
        self._parts.add(watch)
        return watch

    async def close(self, deadline_s: float = CLOSE_DEADLINE_S) -> None:
        """Undeclare and disconnect. What does not end before the deadline is left to the process's end."""
        if self._core.closed:
            return
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.gather(*(part.close() for part in self._parts))
                await asyncio.gather(*(service.close() for service in self._services.values()))
                self._core.closed = True
                await _run_detached(self._core.session.close)
        except TimeoutError:
            self._core.counters["close_timed_out"] += 1
        except (zenoh.ZError, NetworkError) as error:
            # The link is gone already; there is nothing left to close, and the caller is leaving anyway.
            self._core.counters["close_failed"] += 1
            log.debug("a fabric did not close cleanly: %s", error)
        finally:
            self._core.closed = True
            self._core.pool.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _run_detached(call: Callable[[], object]) -> None:
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
