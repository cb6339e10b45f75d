"""Trials leased over the fabric: decided by whoever comes, signed, lost by nobody's death, counted once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from memory_arenas import FAMILY, HARMS, HELPS, advice, make_arena
from msgspec.structs import replace

from shoal.errors import ConfigError, RecordError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.service import Request
from shoal.memory.events import Decided, Event, Tried
from shoal.memory.keeper import Keeper
from shoal.memory.leasing import Answer, HandIn, Leased, TrialDesk, Want, ask_desk, desk_key
from shoal.memory.replayer import Replayer
from shoal.memory.signing import check_trial, sign_trial
from shoal.memory.trials import Arena
from shoal.protocol.codec import decode, encode
from shoal.protocol.episode import Task

SECRET = b"0123456789abcdef"
PROCESS = Path(__file__).with_name("replayer_process.py")


@asynccontextmanager
async def desk_at(folder: Path, **settings: float) -> AsyncIterator[tuple[TrialDesk, Keeper, Fabric]]:
    identity = Identity.generate()
    with Keeper(folder, identity) as keeper:
        async with await Fabric.listen(identity) as fabric:
            desk = TrialDesk(fabric, keeper, lambda key: True, **settings)  # type: ignore[arg-type]
            await desk.start()
            try:
                yield desk, keeper, fabric
            finally:
                await desk.close()


@asynccontextmanager
async def replaying(listener: Fabric, arena: Arena) -> AsyncIterator[Replayer]:
    async with await Fabric.connect(Identity.generate(), listener.ticket("run", SECRET)) as fabric:
        replayer = Replayer(fabric, {arena.family: arena}, lambda: [listener.identity.public_key], most=4)
        task = asyncio.create_task(replayer.run())
        try:
            yield replayer
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def trials_of(keeper: Keeper, entry: str) -> list[Tried]:
    return [event.body for event in keeper.store.history(keeper.memory(entry)) if isinstance(event.body, Tried)]


def is_decision(event: Event) -> bool:
    return isinstance(event.body, Decided)


async def until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110  What is waited for knows nothing of tests.
        await asyncio.sleep(0.02)


async def test_two_replayers_decide_and_their_evidence_is_signed(tiny_model: Path, tmp_path: Path) -> None:
    async with desk_at(tmp_path) as (desk, keeper, listener):
        good, bad = keeper.add(advice(HELPS)).id, keeper.add(advice(HARMS)).id
        async with (
            replaying(listener, make_arena(tiny_model, takes_s=0.3)) as first,
            replaying(listener, make_arena(tiny_model, takes_s=0.3)) as second,
            asyncio.timeout(60),
        ):
            arena = make_arena(tiny_model)
            helps, harms = await asyncio.gather(desk.admit(good, arena), desk.admit(bad, arena))
        assert helps.verdict == "accept" and harms.verdict == "reject"
        assert first.num_run > 0 and second.num_run > 0
        tried = trials_of(keeper, good)
        assert len(tried) == helps.num_trials == len({one.trial.id for one in tried})
        assert len({one.runner for one in [*tried, *trials_of(keeper, bad)]}) == 2
        for one in tried:
            check_trial(good, one.trial, one.runner, one.signature)
        assert [keeper.audit(event) for event in keeper.store.history(keeper.memory(good)) if is_decision(event)] == [
            ""
        ]
        with pytest.raises(RecordError, match="signature"):
            check_trial(bad, tried[0].trial, tried[0].runner, tried[0].signature)
        assert desk.book.is_conserved and desk.num_open == 0


async def test_nothing_that_is_false_late_or_not_asked_for_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    now = [0.0]
    async with desk_at(tmp_path, lease_s=10.0) as (desk, keeper, listener):
        desk._clock = lambda: now[0]
        entry = keeper.add(advice(HELPS))
        arena = make_arena(tiny_model)
        admitting = asyncio.create_task(desk.admit(entry.id, arena))
        await asyncio.sleep(0)
        node = listener.identity
        async with await Fabric.connect(Identity.generate(), listener.ticket("run", SECRET)) as fabric:
            own = fabric.identity

            async def ask(what: str, body: object) -> bytes:
                return await ask_desk(fabric, node.public_key, node.node_id, what, body, 10.0)  # type: ignore[arg-type]

            async def hand_in(lease: str, *trials: object) -> bool:
                body = HandIn(lease=lease, entry=entry.id, trials=trials)  # type: ignore[arg-type]
                return decode(await ask("hand-in", body), Answer).accepted

            want = Want(model=arena.model, families={FAMILY: arena.config}, most=2)
            assert decode(await ask("lease", replace(want, model="others")), Leased).lease is None
            lease = decode(await ask("lease", want), Leased).lease
            assert lease is not None and lease.numbers == (0, 1)
            trials = [await arena.run(lease.entry, lease.salt, n) for n in lease.numbers]
            foreign = await arena.run(lease.entry, lease.salt, 77)
            good = sign_trial(own, entry.id, trials[0])
            forged = replace(sign_trial(own, entry.id, trials[1]), signature=bytes(64))
            stranger = sign_trial(Identity.generate(), entry.id, trials[1])
            # One forged trial spoils what came with it; what others signed, and what was not leased, does not count.
            assert not await hand_in(lease.id, good, forged)
            assert desk.book.is_conserved and not keeper.store.trials(entry)
            lease = decode(await ask("lease", want), Leased).lease
            assert lease is not None and lease.numbers == (0, 1)
            assert await hand_in(lease.id, good, stranger, sign_trial(own, entry.id, foreign))
            assert list(keeper.store.trials(entry)) == [trials[0].id]
            assert not await hand_in(lease.id, good)
            # What did not come is leased again, and a lease without progress ends.
            lease = decode(await ask("lease", want), Leased).lease
            assert lease is not None and lease.numbers == (1, 2)
            now[0] = 11.0
            again = decode(await ask("lease", want), Leased).lease
            assert again is not None and again.numbers == (1, 2)
            assert not await hand_in(lease.id, sign_trial(own, entry.id, trials[1]))
            assert len(keeper.store.trials(entry)) == 1 and desk.book.is_conserved
        admitting.cancel()
        await asyncio.gather(admitting, return_exceptions=True)


async def test_a_candidate_without_siblings_keeps_no_other_from_being_tried(tiny_model: Path, tmp_path: Path) -> None:
    arena, alone = make_arena(tiny_model), make_arena(tiny_model)
    alone.env.sibling = lambda task_id, index, seed: Task(env=FAMILY, id=task_id, seed=0)  # type: ignore[method-assign]
    async with desk_at(tmp_path) as (desk, keeper, listener), asyncio.timeout(60):
        with pytest.raises(ConfigError, match="no task but"):
            await desk.admit(keeper.add(advice(HELPS)).id, alone)
        async with replaying(listener, arena):
            assert (await desk.admit(keeper.add(advice(HARMS)).id, arena)).verdict == "reject"


@pytest.mark.parametrize("answer", [b"\xc1", encode(Answer(accepted=True))])
async def test_a_desk_that_answers_nonsense_ends_no_replayer(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr("shoal.memory.replayer.IDLE_S", 0.05)
    num_asked = 0

    async def lease(request: Request) -> bytes:
        nonlocal num_asked
        num_asked += 1
        return answer

    async with await Fabric.listen(Identity.generate()) as listener:
        await listener.serve(desk_key(listener.identity.node_id, "lease"), lease, max_bytes=2**16)
        async with replaying(listener, make_arena(tiny_model)), asyncio.timeout(20):
            await until(lambda: num_asked > 1)


@pytest.mark.slow
async def test_replayers_that_are_killed_cost_time_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    async with desk_at(tmp_path / "m", lease_s=2.0) as (desk, keeper, listener):
        entry = keeper.add(advice(HELPS)).id
        ticket = listener.ticket("run", SECRET).encode()

        async def start() -> asyncio.subprocess.Process:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                str(PROCESS),
                str(tiny_model),
                ticket,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])},
            )

        admitting = asyncio.create_task(desk.admit(entry, make_arena(tiny_model)))
        async with asyncio.timeout(100):
            for _ in range(2):
                victim = await start()
                # Killed while it holds a lease, as soon as that is so.
                await until(lambda: desk.book.running)
                victim.send_signal(signal.SIGKILL)
                await victim.wait()
                await until(lambda: not desk.book.running)
            assert desk.book.counts["expired"] > 0
            async with replaying(listener, make_arena(tiny_model)):
                decision = await admitting
        assert decision.verdict == "accept"
        tried = trials_of(keeper, entry)
        numbers = [make_arena(tiny_model).id_of(keeper.memory(entry).entry, keeper.store.node, n) for n in range(64)]
        assert sorted(one.trial.id for one in tried) == sorted(numbers[: len(tried)])
        assert len(tried) == decision.num_trials and desk.book.is_conserved
