"""How long a node waits for others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from collective_nodes import ROOT, RUN, SECRET, identity
from hypothesis import given
from hypothesis import strategies as st

from shoal.agents.collective.patience import MAX_DOUBLINGS, MOST_S, Asking, Patience
from shoal.errors import NetworkError, RecordError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.service import Request

took = st.floats(min_value=0.0, max_value=100.0)
happened = st.lists(st.one_of(took, st.none()), max_size=60)
PEER, OTHER = b"peer", b"other"


def after(what: Sequence[float | None]) -> Patience:
    """One that saw these answers of a peer; None: one that did not come."""
    patience = Patience()
    for seconds in what:
        if seconds is None:
            patience.late(PEER)
        else:
            patience.answered(seconds, PEER)
    return patience


@given(happened, took)
def test_a_limit_is_never_below_its_floor_nor_far_above_what_happened(what: list[float | None], floor_s: float) -> None:
    longest = max((seconds for seconds in what if seconds is not None), default=0.0)
    limit_s = after(what).limit_s(floor_s, PEER)
    assert floor_s <= limit_s <= max(floor_s, MOST_S)
    assert limit_s <= 1.001 * max(floor_s, 5 * longest) * 2**MAX_DOUBLINGS


@given(st.floats(min_value=0.01, max_value=2.0), st.integers(min_value=1, max_value=9))
def test_steady_answers_are_waited_for_a_little_longer_than_they_take(each_s: float, missed: int) -> None:
    steady = [each_s] * 40
    usual_s = after(steady).limit_s(0.0, PEER)
    assert each_s <= usual_s <= 1.01 * each_s
    doubled = after([*steady, *[None] * missed])
    assert doubled.limit_s(0.0, PEER) == pytest.approx(min(MOST_S, usual_s * 2 ** min(missed, MAX_DOUBLINGS)))
    assert doubled.limit_s(0.0, OTHER) == usual_s, "what one does not answer is nothing to another"
    doubled.answered(each_s, OTHER)
    assert doubled.limit_s(0.0, PEER) > 1.9 * min(usual_s, MOST_S / 2)
    doubled.answered(each_s, PEER)
    assert doubled.limit_s(0.0, PEER) <= usual_s


@given(st.floats(min_value=0.01, max_value=1.0), st.floats(min_value=1.0, max_value=16.0))
def test_a_peer_that_becomes_slow_is_given_its_time_before_long(floor_s: float, slow_s: float) -> None:
    patience = after([floor_s / 100] * 40)
    for _ in range(MAX_DOUBLINGS):
        patience.late(PEER)
    assert patience.limit_s(floor_s, PEER) >= min(slow_s, 16 * floor_s), "each miss doubles the floor, too"
    for _ in range(20):
        patience.answered(slow_s, PEER)
    assert slow_s <= patience.limit_s(0.0) < 4 * slow_s


async def test_a_no_is_an_answer_and_a_node_that_is_not_there_is_no_silence() -> None:
    async with await Fabric.listen(ROOT) as listener:
        slow = asyncio.Event()

        async def answer(request: Request) -> bytes:
            if request.body == b"wait":
                await slow.wait()
            if request.body == b"refuse":
                raise RecordError("that is refused.")
            return b"yes"

        await listener.serve("asked", answer)
        async with await Fabric.connect(identity("asker"), listener.ticket(RUN, SECRET)) as fabric:
            asking = Asking(fabric)

            async def ask(body: bytes, key: str = "asked", floor_s: float = 20.0) -> bytes:
                return await asking.request(
                    key, body, floor_s, to=ROOT.public_key, max_reply_bytes=64, absent_grace_s=0.1
                )

            assert await ask(b"") == b"yes"
            with pytest.raises(RemoteError):
                await ask(b"refuse")
            once_s = asking.patience.limit_s(0.0)
            assert 0.0 < once_s < 20.0
            with pytest.raises(NetworkError, match="not there"):
                await ask(b"", key="elsewhere")
            assert asking.patience.limit_s(0.0) == once_s
            with pytest.raises(NetworkError, match="no answer"):
                await ask(b"wait", floor_s=max(0.5, once_s))
            assert asking.patience.limit_s(0.0, ROOT.public_key) == pytest.approx(2 * once_s)
