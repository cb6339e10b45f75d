"""What a worker tells of versions that come: until it was heard, and no more than a heartbeat may hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import RecordError
from shoal.protocol.codec import decode, encode
from shoal.protocol.work import MAX_ARRIVALS, MAX_FEEDERS, Arrived, Fetching, Heartbeat
from shoal.rollout.arrivals import Arrivals


def version(number: int) -> Arrived:
    return Arrived(version=number, seconds=1.0, by_source={"n1": 10})


@given(st.lists(st.booleans(), max_size=200))
def test_each_version_is_told_until_it_was_heard(answers: list[bool]) -> None:
    """A heartbeat after each version; answered, or lost."""
    arrivals, heard = Arrivals(), list[int]()
    for number, answered in enumerate(answers):
        arrivals.here(version(number))
        told = arrivals.untold
        decode(encode(Heartbeat(node_id="n", version=0, leases={}, arrived=told)), Heartbeat)
        if answered:
            heard += [one.version for one in told]
            arrivals.told(told)
            assert arrivals.untold == ()
    assert heard == sorted(set(heard))
    if any(answers):
        last = max(i for i, answered in enumerate(answers) if answered)
        assert heard[-1] == last and len(arrivals.untold) == min(MAX_ARRIVALS, len(answers) - 1 - last)


def test_what_is_under_way() -> None:
    arrivals = Arrivals()
    assert arrivals.share == ""
    arrivals.fetching = Fetching(version=3, bytes_done=1000, bytes_total=4000)
    assert arrivals.share == ": 1,000 of 4,000 bytes"
    arrivals.here(Arrived(version=3, seconds=0.0, by_source={}))
    assert arrivals.share == "" and arrivals.untold == (), "it was here already"


@pytest.mark.parametrize(
    "hostile",
    [
        {"fetching": Fetching(version=1, bytes_done=2, bytes_total=1)},
        {"fetching": Fetching(version=1, bytes_done=-1, bytes_total=1)},
        {"arrived": (Arrived(version=1, seconds=float("nan"), by_source={}),)},
        {"arrived": (Arrived(version=1, seconds=-1.0, by_source={}),)},
        {"arrived": (Arrived(version=1, seconds=1.0, by_source={"a": -1}),)},
        {"arrived": (Arrived(version=1, seconds=1.0, by_source={str(n): 1 for n in range(MAX_FEEDERS + 1)}),)},
        {"arrived": (version(1),) * (MAX_ARRIVALS + 1)},
    ],
)
def test_impossible_accounts_are_refused(hostile: dict[str, object]) -> None:
    beat = Heartbeat(node_id="n", version=0, leases={}, **hostile)  # type: ignore[arg-type]
    with pytest.raises(RecordError):
        decode(encode(beat), Heartbeat)
