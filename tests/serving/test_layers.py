"""What the planner is told of a pipeline's stages, and who follows a run of their weights."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.pipeline.ring import Rings
from shoal.errors import ModelError
from shoal.planning.partition import Partition, Placement
from shoal.protocol.stage import LinkAddress, StageOffer
from shoal.serving.following import FollowedRun
from shoal.serving.layers import NOISE, Peer, is_better, known, levelled, view
from shoal.serving.stages import Stages

KEYS = [bytes([n]) * 32 for n in range(4)]


def peer(number: int, *, seconds: float = 0.001, delay_s: float = 0.0) -> Peer:
    address = LinkAddress(host="127.0.0.1", port=1000 + number, public_key=KEYS[number])
    offer = StageOffer(address=address, max_layers=10, seconds_per_layer=seconds, delay_s=delay_s)
    return Peer(KEYS[number], f"node{number}", f"stage {number}", "stage", "cpu", offer=offer)


@given(st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=12))
def test_speeds_are_levelled_by_no_more_than_the_noise(speeds: list[float]) -> None:
    found = levelled(speeds)
    assert all(low <= speed <= NOISE * low * (1 + 1e-12) for low, speed in zip(found, speeds, strict=True))
    assert set(found) <= set(speeds) and min(found) == min(speeds)
    assert levelled(found) == found


def test_a_delay_that_nobody_measured_is_that_by_way_of_the_requester() -> None:
    peers = [peer(0, delay_s=0.01), peer(1, delay_s=0.02), peer(2, seconds=0.1)]
    nodes, delays = known(peers, lambda one, other: 0.005 if {one, other} == {"node0", "node2"} else None)
    assert [node.seconds_per_layer for node in nodes] == [0.001, 0.001, 0.1]
    assert delays == [
        [0.0, 0.01, 0.02, 0.0],
        [0.01, 0.0, 0.03, 0.005],
        [0.02, 0.03, 0.0, 0.02],
        [0.0, 0.005, 0.02, 0.0],
    ]


def test_layers_move_for_a_tenth_or_for_a_stage_that_was_missing() -> None:
    def plan(stages: int, cycle_s: float) -> Partition:
        return Partition(tuple(Placement(str(n), n, n + 1) for n in range(stages)), cycle_s, cycle_s, cycle_s)

    assert not is_better(plan(3, 0.95), plan(2, 1.0), wanted=2)
    assert is_better(plan(3, 0.89), plan(2, 1.0), wanted=2)
    assert is_better(plan(3, 1.5), plan(2, 1.0), wanted=3)
    assert not is_better(plan(2, 1.5), plan(3, 1.0), wanted=3)


def test_who_could_not_take_layers_is_left_out_for_a_while_and_people_see_who_has_which() -> None:
    one = peer(0)
    assert one.may_compute(5.0)
    one.barred_until = 60.0
    assert not one.may_compute(5.0) and one.may_compute(60.0)
    assert view(one, {KEYS[0]: "layers 0 to 4"}).state == "active"
    assert view(one, {}).state == "idle"
    one.offer = None
    assert view(one, {}).state == "lost" and not one.may_compute(100.0)


async def test_a_stage_that_leaves_is_out_of_the_plan_at_once() -> None:
    """Also before its link has ended: a plan that is looked at in between would name somebody who is not here."""
    stages = object.__new__(Stages)
    stages._peers = {KEYS[n]: peer(n) for n in range(2)}
    stages._keys = (KEYS[0], KEYS[1])
    stages._plan = Partition((Placement("node0", 0, 1), Placement("node1", 1, 2)), 1.0, 1.0, 1.0)
    stages._ending = False
    stages._rings, stages._hub = Rings(1.0), SimpleNamespace(drop=lambda key: None)  # type: ignore[assignment]
    stages._membership, stages._wake = asyncio.Event(), asyncio.Event()
    await stages._leave(SimpleNamespace(sender_key=KEYS[1]))  # type: ignore[arg-type]
    assert stages._plan is None and stages._wake.is_set() and list(stages._peers) == [KEYS[0]]


async def test_following_goes_on_where_weights_were_not_taken() -> None:
    told: list[str] = []
    versions = iter([3, 4])

    async def newest() -> SimpleNamespace:
        version = next(versions)
        if version < 4:
            run._news.set()
        return SimpleNamespace(version=version)

    async def put(engine: SimpleNamespace, snapshot: SimpleNamespace) -> None:
        if snapshot.version == 3:
            raise ModelError("the stages did not go over to version 3.")
        engine.version = snapshot.version
        done.set()

    done, engine = asyncio.Event(), SimpleNamespace(version=2)
    run = SimpleNamespace(_news=asyncio.Event(), _newest=newest, _put=put, _tell=told.append)
    run._news.set()
    following = asyncio.create_task(FollowedRun._follow(run, engine))  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        await done.wait()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert engine.version == 4 and "version 3" in told[0]
