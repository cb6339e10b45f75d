"""The asking side of requests: one signed question, the first answer that may be believed, before a deadline.

Invariants: a question is acted on at most once by any one process (a repeat carries the same nonce); an answer is
believed only if it is signed, answers this very question and, where the caller says by whom, comes from that node;
other answers are counted and ignored, so that a node that serves somebody else's key cannot get in the way.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import zenoh

from shoal.errors import NetworkError
from shoal.fabric.core import Core, full_key, read_bytes
from shoal.fabric.envelope import Header, Refusal, read_header
from shoal.fabric.errors import EnvelopeError

MAX_ANSWERS = 64
"""Answers looked at for one question; whoever sends more is not helping."""

MAX_REFUSAL_BYTES = 64 * 1024

ABSENT_GRACE_S = 1.0
"""How long a question is repeated while nobody serves its key: a node that just joined may not be known yet."""

ABSENT_RETRY_S = 0.1


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
    started = core.loop.time()
    header, attachment = await core.seal("request", key, body, to=to, deadline_s=deadline_s)
    remaining = deadline_s
    while remaining > 0:
        try:
            async with asyncio.timeout(remaining):
                answer = await _Question(core, header, attachment, body, max_reply_bytes).ask(remaining)
        except TimeoutError:
            break
        except zenoh.ZError as error:
            raise NetworkError(f"a request on {key!r} could not be sent: {error}.") from error
        if answer is not None:
            return answer
        if core.loop.time() - started + ABSENT_RETRY_S > min(absent_grace_s, deadline_s):
            raise NetworkError(
                f"nobody answers on {key!r}: the node that serves it is not there or has gone.",
                "Check that it still runs.",
            )
        await asyncio.sleep(ABSENT_RETRY_S)
        remaining = deadline_s - (core.loop.time() - started)
    raise NetworkError(
        f"no answer on {key!r} within {deadline_s:g} s.", "The other node is stopped, overloaded or cut off."
    )


class _Question:
    """One round of asking. Its callbacks run on Zenoh's threads and only post to the loop."""

    def __init__(self, core: Core, header: Header, attachment: bytes, body: bytes, max_reply_bytes: int) -> None:
        self._core = core
        self._header = header
        self._attachment = attachment
        self._body = body
        self._max_reply_bytes = max_reply_bytes
        self._answers: asyncio.Queue[zenoh.Sample | None] = asyncio.Queue()
        self._num_answers = 0

    async def ask(self, timeout_s: float) -> Answer | None:
        """The first answer that may be believed; `None` if all who serve the key are done and none gave one."""
        token = zenoh.CancellationToken()
        callback = zenoh.handlers.Callback(self._on_reply, self._on_done, indirect=False)

        def send() -> None:
            self._core.session.get(
                full_key(self._header.key),
                callback,
                target=zenoh.QueryTarget.ALL,
                consolidation=zenoh.ConsolidationMode.NONE,
                timeout=timeout_s,
                payload=self._body,
                attachment=self._attachment,
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
            size = len(sample.payload)
            limit = self._max_reply_bytes if header.kind == "reply" else MAX_REFUSAL_BYTES
            if size > limit:
                raise NetworkError(f"an answer on {header.key!r} of {size} bytes exceeds the limit of {limit} bytes.")
            body = read_bytes(sample.payload)
            await self._core.check(header, attachment, body, ("reply", "refusal"), self._header.key)
        except EnvelopeError as error:
            self._core.counters[f"answer_ignored.{error.kind}"] += 1
            return None
        if header.kind == "refusal":
            raise Refusal.to_error(body)
        return Answer(header.node_id, header.sender, body)
