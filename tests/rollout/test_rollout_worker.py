"""Workers in a real run inside this process: what they do with leases, faults, stops and silence."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from msgspec.structs import replace

from shoal.broadcast.chain import build_manifest, sign_manifest
from shoal.coordinator.rundir import RunDir
from shoal.errors import JoinRefused, ModelError, NetworkError, StorageError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity, data_dir
from shoal.fabric.join import make_join_request
from shoal.fabric.ticket import Ticket
from shoal.protocol.codec import decode, encode
from shoal.protocol.node import JoinReply
from shoal.protocol.roster import SwarmRole
from shoal.protocol.sampling import SampleRequest, SamplingParams
from shoal.protocol.work import BatchRequest, LeaseRequest, StepReply, StepReport
from shoal.rollout import patience
from shoal.rollout.link import RunLink, join

Make = Callable[..., Awaitable[Any]]


def events(run: Any, kind: str) -> list[dict[str, Any]]:
    lines = (run.run.path / "events.jsonl").read_text().splitlines()
    return [e["data"] | {"node": e["node"]} for e in map(json.loads, lines) if e["kind"] == kind]


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for something to become true; a test that waits in vain fails."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  What is waited for knows nothing of tests.
            await asyncio.sleep(0.02)


async def test_a_worker_serves_a_run_to_its_end(make_run: Make) -> None:
    run = await make_run(run__steps=2, eval__before=True, eval__after=True)
    async with run.worker("ann") as worker:
        acting = asyncio.create_task(worker.run())
        await run.publish(0)
        for version in (0, 1):
            episodes = (await run.batch(version)).episodes
            assert len(episodes) == 12 and {e.worker for e in episodes} == {worker._link.node_id}
            assert all(version - e.version <= 2 and e.outcome == "done" for e in episodes)
            await run.publish(version + 1, checkpointed=version == 1)
        await until(lambda: run.control.evals.results.keys() == {0, 2})
        async with asyncio.timeout(10):
            await acting
    assert worker.num_submitted == run.control.book.counts["accepted"] and run.control.book.is_conserved
    assert [e["reason"] for e in events(run, "node.left")] == ["left"]
    assert run.control.consumption.by_name == {"ann": 24}


async def test_pull_acts_under_exactly_the_asked_version(make_run: Make) -> None:
    run = await make_run(run__steps=3, learner__mode="pull")
    async with run.worker("ann") as worker:
        acting = asyncio.create_task(worker.run())
        await run.publish(0)
        for version in range(3):
            episodes = (await run.batch(version)).episodes
            assert {v for e in episodes for t in e.turns for v in t.completion.versions} == {version}
            await run.publish(version + 1, checkpointed=version == 2)
        await acting
    assert run.control.book.counts == {"leased": 36, "accepted": 36, "rejected": 0, "void": 0}


async def test_several_turns_and_groups_larger_than_the_slots(make_run: Make) -> None:
    """A group that does not fit the sequences at once still is one group."""
    run = await make_run(
        run__steps=1, envs__digit__type="tiny:TwoTurns", rollout__group_size=24, rollout__groups_per_step=2
    )
    async with run.worker("ann", max_sequences=16) as worker:
        acting = asyncio.create_task(worker.run())
        await run.publish(0)
        episodes = (await run.batch(0)).episodes
        assert len(episodes) == 48 and all(len(e.turns) == 2 for e in episodes)
        assert all(e.turns[1].observation == "again?" for e in episodes)
        acting.cancel()
        await asyncio.gather(acting, return_exceptions=True)


async def test_what_an_environments_author_got_wrong_is_void_and_said(make_run: Make) -> None:
    run = await make_run(envs__digit__type="tiny:Broken")
    async with run.worker("ann") as worker:
        acting = asyncio.create_task(worker.run())
        await run.publish(0)
        await until(lambda: run.control.book.counts["void"] >= 4)
        acting.cancel()
        await asyncio.gather(acting, return_exceptions=True)
    refused = events(run, "rollout.refused")
    assert refused[0]["reason"] == "ValueError in environment 'digit': the author divided by a banana"
    assert not run.control.queue.buffered and run.control.book.counts["accepted"] == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_engine_that_fails_ends_its_worker_and_costs_its_leases(make_run: Make) -> None:
    run = await make_run()
    async with run.worker("ann") as worker:
        acting = asyncio.create_task(worker.run())
        await run.publish(0)
        await until(lambda: run.control.book.counts["accepted"])

        def fail() -> bool:
            raise MemoryError("no more of it")

        worker._engine._batcher.step = fail  # type: ignore[method-assign]
        await run.batch(0)
        await run.publish(1)
        with pytest.raises(ModelError, match="no more of it"):
            async with asyncio.timeout(20):
                await acting
    assert run.control.book.num_running == 0 and run.control.book.is_conserved
    assert any("no more of it" in e["reason"] for e in events(run, "rollout.refused"))
    assert [e["reason"] for e in events(run, "node.left")] == ["left"]


async def test_a_version_that_cannot_be_fetched_is_void_and_said(make_run: Make) -> None:
    run = await make_run()
    async with run.worker("ann") as worker:
        acting = asyncio.create_task(worker.run())
        await run.publish(0)
        await until(lambda: run.control.book.counts["accepted"])
        for path in (run.run.path / "snapshots" / "chunks").glob("*/*"):
            path.unlink()
        for path in data_dir().glob("snapshots/*/chunks/*/*"):
            path.unlink()
        run.control.published = 7
        await until(lambda: run.control.book.counts["void"])
        assert not acting.done(), "a fault of the network does not end a worker"
        acting.cancel()
        await asyncio.gather(acting, return_exceptions=True)
    assert "no policy version 7" in events(run, "rollout.refused")[0]["reason"]


async def test_a_lease_that_is_stuck_is_lost_though_its_worker_is_busy(make_run: Make) -> None:
    """Tokens that are drawn for others are no progress of this lease."""
    run = await make_run(envs__digit__type="tiny:Stuck", rollout__lease_timeout_s=1.5)
    async with run.worker("ann") as worker:
        acting = asyncio.create_task(worker.run())

        async def keep_busy() -> None:
            while True:
                await worker._engine.sample(SampleRequest(prompt_ids=(2, 5, 1, 3), params=SamplingParams(max_tokens=8)))

        busy = asyncio.create_task(keep_busy())
        await run.publish(0)
        await until(lambda: run.control.book.counts["expired"] >= 4)
        stuck = events(run, "lease.expired")[0]["lease"]
        await until(lambda: stuck not in worker._jobs)
        for task in (acting, busy):
            task.cancel()
        await asyncio.gather(acting, busy, return_exceptions=True)
    assert worker._engine.stats().tokens_drawn > 100 and run.control.book.is_conserved


async def test_stop_hands_in_what_runs_and_takes_no_more(make_run: Make) -> None:
    run = await make_run(envs__digit__type="tiny:Slow", run__steps=50)
    async with run.worker("ann") as worker:
        acting = asyncio.create_task(worker.run())
        await run.publish(0)
        await until(lambda: len(worker._jobs) >= 2)
        running = set(worker._jobs)
        worker.stop()
        async with asyncio.timeout(20):
            await acting
    book = run.control.book
    assert {book.ended[lease] for lease in running} == {"finished"} and book.num_running == 0
    assert book.counts["accepted"] == worker.num_submitted
    assert book.counts["void"] <= 4, "at most a lease that was on its way"
    assert [e["reason"] for e in events(run, "node.left")] == ["left"]


async def test_stop_without_grace_gives_leases_back_at_once(make_run: Make) -> None:
    run = await make_run(envs__digit__type="tiny:Stuck", run__steps=50)
    async with run.worker("ann") as worker:
        acting = asyncio.create_task(worker.run(grace_s=0.1))
        await run.publish(0)
        await until(lambda: run.control.book.num_running >= 8)
        worker.stop()
        async with asyncio.timeout(10):
            await acting
    assert run.control.book.num_running == 0 and run.control.book.counts["void"] >= 8
    assert {e["reason"] for e in events(run, "lease.void")} == {"left"}


async def test_the_runs_end_cuts_off_what_nobody_needs(make_run: Make) -> None:
    run = await make_run(envs__digit__type="tiny:Stuck", eval__after=False)
    async with run.worker("ann") as worker:
        acting = asyncio.create_task(worker.run())
        await run.publish(0)
        await until(lambda: run.control.book.num_running)
        run.control.version, run.control._saved = run.config.run.steps, True
        assert run.control.ended
        async with asyncio.timeout(10):
            await acting


def joined(run: Any) -> list[dict[str, Any]]:
    return [e for e in events(run, "node.joined") if e["role"] == "worker"]


async def test_a_coordinator_that_comes_back_is_joined_again(make_run: Make) -> None:
    run = await make_run(run__steps=50)
    async with run.worker("ann") as worker:
        acting = asyncio.create_task(worker.run())
        await run.publish(0)
        await run.batch(0)
        await run.stop()
        await asyncio.sleep(0.5)
        await run.start()
        await run.publish(1)
        assert (await run.batch(0)).episodes and (await run.batch(1)).episodes
        assert run.control.consumption.by_name == {"ann": 24}
        # What was trained may all have come before the stop; whoever asks for more has to join again.
        await until(lambda: len(joined(run)) == 2)
        worker.stop()
        await acting
    assert len(joined(run)) == 2 and len({e["node"] for e in joined(run)}) == 1


async def test_questions_asked_at_once_introduce_a_node_once(make_run: Make) -> None:
    """Whoever joins is taken for newly started, and would lose what it was just given."""
    run = await make_run()
    async with await Fabric.connect(Identity.generate(), run.ticket) as fabric:
        link = RunLink(fabric, run.ticket, "worker", "ann")
        await asyncio.gather(*(link.lease(0, 8) for _ in range(5)))
    assert [e["role"] for e in events(run, "node.joined")] == ["learner", "worker"]


@pytest.mark.slow
async def test_a_silent_coordinator_is_given_up(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "LOST_AFTER_S", 2.0)
    run = await make_run()
    async with run.worker("ann") as worker:
        acting = asyncio.create_task(worker.run())
        await run.publish(0)
        await until(lambda: run.control.book.counts["leased"])
        await run.stop()
        with pytest.raises(NetworkError, match="has not answered for"):
            async with asyncio.timeout(60):
                await acting


async def test_who_may_not_join_hears_why(make_run: Make) -> None:
    run = await make_run()

    async def refusal(ticket: Ticket, role: SwarmRole = "worker") -> str:
        async with await Fabric.connect(Identity.generate(), run.ticket) as fabric:
            with pytest.raises(JoinRefused) as caught:
                await join(fabric, ticket, role, "eve", device="cpu", threads=1)
            return str(caught.value)

    assert "secret" in await refusal(replace(run.ticket, secret=b"x" * 16))
    assert "run" in await refusal(replace(run.ticket, run="another"))
    assert "learner" in await refusal(run.ticket, "learner")
    run.control.failure = StorageError("over")
    assert "over" in await refusal(run.ticket)
    assert len(events(run, "node.refused")) >= 4 and not run.coordinator.workers()


async def test_another_version_of_shoal_hears_so(make_run: Make) -> None:
    """Whatever else its join request holds."""
    run = await make_run()
    async with await Fabric.connect(Identity.generate(), run.ticket) as fabric:
        asked = make_join_request(
            fabric.identity, run.ticket, "worker", "eve", now=time.time(), device="cpu", threads=1
        )
        data = encode(replace(asked, protocol_version=99))
        reply = decode(await fabric.request("run/join", data, 5.0, to=run.fabric.identity.public_key), JoinReply)
    assert not reply.accepted and reply.code == "version" and "version" in reply.reason


async def test_strangers_and_workers_may_not_do_the_learners_part(make_run: Make) -> None:
    run = await make_run()
    async with await Fabric.connect(Identity.generate(), run.ticket) as fabric:
        requests = {
            "lease": LeaseRequest(node_id="me", version=0, free_slots=9),
            "batch": BatchRequest(version=0),
            "step": StepReport(version=9, metrics={"reward": 1.0}),
        }
        for joined in (False, True):
            if joined:
                await join(fabric, run.ticket, "worker", "eve", device="cpu", threads=1)
            for verb, message in requests.items():
                if joined and verb == "lease":
                    continue
                with pytest.raises(RemoteError) as caught:
                    await fabric.request(f"run/{verb}", encode(message), 5.0, to=run.fabric.identity.public_key)
                assert caught.value.kind == ("refused" if joined else "stranger")
                assert not joined or "may not act as learner" in str(caught.value)
    assert run.control.version == 0


@pytest.mark.parametrize("damage", ["signature", "version", "another run"])
async def test_what_is_not_on_the_chain_is_not_published(make_run: Make, damage: str) -> None:
    run = await make_run()
    name = "another" if damage == "another run" else run.run.name
    signed = sign_manifest(build_manifest(name, "policy", 1, b"", {}), run.learner)
    if damage == "signature":
        signed = replace(signed, signature=bytes(64))
    report = StepReport(version=2 if damage == "version" else 1, metrics={}, manifest=encode(signed))
    with pytest.raises(RemoteError):
        await run.link.call("step", report, StepReply)
    assert run.control.published == -1


async def test_a_full_disk_ends_the_run_in_words(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = await make_run()
    async with run.worker("ann") as worker:
        acting = asyncio.create_task(worker.run())
        await run.publish(0)

        def full(*_: object, **__: object) -> None:
            raise StorageError("the disk is full.", "Free some space.")

        monkeypatch.setattr(RunDir, "write_atomic", full)
        with pytest.raises(StorageError, match="the disk is full"):
            async with asyncio.timeout(20):
                await run.coordinator.finished()
        assert run.control.ended
        with suppress(NetworkError):
            await acting
    await run.coordinator.dismissed(5.0)
    assert not run.coordinator.workers()
