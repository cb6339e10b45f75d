"""A node's desk: whom it answers, what it tells, what it keeps to itself, and what a hostile one can do."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import __version__
from shoal.errors import NetworkError, RecordError
from shoal.fabric.desk import Account, Desk, ask_dump, ask_logs, ask_status
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.log_ring import LogRing, redacted
from shoal.fabric.service import Request
from shoal.fabric.waits import waiting
from shoal.protocol.codec import decode, encode
from shoal.protocol.status import MAX_LINES, Dump, LogReply, LogRequest, NodeStatus, QueueState, RunStatus

log = logging.getLogger("shoal.test")
TICKET = "shoal1" + secrets.token_urlsafe(60)


def account() -> Account:
    return Account(
        doing="samples 8 rollouts",
        version=7,
        queues=(QueueState(name="rollouts", length=3, bound=8),),
        rates={"tokens": 12.5},
        counters={"rollouts": 4},
        details={"leases": "g1.abc: 8 rollouts"},
    )


@pytest.fixture
async def desk(listener: Fabric, node: Fabric) -> AsyncIterator[Desk]:
    """A worker's desk at `node`, which answers the listener alone."""
    allowed = listener.identity.public_key
    async with Desk(node, "attic", "worker", account, lambda key: key == allowed) as opened:
        yield opened


def at(node: Fabric) -> tuple[bytes, str]:
    return node.identity.public_key, node.identity.node_id


async def test_status(listener: Fabric, node: Fabric, desk: Desk) -> None:
    with waiting("chunk 3 of version 7", whom="learner", deadline_s=30.0):
        status = await ask_status(listener, *at(node), 10.0)
    assert (status.name, status.role, status.doing, status.version) == ("attic", "worker", "samples 8 rollouts", 7)
    assert status.software == __version__ and status.pid == os.getpid() and status.memory_bytes > 2**20
    assert status.queues == (QueueState(name="rollouts", length=3, bound=8),)
    assert status.rates == {"tokens": 12.5} and status.counters["rollouts"] == 4
    told = {wait.what: wait for wait in status.waits}
    assert told["chunk 3 of version 7"].whom == "learner" and told["chunk 3 of version 7"].deadline_s == 30.0


async def test_strangers_learn_nothing(listener: Fabric, node: Fabric, desk: Desk) -> None:
    async with await Fabric.connect(Identity.generate(), listener.ticket("a run", b"0123456789abcdef")) as stranger:
        for ask in (
            ask_status(stranger, *at(node), 10.0),
            ask_logs(stranger, *at(node), LogRequest(), 10.0),
            ask_dump(stranger, *at(node), 10.0),
        ):
            with pytest.raises(RemoteError) as refused:
                await ask
            assert refused.value.kind == "stranger"


async def test_logs_follow_without_gaps_and_without_secrets(listener: Fabric, node: Fabric, desk: Desk) -> None:
    log.info("joined with %s", TICKET)
    log.debug("too small to keep")
    first = await ask_logs(listener, *at(node), LogRequest(limit=1), 10.0)
    assert [line.text for line in first.lines] == ["shoal.test: joined with [secret]"]
    for number in range(3):
        log.warning("line %d", number)
    after = first.lines[-1].number
    reply = await ask_logs(listener, *at(node), LogRequest(after=after, life=first.life), 10.0)
    ours = [line for line in reply.lines if line.text.startswith("shoal.test")]
    assert [line.text for line in ours] == [f"shoal.test: line {number}" for number in range(3)]
    assert {line.level for line in ours} == {"WARNING"} and reply.missed == 0
    other_life = await ask_logs(listener, *at(node), LogRequest(after=after, life=1.0, limit=2), 10.0)
    assert len(other_life.lines) == 2, "the cursor was of another process: the newest lines are given"


async def test_a_dump_shows_stacks_and_no_values(listener: Fabric, node: Fabric, desk: Desk) -> None:
    async def hangs_here(ticket: str) -> None:
        with waiting("something that never comes", deadline_s=60.0):
            await asyncio.sleep(60 + len(ticket))

    log.info("a ticket got into a log line: %s", TICKET)
    task = asyncio.create_task(hangs_here(TICKET), name="the one that hangs")
    await asyncio.sleep(0)
    dump = await ask_dump(listener, *at(node), 10.0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert "the one that hangs" in dump.sections["tasks"] and "in hangs_here" in dump.sections["tasks"]
    assert "something that never comes, 0 s, deadline 60 s" in dump.sections["waits"]
    assert "MainThread" in dump.sections["threads"] and "test_desk.py" in dump.sections["tasks"]
    assert dump.sections["leases"] == "g1.abc: 8 rollouts" and "queue rollouts: 3 of 8" in dump.sections["state"]
    assert "resident" in dump.sections["process"] and " open\n" in dump.sections["open files"]
    everything = "\n".join(dump.sections.values())
    assert TICKET[10:30] not in everything and "[secret]" in dump.sections["log"]


async def test_a_hostile_desk_is_an_error_and_no_more(listener: Fabric, node: Fabric) -> None:
    answers = {
        b"\x81": RecordError,
        b"\xc1" * 100: RecordError,
        encode(LogReply(lines=(), life=0.0)): RecordError,
        b"\x90" * (3 * 2**20): NetworkError,
    }
    answer = b""

    async def lie(_: Request) -> bytes:
        return answer

    await node.serve(f"node/{node.identity.node_id}/status", lie)
    for lied, error in answers.items():
        answer = lied
        with pytest.raises(error):
            await ask_status(listener, *at(node), 10.0)
    answer = encode(Desk(listener, "me", "worker", account, lambda _: True).status())
    with pytest.raises(RecordError, match="answers as node"):
        await ask_status(listener, *at(node), 10.0)


@given(st.binary(max_size=400), st.sampled_from([NodeStatus, RunStatus, LogReply, LogRequest, Dump]))
def test_bytes_from_elsewhere_are_a_record_or_an_error(data: bytes, kind: type) -> None:
    try:
        decode(data, kind)
    except RecordError:
        return


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30),
    st.integers(1, 20),
)
def test_whoever_follows_a_log_gets_every_kept_line_once_and_in_order(bursts: list[int], limit: int) -> None:
    ring = LogRing()
    number, seen, missed = 0, [], 0
    request = LogRequest(limit=limit)
    for burst in bursts:
        for _ in range(burst):
            ring.handle(logging.LogRecord("x", logging.INFO, "", 0, f"{number}", None, None))
            number += 1
        reply = ring.read(request)
        assert len(reply.lines) <= limit
        if request.after < 0:
            first = [line.number for line in reply.lines]
            assert first == list(range(max(0, number - limit), number)), "to begin with, the newest"
        seen += [line.number for line in reply.lines]
        missed += reply.missed
        if seen:
            request = LogRequest(after=seen[-1], life=reply.life, limit=limit)
    assert seen == list(range(seen[0], seen[0] + len(seen))) if seen else number == 0
    assert missed == 0


def test_a_log_is_bounded_and_says_what_is_gone() -> None:
    ring = LogRing()
    for number in range(MAX_LINES + 10):
        ring.handle(logging.LogRecord("x", logging.INFO, "", 0, "y" * 10_000 if number % 2 else "z", None, None))
    reply = ring.read(LogRequest(after=4, life=ring.life, limit=1))
    assert reply.missed == 5 and reply.lines[0].number == 10
    assert max(len(line.text) for line in ring.read(LogRequest(limit=50)).lines) <= 2000


def test_what_looks_like_a_secret_is_blotted_out() -> None:
    key = secrets.token_hex(32)
    assert redacted(f"{TICKET} and {key}, node 0123456789abcdef") == "[secret] and [secret], node 0123456789abcdef"
