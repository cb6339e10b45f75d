"""The asking side of requests: one signed question, the first answer that may be believed, before a deadline.

    request(to) ── is its sealing key known? ── no ──▶ hello ──▶ keep the key
                        │ yes                                        │
                        └──▶ seal, sign, send down the links ◀───────┘   “sealed to an old key”: forget it, once more

Invariants: a question is acted on at most once by any one process (a repeat carries the same nonce); an answer is
believed only if it is signed, answers this very question, is sealed if the question was and, where the caller says by
whom, comes from that node; other answers are counted and ignored, so that a node that serves somebody else's key
cannot get in the way. A question to nobody in particular is not sealed.
"""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

import zenoh

from shoal.errors import CapacityError, NetworkError
from shoal.fabric.core import MAX_BODY_BYTES, Core, read_bytes
from shoal.fabric.envelope import Envelope, Refusal, read_header
from shoal.fabric.errors import EnvelopeError, RemoteError
from shoal.fabric.hello import hello_key
from shoal.fabric.links import ROUTER, Link
from shoal.fabric.sealing import OVERHEAD_BYTES, PUBLIC_BYTES
from shoal.fabric.waits import waiting

MAX_ANSWERS = 64
"""Answers looked at for one question; whoever sends more is not helping."""

MAX_REFUSAL_BYTES = 64 * 1024

ABSENT_GRACE_S = 1.0
"""How long a question is repeated while nobody serves its key: a node that just joined may not be known yet."""

ABSENT_RETRY_S = 0.1

MAX_STALE = 2
"""Times that one question is sealed anew because the other side was started again."""

CUT_OFF_GRACE_S = 5.0
"""How long a question waits while this node itself has no connection, and, once it has one (anew, or to a router),
for those on the other side to be there as well."""


class Answer(NamedTuple):
    """A believed reply and who signed it."""

    sender: str
    sender_key: bytes
    body: bytes


async def call(
    core: Core,
    key: str,
    body: bytes,
    deadline_s: float,
    *,
    to: bytes,
    max_reply_bytes: int,
    absent_grace_s: float,
) -> Answer:
    """Ask and wait for the answer; see `Fabric.request`."""
    if len(body) > MAX_BODY_BYTES:
        raise CapacityError(
            f"a request on {key!r} has {len(body)} bytes, and no message may have more than {MAX_BODY_BYTES}.",
            "Send less at a time.",
        )
    with waiting(f"an answer on {key!r}", whom=to, deadline_s=deadline_s, is_detail=True) as wait:
        ask = _Asking(core, key, to, wait, max_reply_bytes, absent_grace_s)
        if not to:
            return await ask.once(key, body, b"")
        while True:
            reader = core.known.get(to) or await ask.sealing_key()
            try:
                return await ask.once(key, body, reader)
            except RemoteError as error:
                if error.kind != "seal" or ask.num_stale == MAX_STALE:
                    raise
                ask.num_stale += 1
                core.known.forget(to, reader)  # It was started again; it has not acted on what it could not open.


class _Asking:
    """What the rounds of one call share."""

    def __init__(
        self, core: Core, key: str, to: bytes, wait: waiting, max_reply_bytes: int, absent_grace_s: float
    ) -> None:
        self._core = core
        self._key = key
        self._to = to
        self._wait = wait
        self._max_reply_bytes = max_reply_bytes
        self._absent_grace_s = min(absent_grace_s, wait.deadline_s)
        self.num_stale = 0

    async def sealing_key(self) -> bytes:
        """Ask the node for it."""
        answer = await self.once(hello_key(self._to), b"", b"", plain=True)
        if len(answer.body) != PUBLIC_BYTES:
            raise NetworkError(f"node {answer.sender} tells a sealing key of {len(answer.body)} bytes.")
        self._core.known.learn(self._to, answer.body)
        return answer.body

    async def once(self, key: str, body: bytes, reader: bytes, *, plain: bool = False) -> Answer:
        """One envelope, sent down the links, and again while nobody is there."""
        core, deadline = self._core, self._wait.since + self._wait.deadline_s
        left_s = max(0.0, deadline - time.monotonic())
        question = await core.write("request", key, body, to=self._to, deadline_s=left_s, reader=reader)
        limit = PUBLIC_BYTES if plain else self._max_reply_bytes
        num_sent = 0
        while (remaining := deadline - time.monotonic()) > 0:
            for link in core.links.up:
                num_sent += 1
                try:
                    async with asyncio.timeout(remaining):
                        answer = await _Question(core, link, question, limit).ask(remaining)
                except TimeoutError:
                    raise self._late() from None
                except RemoteError as error:
                    if error.kind == "replay" and num_sent > 1:
                        raise NetworkError(f"the answer on {key!r} was lost on its way.", "Ask again.") from error
                    raise
                except zenoh.ZError as error:
                    raise NetworkError(f"a request on {key!r} could not be sent: {error}.") from error
                if answer is not None:
                    return answer
                if time.monotonic() >= deadline:
                    raise self._late()
            if time.monotonic() + ABSENT_RETRY_S > self._patience():
                raise self._absent()
            await asyncio.sleep(ABSENT_RETRY_S)
        raise self._late()

    def _patience(self) -> float:
        """Until when to go on asking although nobody is there."""
        up = self._core.links.up
        if not up:
            return self._wait.since + CUT_OFF_GRACE_S
        returned = max((link.up_since for link in up if link.num_losses or link.rank >= ROUTER), default=0.0)
        return max(self._wait.since + self._absent_grace_s, returned + CUT_OFF_GRACE_S)

    def _absent(self) -> NetworkError:
        links = self._core.links
        if not links.up:
            where = ", ".join(f"{name} ({why})" for name, why in links.down.items())
            return NetworkError(
                f"nobody answers on {self._key!r}: this node has no connection: {where}.", "See the network."
            )
        return NetworkError(
            f"nobody answers on {self._key!r}: the node that serves it is not there or has gone.",
            "Check that it still runs.",
        )

    def _late(self) -> NetworkError:
        return NetworkError(
            f"no answer on {self._key!r} within {self._wait.deadline_s:g} s ({self._wait.bounds()}).",
            "The other node is stopped, overloaded or cut off.",
        )


class _Question:
    """One envelope on one link. Its callbacks run on Zenoh's threads and only post to the loop."""

    def __init__(self, core: Core, link: Link, envelope: Envelope, max_reply_bytes: int) -> None:
        self._core = core
        self._link = link
        self._envelope = envelope
        self._header = envelope.header
        self._max_reply_bytes = max_reply_bytes
        self._answers: asyncio.Queue[zenoh.Sample | None] = asyncio.Queue()
        self._num_answers = 0

    async def ask(self, timeout_s: float) -> Answer | None:
        """The first answer that may be believed; `None` if all who serve the key are done and none gave one."""
        token = zenoh.CancellationToken()
        callback = zenoh.handlers.Callback(self._on_reply, self._on_done, indirect=False)

        def send() -> None:
            self._link.session.get(
                self._core.full_key(self._header.key),
                callback,
                target=zenoh.QueryTarget.ALL,
                consolidation=zenoh.ConsolidationMode.NONE,
                timeout=timeout_s,
                payload=self._envelope.body,
                attachment=self._envelope.attachment,
                cancellation_token=token,
            )

        finished = False
        try:
            await self._core.send(self._header.to or self._header.key.encode(), send)
            while (sample := await self._answers.get()) is not None:
                answer = await self._believe(sample)
                if answer is not None:
                    return answer
            finished = True
            return None
        finally:
            if not finished:
                # Not awaited: cancelling waits for callbacks, and the answer is already here (or the asker gone).
                self._core.detach(token.cancel)

    def _on_reply(self, reply: zenoh.Reply) -> None:
        self._num_answers += 1
        if reply.ok is not None and self._num_answers <= MAX_ANSWERS:
            self._core.post(self._answers.put_nowait, reply.ok)

    def _on_done(self) -> None:
        self._core.post(self._answers.put_nowait, None)

    async def _believe(self, sample: zenoh.Sample) -> Answer | None:
        try:
            attachment = read_bytes(sample.attachment)
            header = read_header(attachment)
            if header.answers != self._header.nonce or header.to != self._core.identity.public_key:
                raise EnvelopeError("audience", "an answer to another question arrived.")
            if self._header.to and header.sender != self._header.to:
                raise EnvelopeError("signature", "an answer came from another node than the one asked.")
            if self._header.sealed_by and header.kind == "reply" and not header.sealed_by:
                raise EnvelopeError("seal", "an answer to a sealed question is not sealed.")
            size = len(sample.payload) - (OVERHEAD_BYTES if header.sealed_by else 0)
            limit = self._max_reply_bytes if header.kind == "reply" else MAX_REFUSAL_BYTES
            if size > limit:
                raise NetworkError(f"an answer on {header.key!r} of {size} bytes exceeds the limit of {limit} bytes.")
            body = read_bytes(sample.payload)
            await self._core.check(header, attachment, body, ("reply", "refusal"), self._header.key)
            body = await self._core.open(header, attachment, body)
        except EnvelopeError as error:
            self._core.counters[f"answer_ignored.{error.kind}"] += 1
            return None
        if header.kind == "refusal":
            raise Refusal.to_error(body)
        return Answer(header.node_id, header.sender, body)
