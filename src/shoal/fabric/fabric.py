"""`Fabric`: one node's connection to the others.

One node listens (the coordinator) and relays; the rest connect to it with a ticket and reach each other through it.
Where it cannot be reached, all of them, the coordinator too, connect to routers (`fabric.router`):

    worker ──▶ listener ◀── worker            request(key) ──▶ serve(key)         answered, signed both ways
      │           ▲   │       │               publish(topic) ──▶ subscribe(topic)  bounded, oldest dropped
      │        learner│       │               open_stream ──▶ accept_streams       ordered, flow-controlled
      └──▶ router ◀───┴───────┘               declare_alive ──▶ watch_alive        who is there

Invariants: a node has one link (`fabric.links`) to each of the ticket's addresses that it can reach, and uses a
direct one before a router; everything declared through a fabric ends with `close`, which keeps its own deadline;
after it no thread of this room keeps the interpreter from exiting.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import zenoh

from shoal import PROTOCOL_VERSION
from shoal.errors import NetworkError
from shoal.fabric.alive import AliveWatch, declare_alive
from shoal.fabric.call import ABSENT_GRACE_S, Answer, call
from shoal.fabric.core import Core, log, namespace_of
from shoal.fabric.endpoint import Endpoint, is_loopback, reachable_addresses, resolve
from shoal.fabric.hello import hello_key
from shoal.fabric.identity import Identity
from shoal.fabric.links import DIRECT, LISTENER, ROUTER, Declaration, Link
from shoal.fabric.service import Handler, Request, Service
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
from shoal.fabric.ticket import RouterAddress, Ticket
from shoal.fabric.topic import Subscription, publish

MAX_REPLY_BYTES = 17 * 2**20
"""Default limit of an answer: a chunk of 16 MiB and its wrapping."""

MAX_REQUEST_BYTES = 17 * 2**20
MAX_PUBLICATION_BYTES = 2**20

CLOSE_DEADLINE_S = 3.0

DIAL_S = 5.0
"""One try to reach a router."""

HEAD_START_S = 1.0
"""How long a node that has reached a router goes on trying the direct addresses before it does without."""


class Fabric:
    """An open connection. Made by `listen` or `connect`; an async context manager that closes itself."""

    def __init__(
        self, core: Core, endpoints: tuple[str, ...], routers: Sequence[RouterAddress], lease_s: float
    ) -> None:
        self._core = core
        self._services: dict[str, Service] = {}
        self._parts: weakref.WeakSet[Subscription | AliveWatch | OutStream | StreamAcceptor] = weakref.WeakSet()
        self._token: Declaration | None = None
        self._lease_s = lease_s
        self.identity = core.identity
        self.endpoints = endpoints
        """Where others can connect to; empty for a node that does not listen."""
        self.routers = tuple(routers)
        """Relays that this node holds, or tries to hold, a connection to."""

    @classmethod
    async def listen(
        cls,
        identity: Identity,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tls: bool | None = None,
        lease_s: float = LEASE_S,
        routers: Sequence[RouterAddress] = (),
    ) -> Fabric:
        """Accept connections on `host` and relay between those who connect; begin to dial `routers`.

        Args:
            port: 0 takes any free port.
            tls: by default, TLS unless `host` is loopback. Plain TCP to other machines is refused.
            routers: relays on which this node can be reached too; see `unconnected`.

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
        core = Core(identity, namespace_of(identity.public_key), asyncio.get_running_loop())
        await core.links.add(Link(session, "this node's listener", LISTENER))
        fabric = cls(core, endpoints, routers, lease_s)
        await fabric._serve_hello()
        for rank, router in enumerate(routers, ROUTER):
            fabric._dial(router, rank)
        return fabric

    @classmethod
    async def connect(
        cls, identity: Identity, ticket: Ticket, deadline_s: float = 10.0, *, lease_s: float = LEASE_S
    ) -> Fabric:
        """Connect to whatever of `ticket` can be reached. A link that is lost later is dialled again by itself.

        Raises:
            NetworkError: nothing of it can be reached before the deadline, or it is not what the ticket says.
        """
        deadline = asyncio.get_running_loop().time() + deadline_s
        core = Core(identity, namespace_of(ticket.coordinator_key), asyncio.get_running_loop())
        fabric = cls(core, (), ticket.routers, lease_s)
        try:
            for rank, router in enumerate(ticket.routers, ROUTER):
                fabric._dial(router, rank)
            if identity.public_key != ticket.coordinator_key:
                await fabric._serve_hello()  # The owner speaks with the coordinator's key, and leaves this to it.
            await fabric._reach(ticket, deadline)
        except BaseException:
            await fabric.close()
            raise
        return fabric

    async def _reach(self, ticket: Ticket, deadline: float) -> None:
        """Connect to the coordinator itself if it answers; a connection to a router is enough too."""
        loop, links = self._core.loop, self._core.links
        direct = asyncio.create_task(self._reach_directly(ticket, deadline))
        waiting: set[asyncio.Task[None]] = {direct, *links.dialling}
        while waiting and not links.up and loop.time() < deadline:
            left_s = deadline - loop.time()
            _, waiting = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        # It keeps the deadline by itself, and then says best what is wrong.
        await asyncio.wait([direct], timeout=HEAD_START_S if links.up else max(0.0, deadline - loop.time()) + 1.0)
        direct.cancel()
        (problem,) = await asyncio.gather(direct, return_exceptions=True)
        if links.up:
            return
        told = [f"{name}: {why}" for name, why in links.down.items()]
        if isinstance(problem, NetworkError):
            raise NetworkError(" ".join([problem.problem, *told]), problem.remedy)
        raise NetworkError(" ".join(told) or "the ticket's addresses do not answer.", "Check that the run still lives.")

    async def _reach_directly(self, ticket: Ticket, deadline: float) -> None:
        if not ticket.endpoints:
            raise NetworkError("none of the ticket's routers can be reached.", "Check that they run.")
        loop = self._core.loop
        endpoints = [Endpoint.parse(text) for text in ticket.endpoints]
        endpoint = await find_reachable(endpoints, ticket.coordinator_key, deadline - loop.time())
        remaining = max(0.5, deadline - loop.time())
        session = await asyncio.to_thread(open_connector, ticket.coordinator_key, endpoint, remaining, self._lease_s)
        await self._core.links.add(Link(session, str(endpoint), DIRECT))

    def _dial(self, router: RouterAddress, rank: int) -> None:
        async def dial() -> zenoh.Session:
            endpoint = await find_reachable(router.endpoints, router.key, DIAL_S)
            return await asyncio.to_thread(open_connector, router.key, endpoint, DIAL_S, self._lease_s)

        self._core.links.dial(f"router {router.hosts[0]}", rank, dial)

    async def unconnected(self, patience_s: float = 0.0) -> dict[str, str]:
        """Connections that this node should have and has not, after `patience_s`: where to, and why not."""
        await self._core.links.settled(patience_s)
        return self._core.links.down

    def ticket(self, run: str, secret: bytes) -> Ticket:
        """The ticket with which others connect to this listener, or to its routers."""
        assert self.endpoints, "a node that does not listen gives no tickets"
        return Ticket(PROTOCOL_VERSION, run, self.endpoints, self.identity.public_key, secret, self.routers)

    @property
    def sealing_key(self) -> bytes:
        """This process's public sealing key; requests to this node and their answers are sealed with it."""
        return self._core.sealing.public_key

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
            to: public key of the node that must act and answer, and to which the request is sealed; empty seals
                nothing and believes any node that signs its answer.
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
        return await self._serve(
            key, handler, max_bytes=max_bytes, concurrency=concurrency, backlog=backlog, allow=allow
        )

    async def _serve(self, key: str, handler: Handler, **limits: Any) -> Service:
        service = Service(self._core, key, handler, **limits)
        assert key not in self._services or self._services[key].closed, f"{key!r} is served already"
        await service.start()
        self._services[key] = service
        return service

    async def _serve_hello(self) -> None:
        async def hello(request: Request) -> bytes:
            return self.sealing_key

        key = hello_key(self.identity.public_key)
        await self._serve(key, hello, max_bytes=0, concurrency=16, backlog=1024, allow=None, plain=True)

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
                await self._core.links.close()
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
