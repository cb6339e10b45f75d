"""The policy while leases come and go: no token of a lease is older, or other, than it asks for."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from shoal.broadcast.fetch import SnapshotGone
from shoal.broadcast.tensors import TensorView
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.engine.weights import to_views
from shoal.errors import ModelError
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams
from shoal.rollout.policy import Policy

PROMPT = (2, 7, 67, 1, 3)


class Snapshots:
    """A source whose fetches the test holds up, or lets fail."""

    def __init__(self, tensors: Mapping[str, TensorView]) -> None:
        self.tensors = tensors
        self.gate = asyncio.Event()
        self.gate.set()
        self.gone: set[int] = set()
        self.asked: list[int] = []
        self.delay: Callable[[], float] = lambda: 0.0

    async def __call__(self, version: int) -> Mapping[str, TensorView]:
        self.asked.append(version)
        await asyncio.sleep(self.delay())
        await self.gate.wait()
        if version in self.gone:
            raise SnapshotGone(f"version {version} is gone.")
        return self.tensors


@pytest.fixture
def snapshots(tiny_model: Path) -> Snapshots:
    return Snapshots(to_views(LocalModel("tiny", tiny_model).tensors()))


async def draw(engine: LocalEngine, *, tokens: int = 8, seed: int = 0) -> Completion:
    return await engine.sample(SampleRequest(prompt_ids=PROMPT, params=SamplingParams(max_tokens=tokens, seed=seed)))


async def act(
    policy: Policy, engine: LocalEngine, version: int, *, exact: bool, draws: int = 1, seed: int = 0
) -> list[int]:
    """One lease; gives the versions of all its tokens."""
    await policy.reach(version, exact=exact)
    with policy.acting(exact=exact):
        found = [await draw(engine, seed=seed + i) for i in range(draws)]
    return [v for completion in found for v in completion.versions]


async def test_nothing_is_done_before_the_first_version_is_in(engine: LocalEngine, snapshots: Snapshots) -> None:
    policy = Policy(engine, snapshots)
    await policy.follow()
    assert policy.version == -1 and snapshots.asked == []
    assert set(await act(policy, engine, 0, exact=False)) == {0}
    assert policy.version == engine.version == 0


async def test_a_lease_takes_the_newest_version_that_is_heard_of(engine: LocalEngine, snapshots: Snapshots) -> None:
    policy = Policy(engine, snapshots)
    policy.heard_of(5)
    assert set(await act(policy, engine, 3, exact=False)) == {5}
    assert set(await act(policy, engine, 2, exact=False)) == {5}
    assert snapshots.asked == [5]


async def test_an_exact_version_is_pinned_until_its_leases_end(engine: LocalEngine, snapshots: Snapshots) -> None:
    swaps: list[int] = []
    policy = Policy(engine, snapshots, lambda version, *_: swaps.append(version))
    await policy.reach(1, exact=True)
    with policy.acting(exact=True):
        policy.heard_of(2)
        await policy.follow()
        newer = asyncio.create_task(act(policy, engine, 2, exact=False))
        await asyncio.sleep(0.05)
        assert set((await draw(engine)).versions) == {1} and not newer.done()
    assert set(await newer) == {2}
    assert swaps == [1, 2] and snapshots.asked == [1, 2], "what could not be put in place was not even fetched"


async def test_newer_weights_come_in_while_others_act(engine: LocalEngine, snapshots: Snapshots) -> None:
    policy = Policy(engine, snapshots)
    await policy.reach(0, exact=False)
    with policy.acting(exact=False):
        running = asyncio.create_task(draw(engine, tokens=48, seed=3))
        while engine.stats().live == 0 and not running.done():  # noqa: ASYNC110  The engine's thread tells nobody.
            await asyncio.sleep(0)
        assert set(await act(policy, engine, 1, exact=True)) == {1}, "an exact lease waits for nobody to go forward"
        assert set((await running).versions) <= {0, 1}


async def test_going_back_waits_until_nobody_acts(engine: LocalEngine, snapshots: Snapshots) -> None:
    policy = Policy(engine, snapshots)
    await policy.reach(5, exact=False)
    with policy.acting(exact=False):
        older = asyncio.create_task(act(policy, engine, 3, exact=True))
        await asyncio.sleep(0.05)
        assert policy.version == 5 and not older.done()
    assert set(await older) == {3}


async def test_a_lease_that_begins_during_the_fetch_of_an_older_version_is_safe(
    engine: LocalEngine, snapshots: Snapshots
) -> None:
    """The check before a fetch says nothing about what holds after it."""
    policy = Policy(engine, snapshots)
    await act(policy, engine, 5, exact=False)
    snapshots.gate.clear()
    older = asyncio.create_task(act(policy, engine, 3, exact=True))
    await asyncio.sleep(0.05)
    assert snapshots.asked[-1] == 3
    await policy.reach(5, exact=False)
    with policy.acting(exact=False):
        snapshots.gate.set()
        await asyncio.sleep(0.05)
        assert set((await draw(engine)).versions) == {5} and not older.done()
    assert set(await older) == {3}


async def test_a_version_that_was_pruned_on_its_way_is_replaced_by_a_newer_one(
    engine: LocalEngine, snapshots: Snapshots
) -> None:
    policy = Policy(engine, snapshots)
    snapshots.gate.clear()
    snapshots.gone = {1}
    waiting = asyncio.create_task(act(policy, engine, 1, exact=False))
    await asyncio.sleep(0.05)
    policy.heard_of(4)
    snapshots.gate.set()
    assert set(await waiting) == {4}
    snapshots.gone = {2, 5}
    with pytest.raises(SnapshotGone):
        await act(policy, engine, 2, exact=True)
    with pytest.raises(SnapshotGone):
        await act(policy, engine, 5, exact=False)
    assert set(await act(policy, engine, 4, exact=False)) == {4}, "what is in place still serves"


async def test_weights_of_another_model_are_refused_and_the_old_ones_stay(
    engine: LocalEngine, snapshots: Snapshots
) -> None:
    policy = Policy(engine, snapshots)
    await act(policy, engine, 0, exact=False)
    name = next(iter(snapshots.tensors))
    snapshots.tensors = {name: snapshots.tensors[name]}
    with pytest.raises(ModelError):
        await policy.reach(1, exact=False)
    assert policy.version == 0 and set(await act(policy, engine, 0, exact=True)) == {0}


@pytest.fixture
def held(engine: LocalEngine) -> Iterator[threading.Event]:
    """The engine's thread does nothing until this is set: a swap stays half done for as long as the test likes."""
    gate = threading.Event()
    yield gate
    gate.set()


async def begin_swap(policy: Policy, engine: LocalEngine, gate: threading.Event, version: int) -> asyncio.Task[None]:
    """A lease that has got as far as putting its version in place, and no further."""
    engine._inbox.put(lambda: bool(gate.wait(30)) and None)
    asking = asyncio.create_task(policy.reach(version, exact=False))
    while not policy._loading:  # noqa: ASYNC110  The policy tells nobody how far it is.
        await asyncio.sleep(0)
    return asking


async def test_a_swap_whose_asker_is_cancelled_is_known(
    engine: LocalEngine, snapshots: Snapshots, held: threading.Event
) -> None:
    """The engine swaps all the same; policy and engine may never disagree about what is in place."""
    policy = Policy(engine, snapshots)
    await act(policy, engine, 0, exact=False)
    asking = await begin_swap(policy, engine, held, 1)
    asking.cancel()
    await asyncio.sleep(0.01)
    held.set()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert policy.version == engine.version == 1
    assert set(await act(policy, engine, 0, exact=True)) == {0}


@pytest.mark.parametrize("exact", [False, True])
async def test_nobody_begins_during_a_swap(
    engine: LocalEngine, snapshots: Snapshots, held: threading.Event, exact: bool
) -> None:
    """An exact lease of the old version would be acted under the new one."""
    policy = Policy(engine, snapshots)
    await act(policy, engine, 0, exact=False)
    asking = await begin_swap(policy, engine, held, 1)
    lease = asyncio.create_task(act(policy, engine, 0, exact=exact))
    await asyncio.sleep(0.01)
    assert policy._active == 0
    held.set()
    await asking
    assert set(await lease) == ({0} if exact else {1})


class Crowd:
    """Leases and announcements all at once, in an order that a seed gives."""

    def __init__(self, engine: LocalEngine, snapshots: Snapshots, seed: int) -> None:
        self.rng = random.Random(seed)
        self.engine = engine
        self.policy = Policy(engine, snapshots)
        self.outcomes = Counter[str]()
        snapshots.delay = lambda: self.rng.choice([0, 0, 0.001, 0.01])
        snapshots.gone = {self.rng.randrange(30) for _ in range(3)}

    async def one(self, number: int) -> None:
        rng, policy = self.rng, self.policy
        await asyncio.sleep(rng.uniform(0, 0.3))
        exact = rng.random() < 0.4
        version = max(0, policy.newest - rng.randint(0, 3)) if exact else max(0, policy.newest)
        try:
            versions = await act(policy, self.engine, version, exact=exact, draws=rng.randint(1, 3), seed=number)
        except SnapshotGone:
            self.outcomes["gone"] += 1
            return
        self.outcomes["done"] += 1
        assert min(versions) >= version, "older than the lease allows"
        assert not exact or set(versions) == {version}, "other than the lease asks for"

    async def announce(self) -> None:
        for version in range(30):
            self.policy.heard_of(version)
            with contextlib.suppress(SnapshotGone):
                await self.policy.follow()
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("seed", range(4))
async def test_random_leases_all_at_once(engine: LocalEngine, snapshots: Snapshots, seed: int) -> None:
    """Exact and other leases, old and new versions, slow and failing fetches, cancellations, announcements."""
    crowd = Crowd(engine, snapshots, seed)
    tasks = [asyncio.create_task(crowd.one(number)) for number in range(40)]
    announcing = asyncio.create_task(crowd.announce())
    await asyncio.sleep(0.15)
    for task in crowd.rng.sample(tasks, 6):
        task.cancel()
    async with asyncio.timeout(60):
        results = await asyncio.gather(*tasks, announcing, return_exceptions=True)
    assert not [r for r in results if isinstance(r, Exception)], results
    assert crowd.outcomes["done"] >= 20
    assert crowd.policy._active == crowd.policy._pinned == 0 and crowd.policy.version == engine.version
