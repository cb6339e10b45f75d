"""The answering side of requests: a handler behind a bounded queue.

    Zenoh thread ── count, post ──▶ loop: check envelope ──▶ wait for a slot ──▶ handler ──▶ signed reply

Invariants: at most `concurrency` handlers run and `backlog` requests wait, with no more than `MAX_QUEUED_BYTES` among
them; one more is told `busy` at once. A handler runs only for an envelope that passed every check, of a sender that
`allow` admits, sealed if it is addressed to this node, and no longer than its asker waits; its answer is sealed if
the request was. The asker learns a `ShoalError`'s text, and of any other failure
only that there was one. Nothing here waits for a link on the loop: replying, and even dropping a query, may.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import zenoh

from shoal.errors import CapacityError, ShoalError
from shoal.fabric.core import KEY_PATTERN, MAX_BODY_BYTES, Core, log, read_bytes
from shoal.fabric.envelope import Header, Kind, Refusal, read_header
from shoal.fabric.errors import EnvelopeError, RefusalKind
from shoal.fabric.links import Declaration, Link
from shoal.fabric.sealing import OVERHEAD_BYTES

MAX_HANDLER_S = 600.0
"""No handler runs longer, however long its asker would wait."""

MAX_REFUSALS_IN_FLIGHT = 256
"""Further requests in excess are dropped without a word: answering them would be work too."""


MAX_QUEUED_BYTES = 256 * 2**20
"""Bodies that one service holds at once, waiting or at work; beyond it, it is busy, whatever the number of requests."""


class Request(NamedTuple):
    """What a handler gets. The envelope has been checked: `sender_key` really signed `body` for `key`."""

    sender: str
    """Node id."""
    sender_key: bytes
    body: bytes
    key: str
    """The concrete key, where the handler serves a pattern."""


Handler = Callable[[Request], Awaitable[bytes]]


class Service:
    """One served key. Made and closed by `Fabric`."""

    def __init__(
        self,
        core: Core,
        key: str,
        handler: Handler,
        *,
        max_bytes: int,
        concurrency: int,
        backlog: int,
        allow: Callable[[bytes], bool] | None,
        plain: bool = False,
    ) -> None:
        self._core = core
        self._plain = plain
        self._key = key
        self._full_key = core.full_key(key, KEY_PATTERN)
        self._handler = handler
        self._max_bytes = max_bytes
        self._limit = concurrency + backlog
        self._slots = asyncio.Semaphore(concurrency)
        self._allow = allow
        self._lock = threading.Lock()
        self._num_accepted = 0
        self._num_refused = 0
        self._num_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._declaration: Declaration | None = None
        self.closed = False

    async def start(self) -> None:
        """Begin to serve."""
        receive = zenoh.handlers.Callback(self._receive, indirect=False)

        def declare(link: Link) -> zenoh.Queryable[None]:
            return link.session.declare_queryable(self._full_key, receive, complete=True)

        self._declaration = await self._core.links.declare(declare)

    async def close(self) -> None:
        """Stop serving; running handlers are cancelled and their askers get no answer."""
        self.closed = True
        if self._declaration is not None:
            await self._declaration.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _receive(self, query: zenoh.Query) -> None:
        # On Zenoh's thread. The counters are what bounds the loop's queue, so they are kept here and not on the loop.
        size = len(query.payload or b"")
        with self._lock:
            room = self._num_accepted < self._limit and self._num_bytes + size <= MAX_QUEUED_BYTES
            accepted = room and not self.closed and size <= self._max_bytes + OVERHEAD_BYTES
            refused = not accepted and not self.closed and self._num_refused < MAX_REFUSALS_IN_FLIGHT
            self._num_accepted += accepted
            self._num_bytes += size if accepted else 0
            self._num_refused += refused
        if accepted:
            posted = self._core.post(self._spawn, query, size, None)
        elif refused:
            why = Refusal.of("busy", f"too many requests wait on {self._key!r}.", "Try again later.")
            if size > self._max_bytes + OVERHEAD_BYTES:
                why = Refusal.of("size", self._too_large(size - OVERHEAD_BYTES).problem)
            posted = self._core.post(self._spawn, query, 0, why)
        else:
            posted = False
        if not posted:
            _drop(query)

    def _spawn(self, query: zenoh.Query, size: int, refusal: Refusal | None) -> None:
        task = self._core.loop.create_task(self._answer(query, size, refusal))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, query: zenoh.Query, size: int, refusal: Refusal | None) -> None:
        try:
            attachment = read_bytes(query.attachment)
            header = read_header(attachment)
            if refusal is None:
                kind, reply, reader = await self._work(query, header, attachment)
            else:
                self._core.counters[f"refused.{refusal.kind}"] += 1
                kind, reply, reader = "refusal", refusal.encode(), b""
            await self._reply(query, header, kind, reply, reader)
        except _TooLate:
            self._core.counters["deadline_passed"] += 1
        except EnvelopeError as error:
            # The header cannot be read, so there is no request to bind a reply to.
            self._core.counters[f"refused.{error.kind}"] += 1
        except zenoh.ZError as error:
            self._core.counters["reply_failed"] += 1
            log.debug("a reply could not be sent: %s", error)
        finally:
            self._core.detach(_drop, query)
            with self._lock:
                if refusal is None:
                    self._num_accepted -= 1
                    self._num_bytes -= size
                else:
                    self._num_refused -= 1

    async def _work(self, query: zenoh.Query, header: Header, attachment: bytes) -> tuple[Kind, bytes, bytes]:
        """Kind and body of the answer, and the sealing key to which it must be sealed."""
        patience = asyncio.timeout(min(header.deadline_s, MAX_HANDLER_S))
        try:
            async with patience:
                request = await self._admit(query, header, attachment)
                async with self._slots:
                    reply = await self._handler(request)
                if len(reply) > MAX_BODY_BYTES:
                    raise CapacityError(
                        f"the answer on {header.key!r} has {len(reply)} bytes, and no message may have more than "
                        f"{MAX_BODY_BYTES}.",
                        "Ask for less at a time.",
                    )
            return "reply", reply, header.sealed_by
        except EnvelopeError as error:
            return *self._refuse(error.kind, error), b""  # Says nothing of what was asked, and may not be readable.
        except ShoalError as error:
            return *self._refuse("refused", error), header.sealed_by
        except Exception as error:  # noqa: BLE001  One bad request must not end the service for all; it is counted.
            if patience.expired() and isinstance(error, TimeoutError):
                raise _TooLate from None
            self._core.counters["handler_failed"] += 1
            log.exception("the handler of %r failed", self._key)
            failure = ShoalError("the other node failed while handling the request.")
            return *self._refuse("internal", failure), header.sealed_by

    async def _admit(self, query: zenoh.Query, header: Header, attachment: bytes) -> Request:
        key = self._core.local_key(query.key_expr)
        body = read_bytes(query.payload)
        await self._core.check(header, attachment, body, ("request",), key)
        if header.to and header.to != self._core.identity.public_key:
            raise EnvelopeError("audience", "a request addressed to another node arrived here.")
        if header.to and not header.sealed_by and not self._plain:
            raise EnvelopeError("seal", "a request addressed to one node was not sealed.")
        if self._allow is not None and not self._allow(header.sender):
            raise EnvelopeError("stranger", f"node {header.node_id} has not been admitted.", "Join the run first.")
        self._core.guard.admit(header, time.time())
        body = await self._core.open(header, attachment, body)
        if len(body) > self._max_bytes:
            raise self._too_large(len(body))
        return Request(header.node_id, header.sender, body, key)

    def _too_large(self, size: int) -> EnvelopeError:
        return EnvelopeError("size", f"a request of {size} bytes exceeds the limit of {self._max_bytes} bytes.")

    def _refuse(self, kind: RefusalKind, error: ShoalError) -> tuple[Kind, bytes]:
        self._core.counters[f"refused.{kind}"] += 1
        return "refusal", Refusal.of(kind, error.problem, error.remedy, type(error).__name__).encode()

    async def _reply(self, query: zenoh.Query, header: Header, kind: Kind, body: bytes, reader: bytes) -> None:
        key = self._core.local_key(query.key_expr)
        answer = await self._core.write(kind, key, body, to=header.sender, answers=header.nonce, reader=reader)

        def send() -> None:
            try:
                query.reply(query.key_expr, answer.body, attachment=answer.attachment)
            finally:
                _drop(query)

        await self._core.send(header.sender, send)


class _TooLate(Exception):
    """Whoever asked has stopped waiting: there is nobody to answer."""


def _drop(query: zenoh.Query) -> None:
    """Tell the asker that nothing more will come; a second time it does nothing. May wait for the link, as a reply."""
    query.drop()  # type: ignore[no-untyped-call]  # Zenoh's stub gives no return type.
