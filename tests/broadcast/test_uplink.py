"""The measured uplink: what counts, and that it is what the link carries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensors_made import eventually, next_chunk

from shoal.broadcast.link import Kind, dial
from shoal.broadcast.relay import Relay
from shoal.broadcast.store import Store
from shoal.broadcast.uplink import MIN_INTERVALS, SendCounts, UplinkMeter
from shoal.fabric.identity import Identity

counts = st.dictionaries(st.integers(0, 5), st.tuples(st.integers(0, 10**9), st.integers(0, 10**6)), max_size=5)


@given(st.lists(st.tuples(counts, st.floats(0.1, 5.0)), max_size=20))
def test_never_above_the_fastest_interval(samples: list[tuple[dict[int, tuple[int, int]], float]]) -> None:
    meter, now, total, fastest, was_busy, num_counted = UplinkMeter(), 0.0, dict[int, int](), 0.0, False, 0
    for index, (links, seconds) in enumerate(samples):
        now += seconds
        grown = {key: SendCounts(total.get(key, 0) + more, waiting) for key, (more, waiting) in links.items()}
        sent = sum(one.acknowledged - total.get(key, 0) for key, one in grown.items())
        is_busy = any(one.waiting for one in grown.values())
        meter.sample(grown, now)
        if index and was_busy and is_busy:
            fastest, num_counted = max(fastest, sent / seconds), num_counted + 1
        total, was_busy = {key: one.acknowledged for key, one in grown.items()}, is_busy
    assert 0 <= meter.bytes_per_s <= fastest * (1 + 1e-9)
    assert num_counted >= MIN_INTERVALS or meter.bytes_per_s == 0


def test_idle_times_do_not_count() -> None:
    """A node that has nothing to send for most of the time still knows its uplink."""
    meter = UplinkMeter()
    sent = 0
    for second in range(40):
        busy = second % 8 < 3
        meter.sample({1: SendCounts(sent, 1000 if busy else 0)}, float(second))
        sent += 500_000 if busy else 0
    assert meter.bytes_per_s == pytest.approx(500_000)


async def test_the_kernels_counts(make_store: Callable[[str], Store]) -> None:
    """What a reader has taken is acknowledged; what it does not take waits."""
    store = make_store("s")
    chunks = [store.put_chunk(bytes([i]) * 2**20) for i in range(16)]
    relay = Relay(Identity.generate(), store)
    link = await dial(Identity.generate(), await relay.start())
    try:
        await link.send_digests(Kind.WANT, chunks)
        await eventually(lambda: any(one.link is not None for one in relay._links))
        (serving,) = (one.link for one in relay._links)
        assert serving is not None

        def told() -> SendCounts:
            counts = serving.counts()
            assert counts is not None
            return counts

        await eventually(lambda: told().waiting > 0)
        for _ in chunks:
            await next_chunk(link)
        await eventually(lambda: told().waiting == 0 and told().acknowledged >= 16 * 2**20)
    finally:
        link.close()
        await relay.close()
